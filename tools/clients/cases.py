"""Workflows that a real ComfyUI is asked for: those of our nodes as they are shipped, and variants of them.

A variant changes what a user would change on the page: what is connected, the files, the strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from clients.tiny import WAN, Tiny

SIDE, STEPS = 32, 4
Prompt = dict[str, dict[str, Any]]
CHAIN = {"joint.safetensors": 0.75, "second.safetensors": 0.5}  # adapters of one model, and their strengths

# -- models and adapters

SHOWN = replace(WAN, config={**WAN.config, "in_channels": 36, "out_channels": 16})
SEEING = replace(SHOWN, config={**SHOWN.config, "image_dim": 1280, "added_kv_proj_dim": 256})
FIVE_BILLION = replace(WAN, config={**WAN.config, "in_channels": 48, "out_channels": 48})
PLAIN_BASE = "wan2.1_t2v_1.3B_bf16.safetensors"
CLIP_BASE = "wan2.1_i2v_480p_14B_bf16.safetensors"
BASE_5B = "wan2.2_ti2v_5B_fp16.safetensors"


@dataclass(frozen=True)
class Trained:
    """An adapter's file, its base, and what its header says."""

    file: str
    base: str = PLAIN_BASE
    tiny: Tiny = WAN
    attends: bool = True
    said: Mapping[str, str] = field(default_factory=dict)


ADAPTERS = (
    Trained("joint.safetensors"),
    Trained("joint_scale_2.safetensors", said={"scales": "1,2"}),
    Trained("second.safetensors"),
    Trained("blind.safetensors", attends=False, said={"rgb_attends_aux": "false"}),
    Trained("clip.safetensors", CLIP_BASE, SEEING),
    Trained("5b.safetensors", BASE_5B, FIVE_BILLION),
    *(
        Trained(
            f"{prefix}{expert}.safetensors",
            f"wan2.2_{kind}_{expert}_noise_14B_fp8_scaled.safetensors",
            tiny,
            said={"expert": expert},
        )
        for kind, prefix, tiny in (("t2v", "", WAN), ("i2v", "i2v_", SHOWN))
        for expert in ("high", "low")
    ),
)


# -- what a user changes


def paint(prompt: Prompt) -> None:
    """Give the mattes, in place of the video."""
    inputs = prompt["8"]["inputs"]
    inputs["alpha"] = inputs.pop("rgb")


def give_first_matte(prompt: Prompt) -> None:
    """Give the matte of the first frame too."""
    prompt["8"]["inputs"]["image_alpha"] = prompt["8"]["inputs"]["image"]


def keep_rgb_apart(prompt: Prompt) -> None:
    """Take an adapter that was trained with `rgb_attends_aux: false`."""
    prompt["4"]["inputs"]["adapter"] = "blind.safetensors"


def chain(prompt: Prompt) -> None:
    """Put a second adapter behind the first, each at its strength."""
    last = prompt["4"]["inputs"] | {"model": ["chained", 0]}
    prompt["chained"] = {"class_type": "TranspixelerJointAdapter", "inputs": dict(prompt["4"]["inputs"])}
    prompt["4"]["inputs"] = last
    for key, (file, strength) in zip(("chained", "4"), CHAIN.items(), strict=True):
        prompt[key]["inputs"] |= {"adapter": file, "strength": strength}


def show_to_clip(prompt: Prompt) -> None:
    """Show the first frame to Wan 2.1's image-to-video model, which sees it through CLIP too."""
    prompt["1"]["inputs"]["unet_name"], prompt["4"]["inputs"]["adapter"] = CLIP_BASE, "clip.safetensors"
    image = prompt["8"]["inputs"].pop("image")
    prompt["seen"] = {"class_type": "TinyVision", "inputs": {"image": image}}
    shown = {"positive": ["6", 0], "negative": ["7", 0], "vae": ["3", 0], "latent": ["8", 0], "image": image}
    prompt["shown"] = {"class_type": "TranspixelerJointImage", "inputs": shown | {"clip_vision_output": ["seen", 0]}}
    prompt["9"]["inputs"] |= {"positive": ["shown", 0], "negative": ["shown", 1]}


def take_5b(prompt: Prompt) -> None:
    """Take Wan 2.2 5B and its VAE."""
    prompt["1"]["inputs"]["unet_name"], prompt["4"]["inputs"]["adapter"] = BASE_5B, "5b.safetensors"
    prompt["3"]["inputs"]["vae_name"] = "wan2.2_vae.safetensors"
    prompt["8"]["inputs"]["vae"] = ["3", 0]


@dataclass(frozen=True)
class Case:
    """A workflow, and what is changed in it."""

    name: str
    scale: int = 1
    steps: int = STEPS
    side: int = SIDE
    variant: str = ""
    change: Callable[[Prompt], None] = lambda prompt: None

    @property
    def told(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name


CASES = (
    Case("text_to_rgba"),
    Case("text_to_rgba", scale=2, side=2 * SIDE, variant="scale 2"),
    Case("text_to_rgba", variant="RGB apart", change=keep_rgb_apart),
    Case("text_to_rgba", variant="two adapters", change=chain),
    Case("text_to_rgba", side=2 * SIDE, variant="Wan 2.2 5B", change=take_5b),
    Case("matting"),
    Case("matting", scale=2, side=2 * SIDE, variant="scale 2"),
    Case("matting", variant="painting", change=paint),
    Case("image_to_rgba"),
    Case("image_to_rgba", variant="with its matte", change=give_first_matte),
    Case("image_to_rgba", variant="CLIP vision", change=show_to_clip),
    Case("image_to_rgba", side=2 * SIDE, variant="Wan 2.2 5B", change=take_5b),
    Case("wan2.2_text_to_rgba", steps=8),
    Case("wan2.2_image_to_rgba", steps=8),
)
