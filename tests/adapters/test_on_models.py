"""An adapter moves onto models and off them, on any layout of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.adapters import FFN, METADATA, WIDTH, our_model, output, trained
from tests.support.models import wan_model, wan_source
from tests.support.ranks import run_ranks
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import join, read_adapter, write_adapter
from transpixeler.adapters.on_model import adapter_of, apply_adapter, inject_adapter
from transpixeler.config import loading
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.lora import inject, lora_linears
from transpixeler.models.quantize import quantize
from transpixeler.models.shards import local_slices
from transpixeler.models.weights import load_weights
from transpixeler.sampling.model import initial_adapters


def test_an_adapter_moves_to_another_model_of_the_same_streams(tmp_path: Path, base: Path) -> None:
    model = trained(base, "seg", "depth", alpha=1.0, ranks={"ffn.0": 2}, rank_stabilized=True)
    file = write_adapter(adapter_of(model, METADATA), tmp_path / "a")
    fresh = our_model(base, "seg", "depth")
    apply_adapter(fresh, read_adapter(file))
    assert torch.equal(output(fresh), output(model))
    assert not torch.equal(output(our_model(base, "seg", "depth")), output(model))


def test_training_can_start_from_an_adapter_of_another_strength(base: Path) -> None:
    adapter = adapter_of(trained(base, "seg", alpha=1.0), {})
    model = our_model(base, "seg")
    inject(model, LoraConfig(rank=4, alpha=8.0))
    apply_adapter(model, adapter)
    assert {module.scale for _, module in lora_linears(model)} == {2.0}
    assert torch.allclose(output(model), output(trained(base, "seg", alpha=1.0)), atol=1e-5)


def test_an_adapter_for_other_streams_or_ranks_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = adapter_of(trained(base, "seg"), {})
    model = our_model(base, "seg")
    inject(model, LoraConfig(rank=2))
    with pytest.raises(UserError, match=r"make lora\.targets and lora\.rank fit .* rank 4 on self_attn\.q, .*ffn\.2"):
        apply_adapter(model, adapter)
    some = Adapter(**vars(adapter) | {"stream_embeddings": {}, "scopes": dict.fromkeys(adapter.targets, ("seg",))})
    for name, kept, streams, message in (
        ("a", adapter, "{rgb: '', depth: _d}", r"a: was trained for the stream seg; streams are rgb, depth: name"),
        ("b", some, "{rgb: '', depth: _d}", r"b: its blocks\.0\.\S+ has the scope seg; streams are rgb, depth"),
        ("c", adapter, "{rgb: ''}", r"c: was trained for the stream seg; streams are rgb: name"),
    ):
        write_adapter(kept, tmp_path / name)
        keys = [f"model.path={base}", f"streams={streams}", "lora.scope=all", f"lora.init_from={tmp_path / name}"]
        with pytest.raises(UserError, match=rf"^lora\.init_from: .*{message}"):
            initial_adapters(loading.from_overrides(keys))


def test_averages_are_saved_in_place_of_the_values(base: Path) -> None:
    model = trained(base, "seg")
    name = "blocks.0.ffn.0.lora_B"
    adapter = adapter_of(model, {}, values={name: torch.ones(FFN, 4), "embed.stream_embedding.seg": torch.ones(WIDTH)})
    assert torch.equal(adapter.tensors[name], torch.ones(FFN, 4))
    assert torch.equal(adapter.stream_embeddings["seg"], torch.ones(WIDTH))
    assert torch.equal(adapter.down("blocks.0.ffn.0"), model.get_submodule("blocks.0.ffn.0").lora_A)


def _through_stages_and_shards(rank: int, world: int, base: str, file: str, kind: str) -> tuple[Any, int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    stage, adapter = mesh.get_local_rank("stage"), read_adapter(file)
    with torch.device("meta"):
        model = wan_model(WanFolder(str(base)).config, streams=("rgb", "seg"))
        inject_adapter(model, adapter)
    if kind:
        quantize(model, kind)
    model.keep(embed=stage == 0, blocks=[stage], head=stage == 1)
    apply_dtypes(model, torch.float32)
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().zero_()
    source = wan_source(base)
    load_weights(model, source)
    apply_adapter(model, adapter)
    state = {name: (local_slices(p), p.to_local().view(torch.uint8)) for name, p in model.named_parameters()}
    parts = [None] * world
    torch.distributed.all_gather_object(parts, adapter_of(model, METADATA))
    whole = join([parts[0], parts[2]])
    share = sum(p.to_local().nbytes for n, p in model.named_parameters() if ".lora_" not in n)
    return (state, whole.matches(adapter)), source.bytes_read, share


@pytest.mark.parametrize("kind", ["", "int8"])
def test_stages_and_shards_load_and_save_what_one_process_does(kind: str, tmp_path: Path, base: Path) -> None:
    model = trained(base, "seg", alpha=1.0)
    file = write_adapter(adapter_of(model, METADATA), tmp_path / "a")
    if kind:
        quantize(model, kind)
    whole = dict(model.named_parameters())
    seen: set[str] = set()
    for (state, same), read, share in run_ranks(_through_stages_and_shards, 4, str(base), str(file), kind):
        assert same
        assert kind or read <= 1.3 * share
        seen |= set(state)
        for name, (slices, local) in state.items():
            assert torch.equal(local, whole[name].detach()[slices].contiguous().view(torch.uint8)), name
    assert seen == set(whole)
