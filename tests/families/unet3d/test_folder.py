"""A folder that `transpixeler init` wrote: how it reads captions and frames, and what it refuses before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.families.unet3d.folder import TINY, write_folder
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config, ModelConfig, UserError
from transpixeler.families.unet3d.config import UnetConfig
from transpixeler.models.family import open_model
from transpixeler.parallel.mesh import Layout
from transpixeler.training.preflight import check_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("unet3d") / "model"
    write_folder(place)
    return place


def config(folder: Path, *overrides: str) -> Config:
    usual = (
        f"model.path={folder}",
        "streams={rgb: '', seg: _seg}",
        "lora.scope=all",
        "lora.rank=4",
        "objective.density=uniform",
        "sample.shift=auto",
        "sample.scheduler=ddim",
    )
    return loading.from_overrides([*usual, *overrides])


def check(folder: Path, *overrides: str) -> None:
    made = config(folder, *overrides)
    check_model(made, Layout(1, 1, 1), open_model(made.model), {})


def test_what_it_can_do_is_not_refused(folder: Path) -> None:
    check(folder)
    check(folder, "lora.enabled=false", "objective.focus_present=0.2", "lora.kind=dora", "parallel.shard=2")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.pipeline=2"], "parallel.pipeline: 2 ranks cannot share a sample"),
        (["parallel.context=2"], "parallel.context: 2 ranks cannot share a sample"),
        (["model.quantize=int8"], "model.quantize: int8"),
        (["model.rgb_attends_aux=false"], "model.rgb_attends_aux: false"),
        (["model.attention=flash"], "model.attention: flash"),
        (["lora.scope=aux"], "lora.scope: aux has no tokens of its own"),
        (["lora.per_stream=true"], "lora.per_stream: this model joins its streams"),
        (["streams.seg={suffix: _seg, scale: 2}"], "streams.seg.scale: 3D U-Net joins streams"),
        (["objective.tasks={rgb_to_aux: 1}"], "objective.tasks.rgb_to_aux: 3D U-Net is told one time"),
        *[
            ([f"objective.tasks={{{task}: 1}}"], f"objective.tasks.{task}: 3D U-Net is told one time")
            for task in ("image_to_video", "ends_to_video", "interpolate", "extend")
        ],
        (["objective.history=on"], "objective.history: 3D U-Net makes all frames at once"),
        (["data.sync_group=2"], "data.sync_group: 3D U-Net makes all frames at once"),
        (["objective.shift=3"], "objective.shift: 3 is for flows"),
        (["sample.shift=3"], "sample.shift: 3 is for flows"),
        (["sample.steps=1001", "sample.scheduler=ddpm"], "sample.steps: 1001 are more than the 1000"),
        (["objective.density=logit_normal"], "objective.density: logit_normal"),
        (["sample.scheduler=euler"], "sample.scheduler: euler"),
    ],
)
def test_what_does_not_apply_is_one_line(folder: Path, overrides: Sequence[str], told: str) -> None:
    with pytest.raises(UserError) as fault:
        check(folder, *overrides)
    assert str(fault.value).startswith(told) and "; " in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("option", ["--image", "--last", "--rgb", "--alpha", "--between", "--extend"])
def test_a_sample_is_given_nothing(
    option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    settings = ("sample.scheduler=ddim", "sample.shift=auto", "sample.size=[16,16,4]")
    words = ["sample", "--model", str(folder), "--prompt", "a", "--out", str(tmp_path / "out"), *settings]
    assert cli.main([*words, option, str(picture)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"transpixeler: {option}: 3D U-Net is told one time") and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"dim": 9}, "must be multiples of groups 4"),
        ({"channels": 4}, "channels 4 are not those of pixels"),
        ({"heads_": 4}, "heads_ is no size of a 3D U-Net"),
        ({"space": "frames"}, "space must be pixels or latents"),
        ({"dim_mults": []}, "must be 1 to 8 levels"),
        ({"first_kernel": 4}, "first_kernel must be odd"),
        ({"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel is no 3D U-Net"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        UnetConfig.read(TINY | sizes)


@torch.no_grad()
def test_pixels_come_back_as_they_were(folder: Path) -> None:
    vae = open_model(ModelConfig(path=str(folder))).load_vae(device=CPU, dtype=torch.float32)
    video = torch.randint(0, 256, (1, 3, 4, 4, 3), dtype=torch.uint8)
    latents = vae.encode(video)
    assert latents.min() >= -1 and latents.max() <= 1
    back = ((vae.decode(latents).permute(0, 2, 3, 4, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back, video)


@torch.no_grad()
def test_a_caption_is_the_first_token_of_bert_and_the_mean_of_t5(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel, T5Config, T5EncoderModel

    encoder = open_model(ModelConfig(path=str(folder))).load_text_encoder(device=CPU, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = words("a red circle", return_tensors="pt").input_ids
    bert = BertModel.from_pretrained(folder / "text_encoder")
    found, none = encoder.encode(["a red circle", " "])
    torch.testing.assert_close(found["text"], bert(ids).last_hidden_state[0, 0])
    assert not none["text"].any() and none["text"].shape == found["text"].shape
    other = shutil.copytree(folder, tmp_path / "t5")
    shutil.rmtree(other / "text_encoder")
    shutil.move(other / "tokenizer", other / "text_encoder")  # as they lie together on the Hub
    t5 = T5EncoderModel(T5Config(vocab_size=100, d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1)).eval()
    t5.save_pretrained(other / "text_encoder")
    encoder = open_model(ModelConfig(path=str(other))).load_text_encoder(device=CPU, dtype=torch.float32)
    torch.testing.assert_close(encoder.encode(["a red circle"])[0]["text"], t5(ids).last_hidden_state[0].mean(0))


def test_latents_are_those_of_the_vae_that_lies_beside(folder: Path, tmp_path: Path) -> None:
    from tests.support.families.cases import CASES

    CASES["wan"].write(tmp_path / "wan")
    place = shutil.copytree(folder, tmp_path / "latents")
    shutil.copytree(tmp_path / "wan/vae", place / "vae")
    file = place / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"space": "latents", "channels": 16}))
    model, wan = (open_model(ModelConfig(path=str(tmp_path / name))) for name in ("latents", "wan"))
    assert model.geometry.stride == wan.geometry.stride and model.geometry.channels == wan.geometry.channels == 16
    assert model.geometry.patch == (1, 2, 2) and model.vae_fingerprint() == wan.vae_fingerprint()
    video = torch.randint(0, 256, (1, 5, 32, 32, 3), dtype=torch.uint8)
    ours, theirs = (one.load_vae(device=CPU, dtype=torch.float32).encode(video) for one in (model, wan))
    assert torch.equal(ours, theirs) and not model.noising.clips
    file.write_text(json.dumps(json.loads(file.read_text()) | {"channels": 8}))
    with pytest.raises(UserError, match="has 16 channels, and the U-Net takes 8"):
        assert open_model(ModelConfig(path=str(place))).geometry


def test_a_text_encoder_of_another_width_is_refused(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "model")
    file = place / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cond_dim": 768}))
    with pytest.raises(UserError, match="makes vectors of 16, and the U-Net takes cond_dim 768"):
        assert open_model(ModelConfig(path=str(place))).fields
