"""A folder goes in; the demo's tiny Wan pipeline comes out in it: real classes, diffusers' layout, trained weights.

`tools/train_demo_weights.py` made the weights; `assets/README.md` says how, and how good they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transpixeler.demo.scenes import Format, all_attributes, render, scenes
from transpixeler.files import whole

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

ASSETS = Path(__file__).parent / "assets"
TEXT_DIM = 64
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 8,  # wide enough to hold a companion's noise and, beside it, what it reads off the RGB
    "attention_head_dim": 24,  # splits over time, height and width as 8/8/8
    "num_layers": 4,  # enough to be cut into pipeline stages
    "ffn_dim": 384,
    "text_dim": TEXT_DIM,
}
VAE: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1}
TEXT_ENCODER: dict[str, Any] = {"d_model": TEXT_DIM, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
LATENT_SCALES = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    transformer: WanTransformer3DModel


def write_model(folder: Path, *, seed: int | None = None) -> None:
    """Write the trained pipeline; with a seed, random weights for tests that need another model of its shape."""
    if seed is not None:
        parts = random_parts(seed)
        measure_latents(parts.vae, seed)
    else:
        parts = trained_parts(ASSETS)
    write_pipeline(folder, parts)


def random_parts(seed: int) -> Parts:
    """Make every part with random weights."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(**TRANSFORMER)
        vae = AutoencoderKLWan(**VAE)
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **TEXT_ENCODER))
    return Parts(tokenizer, text_encoder.eval(), vae.eval(), transformer.eval())


def trained_parts(folder: Path) -> Parts:
    """Load the weights that `tools/train_demo_weights.py` leaves in a folder."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    parts = random_parts(0)
    for name in ("text_encoder", "vae", "transformer"):
        state = {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()}
        missing, unknown = getattr(parts, name).load_state_dict(state, strict=False)
        assert not unknown and set(missing) <= {"encoder.embed_tokens.weight"}, (missing, unknown)  # tied to `shared`
    with safe_open(folder / "vae.safetensors", "pt") as file:
        parts.vae.register_to_config(**json.loads(file.metadata()["scales"]))
    return parts


def weights_digest() -> str:
    """Return eight letters that tell these weights from others."""
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(ASSETS.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write_pipeline(folder: Path, parts: Parts) -> None:
    """Write FOLDER in diffusers' layout, in place of what is there; it appears when it is whole."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(
        tokenizer=parts.tokenizer,  # pyright: ignore[reportArgumentType]  AutoTokenizer makes it, and is no base class
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        transformer=parts.transformer,
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]  the stubs name one of the schedulers that it takes
    )
    with whole(folder) as unfinished:
        pipeline.save_pretrained(unfinished)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, seed: int) -> None:
    """Put the latents' mean and deviation into the VAE's config, so that the transformer sees unit scale."""
    size = Format(64, 64, 9, Fraction(16))
    clips = [np.stack(list(render(scene))) for scene in scenes(32, formats=[size], held_out=False, seed=seed)]
    pictures = [view for clip in clips for view in (clip[..., :3], np.repeat(clip[..., 3:], 3, axis=3))]
    videos = torch.from_numpy(np.stack(pictures)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    encoded = [vae.encode(part, return_dict=False) for part in videos.split(8)]
    latents = torch.cat([distribution.mean for (distribution,) in encoded])
    latents = latents.transpose(0, 1).flatten(1)
    values = (latents.mean(1), latents.std(1))
    vae.register_to_config(**{n: [round(v, 4) for v in value.tolist()] for n, value in zip(LATENT_SCALES, values)})


def _tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer with a token for each word of the captions, and for every printable character.

    Scores are counted here because the library's own trainer finds other pieces in each run.
    """
    words: Counter[str] = Counter()
    for attributes in all_attributes():
        words.update(re.findall(r"▁?\w+|[^\w▁]", "▁" + attributes.caption.replace(" ", "▁")))
    total = sum(words.values())
    pieces = [(word, math.log(count / total)) for word, count in sorted(words.items())]
    rare = -2.0 * math.log(total)
    letters = [letter for letter in ("▁", *string.printable[:94]) if letter not in words]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return t5_tokenizer([*special, *pieces, *((letter, rare) for letter in letters)], length=512)


def t5_tokenizer(vocabulary: list[tuple[str, float]], *, length: int) -> PreTrainedTokenizerBase:
    """Make T5's tokenizer of pieces and their scores, the first three of which are padding, end and unknown.

    Only transformers 5 takes pieces; both it and 4 take a tokenizer that is made of them here.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]  its stubs do not list it

    made = Tokenizer(models.Unigram(vocabulary, unk_id=2))  # pyright: ignore[reportCallIssue]  its stubs lag behind
    spaces = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)])
    made.decoder = decoders.Metaspace(**spaces)
    ended, both = ["$A", "</s>"], ["$A", "</s>", "$B", "</s>"]
    made.post_processor = processors.TemplateProcessing(single=ended, pair=both, special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=made, extra_ids=0, model_max_length=length)
