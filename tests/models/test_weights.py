"""Base weights come from any published layout, whole or in slices, or with one clear line about what is wrong."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.models import wan_source
from tests.support.ranks import run_ranks
from tests.support.weights import (
    LAYERS,
    WIDTH,
    Holder,
    holder,
    write_comfyui,
    write_diffusers,
    write_original,
    write_pickled,
)
from transpixeler.config.sections import UserError
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import load_weights

LAYOUTS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "diffusers": lambda folder, _: write_diffusers(folder / "d"),
    "diffusers transformer": lambda folder, _: write_diffusers(folder / "d") / "transformer",
    "original": lambda folder, original: write_original(folder / "o", original),
    "original pickled": lambda folder, original: write_pickled(folder / "p", original),
    "comfyui": lambda folder, original: write_comfyui(folder / "c.safetensors", original),
    "comfyui bare": lambda folder, original: write_comfyui(folder / "c.safetensors", original, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(
    layout: str, tmp_path: Path, original: dict[str, Tensor], internal: dict[str, Tensor]
) -> None:
    source = wan_source(LAYOUTS[layout](tmp_path, original))
    model = holder(internal)
    load_weights(model, source)
    assert set(source.names()) == set(internal)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, internal[name]), name
    assert source.bytes_read == sum(tensor.nbytes for tensor in internal.values())


def test_weights_are_cast_to_the_dtype_that_the_model_keeps(
    tmp_path: Path, original: dict[str, Tensor], internal: dict[str, Tensor]
) -> None:
    model = holder(internal, dtype=torch.bfloat16)
    load_weights(model, wan_source(write_comfyui(tmp_path / "c.safetensors", original)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, internal[name].bfloat16())


def test_only_a_slice_is_read_when_only_a_slice_is_asked(tmp_path: Path, original: dict[str, Tensor]) -> None:
    for source in (
        wan_source(write_comfyui(tmp_path / "c.safetensors", original)),
        wan_source(write_pickled(tmp_path / "p", original)),
    ):
        name = "blocks.0.self_attn.q.weight"
        piece = source.read_slice(name, (slice(3, 7), slice(0, 24)))
        assert torch.equal(piece, original[name][3:7])
        assert source.bytes_read == 4 * 24 * 4


def test_a_stage_reads_its_own_parts_alone(
    tmp_path: Path, original: dict[str, Tensor], internal: dict[str, Tensor]
) -> None:
    model = holder(internal)
    model.embed, model.head = None, None
    for index in ("0", "2"):
        del model.blocks[index]
    source = wan_source(write_comfyui(tmp_path / "c.safetensors", original))
    load_weights(model, source)
    assert source.bytes_read == sum(p.nbytes for p in model.parameters())
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"1"}


def test_adapter_parameters_are_not_asked_of_the_base(
    tmp_path: Path, original: dict[str, Tensor], internal: dict[str, Tensor]
) -> None:
    own = {
        "blocks.0.self_attn.q.lora_A": torch.zeros(2, WIDTH),
        "blocks.0.self_attn.q.lora_B": torch.zeros(WIDTH, 2),
        "embed.stream_embedding.seg": torch.zeros(WIDTH),
    }
    model = holder(internal | own)
    load_weights(model, wan_source(write_comfyui(tmp_path / "c.safetensors", original)))
    assert {name for name, p in model.named_parameters() if p.isnan().all()} == set(own)


# -- shards


def _load_shard(rank: int, world: int, path: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, dict]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = Holder(shapes)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(torch.nan)
    source = wan_source(path)
    load_weights(model, source)
    share = sum(p.to_local().nbytes for p in model.parameters())
    return source.bytes_read, share, {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def test_each_of_four_ranks_reads_little_more_than_its_share(
    tmp_path: Path, original: dict[str, Tensor], internal: dict[str, Tensor]
) -> None:
    path = write_comfyui(tmp_path / "c.safetensors", original)
    shapes = {name: tuple(tensor.shape) for name, tensor in internal.items()}
    whole = sum(tensor.nbytes for tensor in internal.values())
    for read, share, state in run_ranks(_load_shard, 4, str(path), shapes):
        assert read <= 1.3 * share
        assert read <= 1.3 * whole / 4
        assert all(torch.equal(state[name], internal[name]) for name in internal)


# -- what a user can do wrong


def test_missing_unexpected_and_misshapen_weights_are_listed(
    tmp_path: Path, original: dict[str, Tensor], internal: dict[str, Tensor]
) -> None:
    wrong = dict(original)
    for block in range(LAYERS):
        for leaf in "qkvo":
            del wrong[f"blocks.{block}.self_attn.{leaf}.bias"]
    wrong["blocks.7.self_attn.q.bias"] = torch.zeros(WIDTH)
    wrong["vace.proj.weight"] = torch.zeros(2)
    wrong["head.head.bias"] = torch.zeros(5)
    with pytest.raises(UserError) as caught:
        load_weights(holder(internal), wan_source(write_comfyui(tmp_path / "c.safetensors", wrong)))
    text = str(caught.value)
    assert "12 missing: blocks.0.self_attn.q.bias" in text
    assert text.count("self_attn") == 11
    assert "2 unexpected: blocks.7.self_attn.q.bias, vace.proj.weight" in text
    assert "1 misshapen: head.head.bias [5] for [64]" in text
    assert "\n" not in text


def test_a_missing_shard_a_torn_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "d")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{shard.name} is not a whole"):
        wan_source(folder)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        wan_source(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        wan_source(tmp_path / "empty")


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path("/nowhere/exploded").touch, ())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "diffusion_pytorch_model.pth"
    torch.save({"x": Bomb()}, file, _use_new_zipfile_serialization=zipped, pickle_module=pickle)
    with pytest.raises(UserError, match=r"does not hold plain weights: it would run getattr") as fault:
        wan_source(tmp_path)
    assert "weights_only" not in str(fault.value)


@pytest.mark.parametrize(
    "content", [b"a note\n", b"hello world", b"\x89PNG\r\n\x1a\nabc", b"PK\x03\x04abc", b""], ids=repr
)
def test_a_file_that_holds_no_weights_is_refused_without_advice_to_run_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "diffusion_pytorch_model.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"does not hold plain weights, or is damaged; download it again") as fault:
        wan_source(tmp_path)
    assert "weights_only" not in str(fault.value) and "\n" not in str(fault.value)


def test_an_unknown_path_and_an_unreachable_hub_give_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    with pytest.raises(UserError, match=r"model\.path: /no/such/folder does not exist"):
        resolve("/no/such/folder", only=("*",))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf download someone/some-wan") as caught:
        resolve("someone/some-wan", only=("*",))
    assert "\n" not in str(caught.value)
