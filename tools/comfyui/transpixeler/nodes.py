"""The nodes: what a user connects in ComfyUI, in terms of streams, adapters and patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import AdapterFile, read_adapter, stream_strengths
from .patches import patched
from .pictures import enlarged, fitted, rgba, shrunk
from .streams import Streams, of_latent

CATEGORY = "transpixeler"
JOINT = "TRANSPIXELER_STREAMS"
Latent = dict[str, Any]
STRENGTH = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05})
BY_STREAM = ("STRING", {"default": "", "tooltip": "such as: rgb=0.5, seg=1 (times the strength); empty: 1 for each"})
COUNT = ("INT", {"default": 2, "min": 2, "max": 8})
TIME_STRIDE = 4  # frames of a video that one latent frame holds, but for the first


# --- adapters --------------------------------------------------------------------------------------------------------


def _files() -> tuple[list[str]]:
    import folder_paths  # pyright: ignore[reportMissingImports] - ComfyUI's own

    return (folder_paths.get_filename_list("loras"),)


def _read(name: str) -> AdapterFile:
    import folder_paths  # pyright: ignore[reportMissingImports] - ComfyUI's own

    return read_adapter(folder_paths.get_full_path_or_raise("loras", name))


class JointAdapter:
    """Put an adapter on a model; a second one of the same streams may follow."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", JOINT), ("model", "streams")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "adapter": _files(), "strength": STRENGTH},
            "optional": {"stream_strengths": BY_STREAM},
        }

    def load(self, model: Any, adapter: str, strength: float, stream_strengths: str = "") -> tuple[Any, Streams]:
        return put_on(model, _read(adapter), strength, stream_strengths)


class JointExperts:
    """Put the two adapters of a run on the two models of Wan 2.2 A14B."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "MODEL", JOINT), ("high", "low", "streams")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        models = {"model_high": ("MODEL",), "model_low": ("MODEL",)}
        files = {"adapter_high": _files(), "adapter_low": _files()}
        strengths = {"strength_high": STRENGTH, "strength_low": STRENGTH}
        return {"required": models | files | strengths, "optional": {"stream_strengths": BY_STREAM}}

    def load(
        self,
        model_high: Any,
        model_low: Any,
        adapter_high: str,
        adapter_low: str,
        strength_high: float,
        strength_low: float,
        stream_strengths: str = "",
    ) -> tuple[Any, Any, Streams]:
        high, low = _read(adapter_high), _read(adapter_low)
        for name, file, wanted in ((adapter_high, high, "high"), (adapter_low, low, "low")):
            if file.expert not in ("", wanted):
                raise ValueError(f"adapter_{wanted}: {name} was trained for the expert {file.expert}")
        if high.streams != low.streams:
            raise ValueError(f"the adapters have different streams: {high.streams.told()} and {low.streams.told()}")
        first, streams = put_on(model_high, high, strength_high, stream_strengths)
        return first, put_on(model_low, low, strength_low, stream_strengths)[0], streams


def put_on(model: Any, file: AdapterFile, strength: float, by_stream: str) -> tuple[Any, Streams]:
    """Return the patched model, and the streams that it generates."""
    return patched(model, file, strength, stream_strengths(by_stream, file.streams)), file.streams


class ExpertStep:
    """Find the step where the low-noise model takes over: the first whose noise level is below the boundary."""

    CATEGORY, FUNCTION = CATEGORY, "find"
    RETURN_TYPES, RETURN_NAMES = ("INT",), ("step",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import comfy.samplers  # pyright: ignore[reportMissingImports] - ComfyUI's own

        boundary = ("FLOAT", {"default": 0.875, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": "I2V: 0.9"})
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "with the shift that is sampled with"}),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS,),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
                "boundary": boundary,
            }
        }

    def find(self, model: Any, scheduler: str, steps: int, boundary: float) -> tuple[int]:
        import comfy.samplers  # pyright: ignore[reportMissingImports] - ComfyUI's own

        levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        return (int((levels[:-1] >= boundary).sum()),)


# --- latents ---------------------------------------------------------------------------------------------------------


class JointLatent:
    """Make the latent of all streams; what is given of them is held while the rest is made.

    Mattes are pictures in which white is visible.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"min": 16, "max": 8192, "step": 16}
        given = {"rgb": "a video: its mattes are made", "alpha": "a video of mattes: it is painted"}
        first = {"image": "the first frame", "image_alpha": "the matte of the first frame"}
        return {
            "required": {
                "width": ("INT", {"default": 832, **side}),
                "height": ("INT", {"default": 480, **side}),
                "length": ("INT", {"default": 33, "min": 1, "max": 4096, "step": TIME_STRIDE}),
                "streams": ("INT", {"default": 2, "min": 1, "max": 8, "tooltip": "where no adapter tells them"}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            },
            "optional": {
                "adapter_streams": (JOINT,),
                "vae": ("VAE", {"tooltip": "needed for what is given, and for Wan 2.2 5B"}),
                **{name: ("IMAGE", {"tooltip": tip}) for name, tip in (given | first).items()},
            },
        }

    def make(
        self,
        width: int,
        height: int,
        length: int,
        streams: int,
        batch_size: int,
        adapter_streams: Streams | None = None,
        vae: Any = None,
        rgb: Tensor | None = None,
        alpha: Tensor | None = None,
        image: Tensor | None = None,
        image_alpha: Tensor | None = None,
    ) -> tuple[Latent]:
        known = adapter_streams or of_latent({}, streams)
        given = {"rgb": rgb, "alpha": alpha, "image": image, "image_alpha": image_alpha}
        given = {name: pictures for name, pictures in given.items() if pictures is not None}
        _check_given(given, known, vae)
        channels, stride = _latent_sizes(vae)
        known.check_sides(height, width, unit=2 * stride, what="the video")
        frames = 1 + (length - 1) // TIME_STRIDE
        empty = torch.zeros(batch_size, channels, frames * len(known.names), height // stride, width // stride)
        latent = {"samples": empty, "transpixeler": known}
        if given:
            latent["noise_mask"] = torch.ones(batch_size, 1, *empty.shape[2:])
        for name, pictures in given.items():
            whole, stream = not name.startswith("image"), int("alpha" in name)
            count = 1 + (frames - 1) * TIME_STRIDE if whole else 1
            found = fitted(pictures, frames=count, height=height, width=width, name=name)
            part = vae.encode(shrunk(found, known.scales[stream]))
            for key, value in (("samples", part), ("noise_mask", 0.0)):
                known.parts(latent[key])[stream][:, :, : part.shape[2]] = value
        return (latent,)


def _latent_sizes(vae: Any) -> tuple[int, int]:
    """Return the channels and the stride of a VAE's latents; without one, those of all but Wan 2.2 5B."""
    return (16, 8) if vae is None else (vae.latent_channels, vae.spacial_compression_encode())


def _check_given(given: Mapping[str, Tensor], streams: Streams, vae: Any) -> None:
    name = next(iter(given), "")
    if name and vae is None:
        raise ValueError(f"{name}: needs the vae, to encode it")
    if "alpha" in "".join(given) and len(streams.names) < 2:
        raise ValueError("alpha: the model has one stream, and no matte")
    if {"rgb", "alpha"} <= given.keys() and len(streams.names) == 2:
        raise ValueError("rgb, alpha: every stream is given and none is left to make; leave one out")
    if clash := [
        f"{whole}, {first}"
        for whole, first in (("rgb", "image"), ("alpha", "image_alpha"))
        if {whole, first} <= given.keys()
    ]:
        raise ValueError(f"{clash[0]}: the video gives the first frame too; leave one out")


class JointImage:
    """Show a first frame to an image-to-video model, which has channels for it beside the latent's."""

    CATEGORY, FUNCTION = CATEGORY, "show"
    RETURN_TYPES, RETURN_NAMES = ("CONDITIONING", "CONDITIONING"), ("positive", "negative")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        texts = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        optional = {"image_alpha": ("IMAGE",), "clip_vision_output": ("CLIP_VISION_OUTPUT",)}
        return {
            "required": texts | {"vae": ("VAE",), "latent": ("LATENT",), "image": ("IMAGE",)},
            "optional": optional,
        }

    def show(
        self,
        positive: Any,
        negative: Any,
        vae: Any,
        latent: Latent,
        image: Tensor,
        image_alpha: Tensor | None = None,
        clip_vision_output: Any = None,
    ) -> tuple[Any, Any]:
        import node_helpers  # pyright: ignore[reportMissingImports] - ComfyUI's own

        streams = of_latent(latent, 2)
        values = self._values(streams, vae, latent["samples"].shape, [image, image_alpha])
        if clip_vision_output is not None:
            values["clip_vision_output"] = clip_vision_output
        first, second = (node_helpers.conditioning_set_values(text, values) for text in (positive, negative))
        return first, second

    def _values(self, streams: Streams, vae: Any, shape: Sequence[int], shown: Sequence[Tensor | None]) -> Latent:
        """Return each stream's video of its first frame and grey ones, encoded, and where frames are not shown."""
        stride = vae.spacial_compression_encode()
        count, height, width = 1 + (streams.frames(shape[2]) - 1) * TIME_STRIDE, shape[3] * stride, shape[4] * stride
        mask = torch.ones(1, 1, *shape[2:])
        parts, masks = [], streams.parts(mask)
        for number, scale in enumerate(streams.scales):
            video = torch.full((count, height, width, 3), 0.5)
            picture = shown[number] if number < len(shown) else None
            if picture is not None:
                video[:1] = fitted(picture, frames=1, height=height, width=width, name="image")
                masks[number][:, :, :1] = 0
            parts.append(vae.encode(shrunk(video, scale)))
        return {"concat_latent_image": streams.joined(parts), "concat_mask": mask}


class JointSplit:
    """Split off the latents of the first stream and of one companion."""

    CATEGORY, FUNCTION = CATEGORY, "split"
    RETURN_TYPES, RETURN_NAMES = ("LATENT", "LATENT"), ("rgb", "companion")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        number = ("INT", {"default": 1, "min": 1, "max": 7})
        return {"required": {"samples": ("LATENT",), "streams": COUNT, "companion": number}}

    def split(self, samples: Latent, streams: int, companion: int) -> tuple[Latent, Latent]:
        parts = _parts(samples, streams)
        if companion >= len(parts):
            raise ValueError(f"companion {companion} of {len(parts)} streams; the last is {len(parts) - 1}")
        rest = {key: value for key, value in samples.items() if key not in ("samples", "noise_mask", "transpixeler")}
        return rest | {"samples": parts[0]}, rest | {"samples": parts[companion]}


class JointDecode:
    """Decode the pictures, a companion as a mask where white is visible, and both as RGBA."""

    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "MASK", "IMAGE", "IMAGE"), ("rgb", "mask", "companion", "rgba")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        turned = ("BOOLEAN", {"default": False, "label_on": "for Join Image with Alpha", "label_off": "white: visible"})
        mode = (["straight", "premultiplied"], {"tooltip": "the colour in rgba; PNG files hold straight colour"})
        return {
            "required": {"samples": ("LATENT",), "vae": ("VAE",), "streams": COUNT, "inverted": turned},
            "optional": {"alpha_mode": mode},
        }

    def decode(
        self, samples: Latent, vae: Any, streams: int, inverted: bool, alpha_mode: str = "straight"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rgb, companion = (_pictures(vae, part) for part in _parts(samples, streams)[:2])
        companion = enlarged(companion, rgb)
        mask = companion.mean(-1)
        return rgb, 1.0 - mask if inverted else mask, companion, rgba(rgb, mask, alpha_mode)


def _parts(samples: Latent, streams: int) -> list[Tensor]:
    """Cut a latent [B, C, frames of all streams, h, w] into one for each stream."""
    latent, known = samples["samples"], of_latent(samples, streams)
    if latent.ndim != 5 or latent.shape[2] % len(known.names):
        raise ValueError(f"a latent of {list(latent.shape)} does not hold {len(known.names)} streams")
    return known.parts(latent)


def _pictures(vae: Any, latent: Tensor) -> Tensor:
    """Decode to [frames of the whole batch, H, W, 3]. Each stream goes alone, since the VAE looks back in time."""
    return vae.decode(latent).flatten(0, -4)


NODE_CLASS_MAPPINGS = {
    "TranspixelerJointAdapter": JointAdapter,
    "TranspixelerJointExperts": JointExperts,
    "TranspixelerExpertStep": ExpertStep,
    "TranspixelerJointLatent": JointLatent,
    "TranspixelerJointImage": JointImage,
    "TranspixelerJointSplit": JointSplit,
    "TranspixelerJointDecode": JointDecode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TranspixelerJointAdapter": "Joint Adapter (Wan)",
    "TranspixelerJointExperts": "Joint Adapters of Two Experts (Wan)",
    "TranspixelerExpertStep": "Step of the Second Expert (Wan)",
    "TranspixelerJointLatent": "Joint Latent (Wan)",
    "TranspixelerJointImage": "Joint Image to Video (Wan)",
    "TranspixelerJointSplit": "Joint Split (Wan)",
    "TranspixelerJointDecode": "Joint Decode (Wan)",
}
