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
FORMS: dict[str, dict[str, Any]] = {
    "latent_concat": {"image_condition_type": "latent_concat", "in_channels": 9, "guidance_embeds": False},
    "token_replace": {"image_condition_type": "token_replace"},
}
FIRST = 2  # tokens before the template's own
SIDE = 48  # pixels of the pictures that the language model sees


def published(**overrides: Any) -> Any:
    """Build diffusers' class with every parameter moved."""
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(**(TINY | overrides))
    move(model, seed=3)
    return model


def write_pipeline(folder: Path, form: str = "", **overrides: Any) -> None:
    """Write a pipeline of random weights in diffusers' layout; form: the `image_condition_type`, if any."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import HunyuanVideoImageToVideoPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = _llama_tokenizer(form)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        llama, clip, vae = (llava if form else _llama)(tokenizer), _clip(), _vae()
    words = {letter: place for place, letter in enumerate(_clip_words())}
    parts = folder / "tokenizer_2"
    parts.mkdir(parents=True)
    (parts / "vocab.json").write_text(json.dumps(words))
    (parts / "merges.txt").write_text("#version: 0.2\n")
    image = {"image_processor": _processor()} if form else {}
    (HunyuanVideoImageToVideoPipeline if form else HunyuanVideoPipeline)(
        tokenizer=tokenizer,
        text_encoder=llama.eval(),
        tokenizer_2=CLIPTokenizer(str(parts / "vocab.json"), str(parts / "merges.txt"), model_max_length=77),
        text_encoder_2=clip.eval(),
        vae=vae,
        transformer=published(**(FORMS[form] if form else {}), **overrides),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **image,
    ).save_pretrained(folder)


SIZES = {"hidden_size": TINY["text_embed_dim"], "intermediate_size": 32, "num_attention_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **SIZES, **ENDS))


def llava(tokenizer: Any) -> Any:
    """Make a language model with a vision tower that makes 24×24 tokens of a picture, as the published one does."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=2, **narrow)
    text = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, **SIZES, **ENDS)
    image = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": 0}
    made = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **image))
    move(made, seed=6)
    return made


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    width = TINY["pooled_projection_dim"]
    narrow = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**narrow, vocab_size=64, bos_token_id=62, eos_token_id=63, pad_token_id=63))


def _vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    channels = TINY["in_channels"]
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=channels
    )


def _processor() -> Any:
    from transpixeler.models.encoders import image_processor_class

    return image_processor_class()(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _llama_tokenizer(form: str) -> Any:
    """Make a tokenizer that gives the template as many tokens before the caption as the published one does.

    A picture's mark is the sixth token.
    """
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as text
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as image
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    template = (image if form else text).DEFAULT_PROMPT_TEMPLATE
    before, _, _ = template["template"].partition("{}")
    pieces = re.findall(r"<\|?\w+\|?>|\w+|[^\w\s]", before)
    special = ["<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<unk>", *sorted({p for p in pieces if p[0] == "<"})]
    special = [*dict.fromkeys([*special, "<|eot_id|>"])]
    letters = [*string.printable[:94], *(f"##{letter}" for letter in string.printable[:94])]
    words = {word: place for place, word in enumerate(dict.fromkeys([*special, *letters, *pieces]))}
    made = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # the published one counts line breaks, and the parts of long words
    more = template["crop_start"] - FIRST - len(pieces)
    made.normalizer = normalizers.Replace("Describe", f"Describe {'. ' * more}")
    single = " ".join(["<|begin_of_text|>"] * FIRST + ["$A", "<|end_of_text|>"][: 2 if form else 1])
    ends = [("<|begin_of_text|>", 1), ("<|end_of_text|>", 2)]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
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
