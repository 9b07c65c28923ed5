"""Whatever is wrong with a file of a model folder, the error is one line that names the file or its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transpixeler.config.sections import UserError
from transpixeler.demo import model as demo_model
from transpixeler.families.wan import encoders
from transpixeler.families.wan.family import WanFolder

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def read_config(folder: Path) -> object:
    return WanFolder(str(folder)).config


READS: dict[str, Callable[[Path], object]] = {
    "transformer/config.json": read_config,
    "model_index.json": read_config,
    "vae/config.json": encoders.vae_geometry,
    "vae/diffusion_pytorch_model.safetensors": lambda folder: encoders.load_vae(folder, **CPU),
    "text_encoder/config.json": lambda folder: encoders.load_text_encoder(folder, **CPU),
    "text_encoder/model.safetensors": lambda folder: encoders.load_text_encoder(folder, **CPU),
    "tokenizer/tokenizer.json": lambda folder: encoders.load_text_encoder(folder, **CPU),
    "tokenizer/tokenizer_config.json": lambda folder: encoders.load_text_encoder(folder, **CPU),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    demo_model.write_model(folder)
    return folder


@pytest.mark.parametrize("damage", ["half", "empty", "garbled", "a list"])
@pytest.mark.parametrize("name", READS)
def test_a_damaged_file_is_one_line(whole: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    content = (folder / name).read_bytes()
    garbled = bytes(byte ^ 0x55 for byte in content[:200]) + content[200:]
    damaged = {"half": content[: len(content) // 2], "empty": b"", "garbled": garbled, "a list": b"[]"}[damage]
    (folder / name).write_bytes(damaged)
    with pytest.raises(UserError, match=r"^model\.path: .*copy or download it again$") as told:
        READS[name](folder)
    assert str(folder / name.split("/")[0]) in str(told.value) and "\n" not in str(told.value)


def test_code_in_a_tokenizer_s_folder_is_not_run(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "tokenizer" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...\n")
    config = folder / "tokenizer" / "tokenizer_config.json"
    told = json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    told.pop("tokenizer_class", None)
    config.write_text(json.dumps(told))
    try:
        encoders.load_text_encoder(folder, **CPU)
    except UserError as error:
        assert "custom code" in str(error) or "Unrecognized model" in str(error)  # by transformers before 5
    assert not (tmp_path / "ran").exists()
