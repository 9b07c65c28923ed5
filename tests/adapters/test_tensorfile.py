"""Identical content is identical bytes, and any header reads back as it was given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import write_adapter
from transpixeler.adapters.saved import ADAPTER_FILE
from transpixeler.adapters.tensorfile import save_tensors

HEADER = {f"transpixeler.key{n}": str(n) for n in range(20)}


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    for name in "abcd":
        save_tensors({"x": torch.ones(3), "y": torch.zeros(2)}, tmp_path / name, HEADER)
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


def test_an_adapter_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    target = "blocks.0.self_attn.q"
    pair = {f"{target}.lora_A": torch.ones(2, 4), f"{target}.lora_B": torch.ones(4, 2)}
    adapter = Adapter(
        pair, {target: 2.0}, {target: "aux"}, {}, {"family": "wan"} | {f"note{n}": str(n) for n in range(9)}
    )
    made = {write_adapter(adapter, tmp_path / name).read_bytes() for name in "abcd"}
    assert len(made) == 1 and (tmp_path / "a" / ADAPTER_FILE).exists()


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=5))
def test_any_header_reads_back(header: dict[str, str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        save_tensors({"x": torch.arange(3.0)}, file, header)
        with safe_open(file, "pt") as opened:
            assert (opened.metadata() or {}) == header and opened.get_tensor("x").tolist() == [0, 1, 2]


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    program = "import sys, torch; from pathlib import Path; from transpixeler.adapters.tensorfile import save_tensors\n"
    program += f"save_tensors({{'x': torch.ones(3)}}, Path(sys.argv[1]), {HEADER!r})"
    for name in "ab":
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
