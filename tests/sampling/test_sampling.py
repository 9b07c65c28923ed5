"""Samplers equal diffusers' pipeline, hold the method's two truths, and give the same video on any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import tiny
from tests.support.models import TINY, base_of, inputs, without_embeddings
from tests.support.models import tiny as tiny_model
from tests.support.ranks import run_ranks
from transpixeler import cli
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import write_adapter
from transpixeler.config import loading
from transpixeler.config.sections import SampleConfig
from transpixeler.data import given, sampled
from transpixeler.data.media import decode
from transpixeler.data.media.write import write_mp4
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.model import WanModel
from transpixeler.families.wan.names import NAMES as wan_names
from transpixeler.flow.solver import Predict, denoise, start_noise
from transpixeler.flow.tasks import tasks
from transpixeler.models.family import open_model
from transpixeler.models.geometry import USUAL
from transpixeler.models.noising import RECTIFIED
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling import command, sampler, session
from transpixeler.sampling.saves import load_saved
from transpixeler.sampling.video import Video

SHAPE = (4, 2, 4, 6)
STEPS = 6


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def velocity_of(model: WanModel, layout: StreamLayout, text: Tensor) -> Predict:
    return lambda x, times: model(x, times, text, layout=layout)


def guided_by(model: WanModel, layout: StreamLayout, text: Tensor, negative: Tensor, scale: float) -> Predict:
    """Through the code that asks an engine, with a model in its place."""
    engine = SimpleNamespace(
        mesh=SimpleNamespace(device=torch.device("cpu")),
        config=SimpleNamespace(pipeline=1),
        forward=lambda x, inputs, layout, size: model(x, *inputs, layout=layout),
    )
    return sampler.guided(engine, layout, {"text": text}, {"text": negative}, guidance=lambda _: scale)


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> Callable[..., Tensor]:
    """Latents of `diffusers.WanPipeline` with the tiny model's weights."""
    import diffusers

    class Euler(diffusers.FlowMatchEulerDiscreteScheduler):
        """Handed its levels, which it makes out of shifted ones otherwise."""

        def set_timesteps(self, steps: int, device: torch.device) -> None:
            super().set_timesteps(sigmas=[1 - step / steps for step in range(steps)], device=device)

    network = diffusers.WanTransformer3DModel(**TINY)
    ours = tiny_model().state_dict()
    network.load_state_dict(
        {
            wan_names.parameter(
                wan_names.parameter(n, source="internal", to="original"), source="original", to="diffusers"
            ): value
            for n, value in ours.items()
        }
    )
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    solvers = {
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**flow),
        "euler": lambda: Euler(shift=5.0),
        "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**flow),
    }
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)

    def run(name: str, noise: Tensor, text: Tensor, negative: Tensor, scale: float) -> Tensor:
        pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=vae, scheduler=solvers[name](), transformer=network
        )
        pipe.set_progress_bar_config(disable=True)
        made = pipe(
            height=SHAPE[2] * 8,
            width=SHAPE[3] * 8,
            num_frames=(SHAPE[1] - 1) * 4 + 1,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            latents=noise,
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            output_type="latent",
        )
        return made.frames

    return run


@pytest.mark.parametrize("name", ["unipc", "euler", "dpm++"])
def test_a_sampler_equals_diffusers_pipeline(pipeline: Callable[..., Tensor], name: str) -> None:
    model = tiny_model()
    layout = model.layout(SHAPE)
    noise = start_noise(layout, seed=3)
    text, negative = inputs(layout, words=20)[2]
    theirs = pipeline(name, layout.unpack(noise)[0], text[None], negative[None], 4.0)
    velocity = guided_by(model, layout, text, negative, 4.0)
    ours = layout.unpack(denoise(velocity, noise, layout, RECTIFIED.solver(name, steps=STEPS, shift=5.0)))[0]
    assert difference(ours, theirs) < 1e-4
    twin = layout.unpack(denoise(velocity, noise, layout, RECTIFIED.solver(name, steps=STEPS, shift=4.0)))[0]
    assert difference(twin, theirs) > 1e-2


@pytest.mark.parametrize("name", ["unipc", "euler", "dpm++"])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_every_sampler_takes_the_same_levels(name: str, steps: int) -> None:
    even = np.linspace(1, 0, steps + 1)
    levels = RECTIFIED.solver(name, steps=steps, shift=5.0).scheduler.sigmas
    assert np.abs(levels.numpy() - 5 * even / (1 + 4 * even)).max() < 5e-3


# --- several streams -------------------------------------------------------------------------------------------------


def test_without_an_adapter_and_from_one_noise_both_streams_are_the_base_s_video() -> None:
    joint = without_embeddings(tiny_model(2))
    one, two = base_of(joint).layout(SHAPE), joint.layout(SHAPE)
    noise, text = start_noise(one, seed=0), inputs(one, batch=1)[2]
    solver = {"steps": STEPS, "shift": 5.0}
    alone = denoise(velocity_of(base_of(joint), one, text), noise, one, RECTIFIED.solver("unipc", **solver))
    both = denoise(velocity_of(joint, two, text), noise.repeat(1, 2), two, RECTIFIED.solver("unipc", **solver))
    assert difference(two.unpack(both)[0], one.unpack(alone)[0]) < 1e-4
    assert difference(two.unpack(both)[1], one.unpack(alone)[0]) < 1e-4


def test_streams_start_from_noises_of_their_own() -> None:
    layout = tiny_model(2).layout(SHAPE)
    rgb, aux = layout.unpack(start_noise(layout, seed=1))
    assert difference(rgb, aux) > 1
    assert torch.equal(rgb, tiny_model(1).layout(SHAPE).unpack(start_noise(tiny_model(1).layout(SHAPE), seed=1))[0])


def test_first_and_last_frames_stay_as_they_are_and_their_times_are_zero() -> None:
    alone = StreamLayout.equal(("rgb", "seg"), (2, 3, 4, 4), (1, 2, 2))
    layout = tasks(alone.names)["ends_to_video"].cut(alone)
    first, last = torch.randn(2, 2, 1, 4, 4)
    seen = []

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        seen.append(times[0].tolist())
        assert torch.equal(layout.videos(x)[0][0, :, :1], first) and torch.equal(layout.unpack(x)[1][0], last)
        return torch.ones_like(x)

    noise, solver = start_noise(layout, 0), RECTIFIED.solver("euler", steps=3, shift=1.0)
    made = denoise(velocity, noise, layout, solver, given={0: first}, beside={0: last})
    assert torch.equal(layout.videos(made)[0][0, :, :1], first) and torch.equal(layout.unpack(made)[1][0], last)
    assert [[time > 0 for time in times] for times in seen] == [[False, True, False, True]] * 3
    for video, same in zip(layout.videos(noise), alone.videos(start_noise(alone, 0)), strict=True):
        assert torch.equal(video, same)  # a last frame beside them changes no noise


@pytest.mark.parametrize("given", [0, 1])
def test_a_given_stream_stays_as_it_is_and_its_time_is_zero(given: int) -> None:
    model = tiny_model(2)
    layout = model.layout(SHAPE)
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    seen: list[Tensor] = []

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        seen.append(times)
        assert torch.equal(layout.unpack(x)[given][0], clean)
        return model(x, times, inputs(layout, batch=1)[2], layout=layout)

    noise = start_noise(layout, seed=0)
    made = denoise(velocity, noise, layout, RECTIFIED.solver("unipc", steps=4, shift=5.0), given={given: clean})
    assert torch.equal(layout.unpack(made)[given][0], clean)
    assert difference(layout.unpack(made)[1 - given][0], clean) > 0.1
    times = torch.cat(seen)
    assert torch.all(times[:, given] == 0) and torch.all(times[:, 1 - given] > 0)


# --- layouts ---------------------------------------------------------------------------------------------------------


def _sample(rank: int, world_size: int, overrides: tuple[str, ...], guidance: float) -> dict[int, Tensor]:
    config = tiny.config(*overrides)
    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    for model in engine.models():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.copy_(parameter + 0.05)
    videos = []
    for number, shape in enumerate(((4, 1, 4, 4), (4, 2, 4, 6), (4, 1, 4, 4))):
        layout = StreamLayout.equal(("rgb", "seg"), shape, (1, 2, 2))
        text = torch.randn(512, 16, generator=torch.Generator().manual_seed(number))
        videos.append(Video(str(number), "", {"text": text}, number, layout))
    negative = {"text": torch.zeros(512, 16)} if guidance != 1 else None
    made = sampler.Sampler(engine, mesh, SampleConfig(steps=3, guidance=guidance), negative, WanFolder("none"))
    return dict(made.each(videos))


def _layout(pipeline: int, replicate: int, shard: int) -> tuple[str, ...]:
    return (f"parallel.pipeline={pipeline}", f"parallel.replicate={replicate}", f"parallel.shard={shard}")


@pytest.mark.parametrize(
    ("ranks", "overrides", "guidance"),
    [
        (4, _layout(2, 1, 2), 4.0),
        (2, _layout(1, 2, 1), 4.0),
        (2, (*_layout(2, 1, 1), "parallel.schedule=interleaved-1f1b"), 1.0),
        (2, (*_layout(1, 1, 1), "parallel.context=2"), 4.0),
        (4, (*_layout(2, 1, 1), "parallel.context=2"), 4.0),
    ],
)
def test_videos_are_the_same_on_any_layout(ranks: int, overrides: tuple[str, ...], guidance: float) -> None:
    alone = run_ranks(_sample, 1, (), guidance)[0]
    shared = run_ranks(_sample, ranks, overrides, guidance)
    assert sorted(alone) == [0, 1, 2] == sorted({number for part in shared for number in part})
    assert max(difference(latents, alone[number]) for part in shared for number, latents in part.items()) < 1e-4
    assert difference(alone[0], alone[2]) > 0.1, "the seed changes nothing"


def test_rounds_are_even_so_that_no_rank_waits_for_another() -> None:
    ranks = [SimpleNamespace(layout=meshes.Layout(1, 2, 2), data_rank=rank) for rank in range(4)]
    shares = [sampler.turns(6, mesh) for mesh in ranks]
    assert {len(share) for share in shares} == {2}
    assert sorted(number for share in shares for number, counts in share if counts) == list(range(6))
    assert sampler.turns(0, ranks[0]) == []


# --- the command -----------------------------------------------------------------------------------------------------


QUICK = ("--prompt", "a red ball", "--size", "64x64x5", "--steps", "2")


def sample(out: Path, *words: str) -> dict[str, Any]:
    """The facts of the first video that the command makes, and its frames by stream."""
    assert cli.main(["sample", *words, *QUICK, "--out", str(out)]) == 0
    folder = sorted(out.iterdir())[0]
    facts = json.loads((folder / "sample.json").read_text())
    return facts | {"frames": {name: frames_of(folder / f"{name}.mp4") for name in facts["streams"]}}


def frames_of(path: Path) -> np.ndarray:
    return decode.read_frames(path, range(5), height=64, width=64).astype(int)


def test_a_run_an_adapter_file_and_the_base_make_videos(run: Path, demo: Path, tmp_path: Path) -> None:
    of_run = sample(tmp_path / "run", str(run), "--format", "mov", "--count", "2")
    assert of_run["prompt"] == "a red ball" and of_run["step"] == 2 and of_run["adapter"].endswith("step2/ema")
    assert len(list((tmp_path / "run").glob("*/rgba.mov"))) == 2
    of_file = sample(tmp_path / "file", str(run / "step2/ema/adapter_model.safetensors"))
    of_raw = sample(tmp_path / "raw", str(run), "--no-ema")
    of_base = sample(tmp_path / "base", "--model", str(demo / "model"))
    assert list(of_run["frames"]) == ["rgb", "seg"] and list(of_base["frames"]) == ["rgb"]
    assert np.array_equal(of_run["frames"]["seg"], of_file["frames"]["seg"])
    assert np.abs(of_run["frames"]["seg"] - of_raw["frames"]["seg"]).max() > 2


def test_a_bare_adapter_file_says_which_base_and_streams_it_is_for(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((run / "step2/ema/adapter_model.safetensors").read_bytes())
    how = ("sample.guidance=2", "sample.shift=3", "sample.negative_prompt=''")  # which an adapter file does not say
    bare, whole = sample(tmp_path / "bare", str(file), *how), sample(tmp_path / "run", str(run), *how)
    assert np.array_equal(bare["frames"]["seg"], whole["frames"]["seg"])


def test_what_is_cut_off_a_given_clip_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = tmp_path / "clip.mp4"
    write_mp4(clip, np.zeros((18, 48, 64, 3), np.uint8), fps=Fraction(32))
    for size, fps, said in (
        ("64,48,5", 16, "the first 5 of 9 frames at 16 fps, scaled and cropped from 64×48 to 64×48 (--size)"),
        ("32,48,17", 32, "the first 17 of 18 frames at 32 fps, scaled and cropped from 64×48 to 32×48 (--size)"),
    ):
        config = loading.from_overrides([f"sample.size=[{size}]", f"data.fps={fps}"])
        with caplog.at_level("INFO"):
            given.read_clip("--rgb", str(clip), config, USUAL, config.sample.size[::-1])
        assert f"--rgb: {clip}: {said}" in caplog.text


def test_a_video_is_by_default_as_large_as_what_was_trained_on(demo: Path) -> None:
    words = ["sample.size=null", "data.sizes=[]", "data.resolutions=[[76, 60]]", "data.frames=[5]"]
    config = loading.load(demo / "config.yaml", words)
    shape = sampled.video_layout(config, open_model(config.model))
    assert open_model(config.model).geometry.pixels(shape.shapes[0]) == (5, 64, 80)


def test_a_given_clip_comes_out_as_it_went_in(run: Path, demo: Path, tmp_path: Path) -> None:
    clip = next(path for path in sorted((demo / "data/eval").glob("*_seg.mp4")) if decode.probe(path).frames > 4)
    facts = sample(tmp_path, str(run), "--alpha", str(clip))
    assert facts["given"] == ["seg"]
    assert np.abs(facts["frames"]["seg"] - frames_of(clip)).max() <= 4


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both prompts, made by one process."""
    out = tmp_path_factory.mktemp("alone")
    words = ["--prompt", "a red ball", "--prompt", "a blue cube", "--size", "64x64x5", "--steps", "2"]
    assert cli.main(["sample", str(run), *words, "--out", str(out)]) == 0
    return out


def _sample_on_ranks(rank: int, world_size: int, run: Path, overrides: tuple[str, ...], out: Path) -> list[str]:
    made = ["sample.size=[64,64,5]", "sample.steps=2", *overrides]
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    options = command.SampleOptions(prompts=("a red ball", "a blue cube"), out=str(out))
    return [folder.name for folder in command.sample_command(load_saved(str(run), made), runtime, options).own]


@pytest.mark.parametrize("overrides", [(), ("parallel.pipeline=2",)])
def test_ranks_share_the_prompts_or_the_model(
    run: Path, alone: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    shared = run_ranks(_sample_on_ranks, 2, run, overrides, tmp_path)
    assert [len(names) for names in shared] == ([2, 0] if overrides else [1, 1])
    made = sorted(folder for folder in alone.iterdir() if folder.is_dir())
    assert sorted(name for names in shared for name in names) == [folder.name for folder in made]
    ours, theirs = (
        np.stack([frames_of(top / folder.name / "seg.mp4") for folder in made]) for top in (tmp_path, alone)
    )
    assert np.abs(ours - theirs).max() <= 5, "a pixel that is rounded otherwise, as the codec spreads it"
    assert np.abs(ours - theirs).mean() < 0.01 < 10 < np.abs(ours - theirs[::-1]).mean()


def strange_adapter(folder: Path) -> Path:
    tensors = {f"blocks.0.self_attn.q.lora_{kind}": torch.ones(shape) for kind, shape in (("A", (2, 8)), ("B", (8, 2)))}
    target = "blocks.0.self_attn.q"
    return write_adapter(
        Adapter(tensors, {target: 2.0}, {target: "all"}, {}, {"family": "wan"}), folder / "strange.safetensors"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("RUN", "--size", "60x64x5"),
            "sample.size: 60×64 is not a multiple of 16×16 pixels, which this model needs; 64×64 would be",
        ),
        (("RUN", "--size", "64x64x6"), "sample.size: 6 frames are not 4k+1, which this model needs; 5 or 9 would be"),
        (("RUN", "--size", "64x64"), "--size: 64x64 is not WIDTHxHEIGHTxFRAMES"),
        (("RUN", "--steps", "0"), "sample.steps: 0 is out of range"),
        (("RUN", "--format", "gif"), "sample.formats"),
        (("RUN", "--rgb", "nowhere.mp4"), "--rgb: nowhere.mp4 is missing"),
        (("nothing-here",), "nothing-here: no such run, save or adapter here; train first"),
        (("BROKEN",), "broken.safetensors is not a whole safetensors file"),
        (("STRANGE", "--model", "MODEL"), "the adapter is for another base: its blocks.0.self_attn.q is 8×8, which in"),
        (("STRANGE",), "does not say which base it was trained on; give one with --model"),
        ((), "name a run or an adapter, or give a base with --model"),
    ],
)
def test_a_mistake_is_one_clear_line(
    run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    places = {"RUN": run, "MODEL": demo / "model", "BROKEN": tmp_path / "broken.safetensors"}
    places["STRANGE"] = strange_adapter(tmp_path)
    words = [str(places.get(word, word)) for word in words]
    assert cli.main(["sample", *words, "--prompt", "x", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith("transpixeler: ") and "\n" not in said.split("transpixeler: ")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "set it to an image or a video"), (("--background", "nowhere.png"), "nowhere.png is missing")],
)
def test_a_missing_background_is_told_before_the_model_is_loaded(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(session, "open_engine", None)
    assert cli.main(["sample", str(run), "--prompt", "x", "--format", "composite", *words]) == 2
    assert message in capsys.readouterr().err
