"""Define every key that a user can set: one frozen dataclass per section, with defaults and limits.

`loading` reads YAML and the command line into these. Torch is never imported here, so that an error in a config
shows at once.
"""

from __future__ import annotations

import enum
import importlib.util
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args


class UserError(Exception):
    """An error that the user can fix: printed as one line, exit code 2."""


class Fault(Exception):
    """An error whose cause is not in the input: printed as one line, exit code 1."""


@dataclass(frozen=True)
class Range:
    """Limits of a number; both ends are allowed unless `open_low`."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a value is within the limits."""
        return (value > self.low if self.open_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"{'>' if self.open_low else '≥'} {self.low:g}" if self.low != float("-inf") else ""
        high = f"≤ {self.high:g}" if self.high != float("inf") else ""
        return " and ".join(part for part in (low, high) if part)


class PathKind(enum.Enum):
    """Kind of a text that names a file: a local path, or a local path or Hub id such as `user/name`."""

    LOCAL = "local"
    HUB_OR_LOCAL = "hub"


STREAM = re.compile(r"[A-Za-z][\w-]*")  # becomes part of file names, parameter names and headers
REPO = re.compile(r"[\w.-]+/[\w.-]+")  # a Hub id
COLUMNS = ("text", "num_frames", "height", "width", "fps")  # of a manifest, beside one for each stream
FEATURES = ("latent", "text_fea")  # columns of files with features; a companion's latents are in STREAM_latent
LocalPath = Annotated[str, PathKind.LOCAL]
HubPath = Annotated[str, PathKind.HUB_OR_LOCAL]
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Interval = Annotated[int, Range(2)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Byte = Annotated[int, Range(0, 255)]
Beta = Annotated[float, Range(0, 0.999999)]
Resolution = int | tuple[int, int]  # the side of a square of the same area, or [width, height]
Size = tuple[int, int, int]  # [width, height, frames]
SampleFormat = Literal["mov", "webm", "png", "png16", "exr", "checkerboard", "composite"]
BESIDE_STREAMS = (*get_args(SampleFormat), "still", "facts")  # names that a sample's other files take


@dataclass(frozen=True)
class FuseConfig:
    """An adapter that is added to the base, and how much of it; a bare path stands for all of it."""

    path: HubPath
    strength: float = 1.0
    expert: str = ""  # of whose base, where the model has several; as the file says, or all of them


@dataclass(frozen=True)
class ModelConfig:
    family: str = ""
    path: HubPath = ""
    expert: str = "all"
    encoders: HubPath = ""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantize: Literal["none", "fp8", "int8"] = "none"
    quantize_encoders: Literal["none", "int8", "fp8", "nf4"] = "none"
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "math", "flex", "fa3", "fa4"] = "auto"
    rgb_attends_aux: bool = True
    trainable: tuple[str, ...] = ("*",)
    fuse: tuple[HubPath | FuseConfig, ...] = ()

    @property
    def fused_paths(self) -> tuple[str, ...]:
        """Return where the adapters are that are added to the base."""
        return tuple(one if isinstance(one, str) else one.path for one in self.fuse)


@dataclass(frozen=True)
class StreamConfig:
    """A companion with settings of its own; a bare suffix stands for `{suffix: …}`."""

    suffix: str
    scale: Annotated[int, Range(1, 8)] = 1  # it is encoded at 1/scale of the width and height


@dataclass(frozen=True)
class LoraConfig:
    enabled: bool = True
    kind: Literal["lora", "dora"] = "lora"
    rank: Count = 128
    alpha: Positive | None = None
    rank_stabilized: bool = False
    dropout: Fraction = 0.0
    scope: Literal["aux", "all"] | tuple[str, ...] = "aux"
    per_stream: bool = False
    targets: tuple[str, ...] = ()  # the family's
    ranks: dict[str, Count] = field(default_factory=dict)
    init_from: HubPath = ""

    def __str__(self) -> str:
        """Return what is trained, as logs and plans say it."""
        kind = "a DoRA" if self.kind == "dora" else "a LoRA"
        each = " for each stream" if self.per_stream else ""
        return f"{kind} of rank {self.rank}{each}" if self.enabled else "the model's own weights"


@dataclass(frozen=True)
class SourceConfig:
    """One data set: a folder of pairs or a manifest. A bare path stands for `{path: …}`."""

    path: LocalPath
    name: str = ""
    repeats: Count = 1
    rgba: bool = False
    resolutions: tuple[Resolution, ...] | None = None
    frames: tuple[int, ...] | None = None
    sizes: tuple[Size, ...] | None = None
    clip_mode: Literal["single_beginning", "single_middle", "multiple_overlapping"] | None = None
    sequence_fps: Positive | None = None


@dataclass(frozen=True)
class BucketRule:
    """Settings for the buckets of one size: [width, height, frames], 0 for any."""

    size: Size
    micro_batch: Count | None = None
    global_batch: Count | None = None
    keep: Fraction = 1.0
    keep_resolution: Fraction = 1.0


@dataclass(frozen=True)
class DataConfig:
    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    cache_dir: LocalPath = ""
    fps: Positive = 16.0
    sequence_fps: Positive | None = None
    resolutions: tuple[Resolution, ...] = ((832, 480),)
    aspect_ratios: tuple[Positive, ...] = ()
    aspect_min: Positive = 0.5
    aspect_max: Positive = 2.0
    aspect_count: Annotated[int, Range(1, 1000)] = 7
    frames: tuple[int, ...] = (1, 33)
    sizes: tuple[Size, ...] = ()
    buckets: tuple[BucketRule, ...] = ()
    draw: Literal["once", "epoch"] = "once"
    sync_group: Count = 1
    clip_mode: Literal["single_beginning", "single_middle", "multiple_overlapping"] = "single_beginning"
    upscale: bool = False
    alpha: Literal["auto", "straight", "premultiplied"] = "auto"
    transfer: Literal["srgb", "rec709"] = "srgb"
    fill: Literal["keep", "extend", "black", "color"] = "keep"
    fill_color: tuple[Byte, Byte, Byte] = (0, 0, 0)
    on_bad: Literal["skip", "error"] = "skip"
    workers: Natural = 0


@dataclass(frozen=True)
class ObjectiveConfig:
    density: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: Positive = 1.0
    shift: Positive | Literal["auto"] = 1.0
    t_min: Fraction = 0.0
    t_max: Fraction = 1.0
    stratified: bool = True
    tasks: dict[str, NonNegative] = field(default_factory=lambda: {"joint": 1.0})
    stream_weights: dict[str, NonNegative] = field(default_factory=dict)
    caption_dropout: Fraction | dict[str, Fraction] = 0.1
    first_frame_noise: Fraction = 0.0
    focus_present: Fraction = 0.0
    extend_latents: Count = 2
    interpolate_every: Interval | tuple[Interval, ...] = 4
    history: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True)
class GroupRule:
    """Learning rate or weight decay for parameters whose name matches a pattern."""

    pattern: str
    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"
    lr: NonNegative = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    momentum: Fraction = 0.0
    args: dict[str, float] = field(default_factory=dict)
    groups: tuple[GroupRule, ...] = ()
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Natural = 100
    lr_min: NonNegative = 0.0
    force_lr: NonNegative | None = None
    clip: NonNegative = 1.0
    bf16_parameters: bool = False
    ema: Beta = 0.0


@dataclass(frozen=True)
class TrainConfig:
    epochs: Natural = 0
    max_steps: Natural = 0
    global_batch: Count = 8
    micro_batch: Count = 1
    micro_tokens: Natural = 0
    nonfinite_limit: Count = 5
    allow_changed: tuple[Literal["base", "data"], ...] = ()
    gc_every: Count = 50
    expert_steps: Count = 10
    deterministic: bool = False


@dataclass(frozen=True)
class ParallelConfig:
    pipeline: Count = 1
    replicate: Natural = 0
    shard: Natural = 1
    context: Count = 1
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble"] = "auto"
    stages_per_rank: Count = 2
    split: tuple[int, ...] = ()
    recompute: Literal["auto", "none", "full", "attention", "offload"] | Count = "auto"
    chunk: Literal["auto", "off"] | Count = "auto"
    keep_gb: NonNegative = 0.0
    host_gb: NonNegative = 0.0
    compile: Literal["auto", "on", "off"] = "auto"
    offload: bool | Count = False
    idle_expert: Literal["auto", "device", "host", "disk"] = "auto"
    timeout_minutes: Positive = 10.0


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Natural = 500
    every_minutes: NonNegative = 0.0
    every_epochs: Natural = 0
    keep: Count = 3
    keep_every: Natural = 0
    asynchronous: bool = True


@dataclass(frozen=True)
class SaveConfig:
    every_epochs: Natural = 1
    every_steps: Natural = 0
    every_minutes: NonNegative = 0.0


@dataclass(frozen=True)
class HubConfig:
    repo: str = ""
    private: bool = True
    every_saves: Count = 1


@dataclass(frozen=True)
class EvalConfig:
    every_steps: Natural = 0
    every_epochs: Natural = 1
    before_first_step: bool = True
    times: tuple[Fraction, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    clips: Natural = 0
    micro_batch: Count = 1
    samples: Natural = 4
    scorer: LocalPath = ""


@dataclass(frozen=True)
class SampleConfig:
    prompts: tuple[str, ...] = ()
    prompts_file: LocalPath = ""
    negative_prompt: str | None = None
    size: Size | None = None
    steps: Count = 30
    guidance: NonNegative | dict[str, NonNegative] = 5.0
    image_guidance: NonNegative = 1.0
    image_falloff: bool = False
    first_guidance: NonNegative | None = None
    oscillate: Natural = 0
    shift: Positive | Literal["auto"] = 5.0
    scheduler: Literal["unipc", "euler", "dpm++", "ddpm", "ddim"] = "unipc"
    seed: Natural = 0
    formats: tuple[SampleFormat, ...] = ("checkerboard",)
    alpha_mode: Literal["straight", "premultiplied"] = "straight"
    background: LocalPath = ""
    upsample: Literal["guided", "plain"] = "guided"
    rgb_memory: Literal["auto", "device", "host", "off"] = "auto"


@dataclass(frozen=True)
class ScorerConfig:
    steps: Count = 2000
    global_batch: Count = 64
    lr: Positive = 1e-3
    warmup_steps: Natural = 100
    weight_decay: NonNegative = 0.1
    every_steps: Count = 200
    patch: Count = 4
    width: Count = 256
    layers: Count = 4
    text_layers: Natural = 0
    heads: Count = 4


@dataclass(frozen=True)
class LogConfig:
    every_steps: Count = 1
    tensorboard: bool = True
    wandb: str = ""
    report_seconds: NonNegative = 30.0
    peak_tflops: NonNegative = 0.0


@dataclass(frozen=True)
class Config:
    output_dir: LocalPath = "output"
    run_name: str = ""
    seed: Natural = 0
    streams: dict[str, str | StreamConfig] = field(default_factory=lambda: {"rgb": "", "seg": "_seg"})
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    save: SaveConfig = SaveConfig()
    hub: HubConfig = HubConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    scorer: ScorerConfig = ScorerConfig()
    log: LogConfig = LogConfig()

    @property
    def suffixes(self) -> dict[str, str]:
        """Return the suffix of each stream's files."""
        return {name: one if isinstance(one, str) else one.suffix for name, one in self.streams.items()}

    @property
    def scales(self) -> tuple[int, ...]:
        """Return for each stream how many of RGB's rows and columns one of its own covers."""
        return tuple(1 if isinstance(one, str) else one.scale for one in self.streams.values())

    @property
    def quantized(self) -> bool:
        """Return whether the base is held in eight bits."""
        return self.model.quantize != "none"


def family_names() -> tuple[str, ...]:
    """Return the architectures that there is a folder for, without importing any."""
    spec = importlib.util.find_spec("transpixeler.families")
    places = spec.submodule_search_locations if spec else None
    return tuple(sorted(file.parent.name for place in places or () for file in Path(place).glob("*/family.py")))


def parse_size(text: str) -> Size | None:
    """Return width, height and frames of a text such as 832x480x33, or None."""
    found = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def is_path(text: str) -> bool:
    """Return whether the file system can hold a text in a path: no NUL, and nothing that it cannot encode."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
