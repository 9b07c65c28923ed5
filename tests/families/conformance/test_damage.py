"""Whatever is wrong with a file of a model folder, it is one line that names the file or its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.families.cases import Case
from transpixeler.config.sections import ModelConfig, UserError
from transpixeler.models.family import open_model

READ = {".json", ".safetensors"}
CHANGES = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbled": lambda content: bytes(byte ^ 0x55 for byte in content[:200]) + content[200:],
    "a list": lambda content: b"[]",
}


def open_all(folder: Path) -> None:
    """Open what any command would."""
    opened = open_model(ModelConfig(path=str(folder)))
    with torch.device("meta"):
        opened.build(streams=("rgb", "seg"))
    assert opened.geometry and opened.fields
    how = {"device": torch.device("cpu"), "dtype": torch.float32}
    opened.load_vae(**how)
    opened.load_text_encoder(**how)


def told(folder: Path) -> str | None:
    try:
        open_all(folder)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_file_is_one_line(case: Case, world: Path, tmp_path: Path, change: str) -> None:
    folder = shutil.copytree(world / "model", tmp_path / "model")
    assert told(folder) is None
    refused = set()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in READ):
        content = file.read_bytes()
        file.write_bytes(CHANGES[change](content))
        if message := told(folder):
            assert message.startswith("model.path: ") and "\n" not in message and str(folder) in message, message
            refused.add(file.name)
        file.write_bytes(content)
    assert "config.json" in refused  # some libraries do without a file, such as that of special tokens
