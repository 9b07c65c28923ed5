"""A tiny HunyuanVideo pipeline that diffusers writes."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import torch

from tests.support.models import move

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "rope_axes_dim": (4, 6, 6),
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "num_layers": 2,
    "num_single_layers": 2,
}


def published(**overrides: Any) -> Any:
    """Build diffusers' class with every parameter moved."""
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(**(TINY | overrides))
    move(model, seed=3)
    return model


def write_pipeline(folder: Path, **overrides: Any) -> None:
    """Write a pipeline of random weights in diffusers' layout."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = _llama_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        sizes = {"hidden_size": TINY["text_embed_dim"], "intermediate_size": 32, "num_attention_heads": 2}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        llama = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **sizes, **ends))
        width = TINY["pooled_projection_dim"]
        narrow = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        ends = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63}
        clip = CLIPTextModel(CLIPTextConfig(**narrow, **ends))
        vae = AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=TINY["in_channels"],
        )
    words = {letter: place for place, letter in enumerate(_clip_words())}
    parts = folder / "tokenizer_2"
    parts.mkdir(parents=True)
    (parts / "vocab.json").write_text(json.dumps(words))
    (parts / "merges.txt").write_text("#version: 0.2\n")
    HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=llama.eval(),
        tokenizer_2=CLIPTokenizer(str(parts / "vocab.json"), str(parts / "merges.txt"), model_max_length=77),
        text_encoder_2=clip.eval(),
        vae=vae,
        transformer=published(**overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    ).save_pretrained(folder)


def _llama_tokenizer() -> Any:
    """Make a tokenizer that gives the template 95 tokens before the caption, as the published one does."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as DEFAULT
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    before, _, _ = DEFAULT["template"].partition("{}")
    pieces = re.findall(r"<\|\w+\|>|\w+|[^\w\s]", before)
    special = ["<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<unk>", *sorted({p for p in pieces if p[0] == "<"})]
    special = [*dict.fromkeys([*special, "<|eot_id|>"])]
    letters = [*string.printable[:94], *(f"##{letter}" for letter in string.printable[:94])]
    words = {word: place for place, word in enumerate(dict.fromkeys([*special, *letters, *pieces]))}
    made = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first = DEFAULT["crop_start"] - len(pieces)  # the published one counts line breaks, and the parts of long words
    made.post_processor = processors.TemplateProcessing(
        single=" ".join(["<|begin_of_text|>"] * first + ["$A"]), special_tokens=[("<|begin_of_text|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        padding_side="right",
        model_max_length=2048,
    )


def _clip_words() -> list[str]:
    """List letters within and at the end of a word, and the two marks at the ends of a text."""
    letters = string.ascii_lowercase
    found = [*letters, *(f"{letter}</w>" for letter in letters)]
    return [*found, *(f"<{n}>" for n in range(62 - len(found))), "<|startoftext|>", "<|endoftext|>"]
