"""Wan 2.2 TI2V-5B: diffusers' transformer, VAE and pipelines, and the files that Wan publishes, give the same."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.families.wan.pipelines import CPU, FIVE, layout_of, made, run, vae_22, write_five
from tests.families.wan.test_encoders import original_t5
from tests.support.models import move, wan_model
from transpixeler import cli
from transpixeler.config.sections import ModelConfig, UserError
from transpixeler.data.media.write import write_mp4
from transpixeler.families.wan import encoders
from transpixeler.families.wan.encoders import WanVae
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.names import NAMES
from transpixeler.families.wan.original import T5_FILE, TOKENIZER_FOLDER, VAE_22_FILE, VAE_FILE, original_vae_config
from transpixeler.flow.tasks import Task
from transpixeler.models.family import open_model
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights

PIXELS = (9, 64, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_five(tmp_path_factory.mktemp("five"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline.from_pretrained(folder, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- the transformer -------------------------------------------------------------------------------------------------


def both(times: Tensor, told: Tensor) -> tuple[Any, Any, Tensor, Tensor]:
    """Return diffusers' model and ours, and the velocity of each; `told` are the times of ours."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    published = WanTransformer3DModel(**FIVE)
    move(published, seed=3)
    model = wan_model(FIVE, streams=("rgb",))
    weights = published.state_dict()
    model.load_state_dict({name: weights[stored] for name, stored in NAMES.internal_names(weights).items()})
    layout = Task("", first=frozenset({0})).cut(StreamLayout.equal(("rgb",), (48, 3, 4, 6), model.patch))
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(2, layout.elements, generator=draws)
    text = torch.randn(2, 512, FIVE["text_dim"], generator=draws)
    each = 1000 * times.repeat_interleave(torch.tensor(layout.group_lengths), dim=1)
    (latents,) = layout.unpack(x)
    return (
        published,
        model,
        published(latents, each, text, return_dict=False)[0].flatten(1),
        model(x, told, text, layout=layout),
    )


def test_a_time_for_each_token_equals_diffusers_forward_and_gradients() -> None:
    times = torch.tensor([[0.0, 0.7], [0.3, 0.9]])
    published, model, expected, found = both(times, times)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    parameters = dict(published.named_parameters())
    for name, stored in NAMES.internal_names(parameters).items():
        there, here = parameters[stored].grad, model.get_parameter(name).grad
        torch.testing.assert_close(here, there, atol=1e-5 * float(there.abs().max()) + 1e-6, rtol=1e-4, msg=name)


def test_a_first_frame_told_the_others_time_is_seen() -> None:
    times = torch.tensor([[0.0, 0.7], [0.3, 0.9]])
    _, _, expected, found = both(times, times[:, 1:].repeat(1, 2))
    assert (found - expected).abs().max() > 1e-2


# --- the sampler -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_video_from_a_caption_equals_the_pipelines(folder: Path) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.expand_timesteps
    layout = layout_of(folder, PIXELS)
    expected = run(pipeline, PIXELS, layout)
    assert (made(folder, layout) - expected).abs().max() < 1e-4
    pipeline.scheduler.register_to_config(flow_shift=3.0)
    assert (made(folder, layout) - run(pipeline, PIXELS, layout)).abs().max() > 1e-2


@torch.no_grad()
def test_a_video_from_an_image_equals_the_pipelines(folder: Path, theirs: Any) -> None:
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (*PIXELS[1:], 3), dtype=np.uint8)
    whole = layout_of(folder, PIXELS)
    layout = Task("", first=frozenset({0})).cut(whole)
    expected = run(theirs, PIXELS, layout, image=Image.fromarray(picture))
    vae = WanFolder(str(folder)).load_vae(device=CPU, dtype=torch.float32)
    first = vae.encode(torch.from_numpy(picture)[None, None])[0]
    ours = made(folder, layout, given={0: first})
    assert torch.equal(ours[0, :, :1], first)
    assert (ours - expected).abs().max() < 1e-4
    untold = made(folder, whole, given={0: first})  # the frame is held, and the model is not told that it is clean
    assert (untold - expected).abs().max() > 1e-2


# --- files -----------------------------------------------------------------------------------------------------------


def original_name(name: str) -> str:
    """The way back to Wan's own names, by replacements, so that it shares nothing with the table under test."""
    for new, old in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"^(encoder|decoder)\.conv_in", r"\1.conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
        (r"down_blocks\.(\d)\.resnets", r"downsamples.\1.downsamples"),
        (r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.2"),
        (r"up_blocks\.(\d)\.resnets", r"upsamples.\1.upsamples"),
        (r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.3"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"norm1\.", "residual.0."),
        (r"(middle\.\d|samples\.\d)\.conv1\.", r"\1.residual.2."),
        (r"norm2\.", "residual.3."),
        (r"(middle\.\d|samples\.\d)\.conv2\.", r"\1.residual.6."),
        (r"conv_shortcut", "shortcut"),
    ):
        name = re.sub(new, old, name)
    return name


def test_wans_own_vae_file_gives_the_same_vae(tmp_path: Path) -> None:
    vae = vae_22(num_res_blocks=2)
    state = {original_name(name): value for name, value in vae.state_dict().items()}
    assert len(state) == len(vae.state_dict())
    assert {
        "encoder.downsamples.1.downsamples.2.time_conv.weight",
        "decoder.upsamples.0.upsamples.3.resample.1.bias",
        "decoder.upsamples.3.upsamples.0.shortcut.weight",
        "encoder.middle.1.to_qkv.weight",
    } <= set(state)
    torch.save(state, tmp_path / VAE_22_FILE)
    ours = encoders.load_vae(tmp_path, device=CPU, dtype=torch.float32)
    config, own = original_vae_config(tmp_path), ("latents_mean", "latents_std")
    assert {key: vae.config[key] for key in config if key not in own} == {k: config[k] for k in config if k not in own}
    assert encoders.vae_geometry(tmp_path) == ((4, 16, 16), 48)
    again = WanVae(vae, tuple(torch.tensor(config[name]) for name in own), str, device=CPU)
    video = torch.randint(0, 256, (1, 5, 32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = ours.encode(video)
    assert latents.shape == (1, 48, 2, 2, 4) and torch.equal(latents, again.encode(video))
    assert torch.equal(ours.decode(latents), again.decode(latents))
    with torch.no_grad():
        ours.network.decoder.up_blocks[1].upsampler.time_conv.bias[0] += 0.1
    assert not torch.equal(ours.decode(latents), again.decode(latents))


def test_the_scales_of_wans_own_vae_are_of_48_channels() -> None:
    from transpixeler.families.wan.original import LATENTS_MEAN_22, LATENTS_STD_22

    assert len(LATENTS_MEAN_22) == len(LATENTS_STD_22) == 48 and min(LATENTS_STD_22) > 0.3


@torch.no_grad()
def test_latents_are_the_pipelines_and_a_tiled_decoding_is_near_the_whole(
    folder: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae: Any = WanFolder(str(folder)).load_vae(device=CPU, dtype=torch.float32)
    video = torch.randint(0, 256, (1, 5, 32, 320, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = theirs.vae.encode(video.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mean
    settings = theirs.vae.config
    middle, width = (
        torch.tensor(values)[:, None, None, None] for values in (settings.latents_mean, settings.latents_std)
    )
    latents = vae.encode(video)
    torch.testing.assert_close(latents, (mean - middle) / width, atol=1e-5, rtol=1e-5)
    whole = vae.decode(latents)
    torch.testing.assert_close(whole, theirs.vae.decode(mean).sample, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(WanVae, "tiled_latents", 1)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape and vae.network.use_tiling
    assert (tiled - whole).abs().mean() < 0.5 * (tiled.roll(8, -1) - whole).abs().mean()


def test_decoding_goes_in_tiles_beyond_the_work_of_480_by_832(folder: Path) -> None:
    """As many activations as 480×832 pixels give in 2.1's decoder of 96 channels: its last level is wider in 2.2."""
    vae: Any = WanFolder(str(folder)).load_vae(device=CPU, dtype=torch.float32)
    for published, limit in (({"decoder_base_dim": 256, "base_dim": 160}, 2340), ({"base_dim": 96}, 6240)):
        whole = {"decoder_base_dim": None, "patch_size": None, "scale_factor_spatial": 8}
        whole |= {"patch_size": 2, "scale_factor_spatial": 16} if limit == 2340 else {}
        vae.network.register_to_config(**(whole | published))
        assert vae.tiled_latents == limit


@pytest.fixture(scope="module")
def original(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same model as Wan publishes it."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    made = tmp_path_factory.mktemp("original")
    state = pipeline.transformer.state_dict()
    spelled = {NAMES.parameter(name, source="diffusers", to="original"): value for name, value in state.items()}
    names = sorted(spelled)
    files = {f"diffusion_pytorch_model-0000{n}-of-00003.safetensors": names[n - 1 :: 3] for n in (1, 2, 3)}
    for file, held in files.items():
        save_file({name: spelled[name].contiguous() for name in held}, made / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (made / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"_class_name": "WanModel", "dim": 48, "num_heads": 2, "in_dim": 48, "out_dim": 48, "text_len": 512}
    config |= {"ffn_dim": 96, "num_layers": 2, "freq_dim": 32, "eps": 1e-6, "model_type": "ti2v", "text_dim": 64}
    (made / "config.json").write_text(json.dumps(config))
    torch.save(
        {original_name(name): value for name, value in vae_22(num_res_blocks=2).state_dict().items()},
        made / VAE_22_FILE,
    )
    torch.save(original_t5(pipeline.text_encoder), made / T5_FILE)
    shutil.copytree(folder / "tokenizer", made / TOKENIZER_FOLDER)
    return made


def test_the_original_folder_is_the_same_model(folder: Path, original: Path) -> None:
    opened = [open_model(ModelConfig(path=str(path))) for path in (folder, original)]
    assert opened[0].family is opened[1].family and opened[0].geometry == opened[1].geometry
    assert opened[0].geometry.unit == (32, 32) and opened[0].geometry.latent(121, 704, 1280) == (48, 31, 44, 80)
    assert opened[0].sampling_shift(27_280) == 5.0
    models = [one.build(streams=("rgb", "seg")) for one in opened]
    for one, model in zip(opened, models):
        load_weights(model, WeightSource(one.path, one.family.internal_names))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    texts = [one.load_text_encoder(device=CPU, dtype=torch.float32).encode(["a red circle"])[0] for one in opened]
    torch.testing.assert_close(texts[0]["text"], texts[1]["text"], atol=1e-5, rtol=1e-5)
    prints = [(one.vae_fingerprint(), one.text_fingerprint()) for one in opened]
    assert prints[0][0] != prints[1][0] and prints[0][1] != prints[1][1]


def test_a_vae_of_another_model_is_refused_by_name(original: Path, tmp_path: Path) -> None:
    for name in ("config.json", VAE_22_FILE):
        shutil.copy(original / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text()) | {"in_dim": 16, "out_dim": 16, "model_type": "t2v"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.path: .* its VAE makes 48 channels and its transformer takes 16"):
        _ = WanFolder(str(tmp_path)).geometry
    (tmp_path / VAE_22_FILE).rename(tmp_path / VAE_FILE)  # which of the two it is, is seen in the file
    with pytest.raises(UserError, match="its VAE makes 48 channels"):
        _ = WanFolder(str(tmp_path)).geometry


# --- the commands ----------------------------------------------------------------------------------------------------


CONFIG = """\
output_dir: output
model: {{path: {model}}}
data: {{train: data/train, cache_dir: cache, fps: 24, resolutions: [64], frames: [9]}}
lora: {{rank: 2}}
objective: {{tasks: {{image_to_video: 0.5, images_to_videos: 0.5}}, first_frame_noise: 0.2}}
train: {{max_steps: 1, global_batch: 2}}
sample: {{size: [64, 64, 9], steps: 2}}
log: {{tensorboard: false}}
"""


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_it_trains_and_samples_from_an_image(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    model = request.getfixturevalue("folder" if layout == "diffusers" else "original")
    write_pairs(tmp_path / "data/train", scenes(2, formats=[Format(64, 64, 9, Fraction(24))], held_out=False, seed=0))
    (tmp_path / "config.yaml").write_text(CONFIG.format(model=model))
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 0
    latest = (tmp_path / "output/latest").resolve()
    line = json.loads((latest / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(line["loss"])
    image = str(next((tmp_path / "data/train").glob("*.mp4")))
    words = ["sample", str(latest), "--prompt", "a red circle", "--image", image, "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    facts = json.loads(next((tmp_path / "out").rglob("sample.json")).read_text())
    assert facts["given"] == ["first frame of rgb"] and facts["fps"] == "24"


@pytest.mark.parametrize(
    ("name", "device", "memory"), [("joint", "h100", "55 GB in all"), ("24gb", "4090", "20.4 GB in all")]
)
def test_the_shipped_configs_fit_the_machines_that_they_name(
    name: str, device: str, memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[3] / f"configs/wan2.2-ti2v-5b-{name}.yaml"
    (tmp_path / "model").mkdir()
    published = {"_class_name": "WanModel", "model_type": "ti2v", "dim": 3072, "num_heads": 24, "num_layers": 30}
    published |= {"in_dim": 48, "out_dim": 48, "ffn_dim": 14336, "freq_dim": 256, "text_len": 512, "eps": 1e-6}
    (tmp_path / "model/config.json").write_text(json.dumps(published))
    longest = 121 if name == "joint" else 49
    (tmp_path / "data").mkdir()
    flat = (np.zeros((704, 1280, 3), dtype=np.uint8) for _ in range(longest))
    write_mp4(tmp_path / "data/a.mp4", flat, fps=Fraction(24))
    shutil.copy(tmp_path / "data/a.mp4", tmp_path / "data/a_seg.mp4")
    (tmp_path / "data/a.txt").write_text("nothing")
    words = [f"model.path={tmp_path / 'model'}", f"data.train=[{{path: {tmp_path / 'data'}, repeats: 8}}]"]
    assert cli.main(["plan", str(config), *words, "--gpus", "1", "--device", device, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["layouts"], made
    said = float(memory.split()[0])
    assert memory in config.read_text(encoding="utf-8")
    assert abs(made["memory"][made["recompute"]]["total"] / 1e9 - said) < 1, made["memory"]
