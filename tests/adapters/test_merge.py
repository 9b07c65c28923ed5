"""Merged and whole models give our output where they are read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.adapters import FFN, METADATA, WIDTH, diffusers_output, move_adapter, our_model, output, trained
from tests.support.models import wan_model, wan_source
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.merge import FusedSource, merge_adapter, save_model
from transpixeler.adapters.on_model import adapter_of, apply_adapter
from transpixeler.config.sections import UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.names import NAMES as wan_names


def test_a_merged_model_gives_our_output_in_diffusers(tmp_path: Path, base: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = trained(base, alpha=1.0)
    merged = WanTransformer3DModel.from_pretrained(
        merge_adapter(WanFolder(str(base)), [adapter_of(model, {})], tmp_path / "m")
    )
    assert torch.allclose(diffusers_output(merged), output(model), atol=1e-5)
    assert torch.allclose(output(our_model(tmp_path / "m")), output(model), atol=1e-5)
    assert not torch.allclose(output(our_model(base)), output(model), atol=1e-2)


def test_fusing_while_reading_gives_each_slice_of_the_merged_weight(base: Path) -> None:
    adapter = adapter_of(trained(base, alpha=1.0), {})
    fused = FusedSource(wan_source(base), [adapter, adapter])
    name = "blocks.1.ffn.2.weight"
    whole = fused.read(name)
    assert torch.allclose(fused.read_slice(name, (slice(3, 9), slice(2, 30))), whole[3:9, 2:30], atol=1e-6)
    twice = wan_source(base).read(name) + 2 * adapter.up(name[:-7]) @ adapter.down(name[:-7]) / 4
    assert torch.allclose(whole, twice, atol=1e-6)
    assert torch.equal(fused.read("blocks.1.ffn.2.bias"), wan_source(base).read("blocks.1.ffn.2.bias"))


def test_a_small_change_survives_in_an_fp8_base(tmp_path: Path, base: Path) -> None:
    stored = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    eight = {name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for name, value in stored.items()}
    (tmp_path / "transformer").mkdir()
    save_file(eight, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "transformer" / "config.json").write_bytes((base / "transformer" / "config.json").read_bytes())
    adapter = adapter_of(trained(base), {})
    small = Adapter(**vars(adapter) | {"alphas": dict.fromkeys(adapter.targets, 0.2)})
    merged = wan_source(merge_adapter(WanFolder(str(tmp_path)), [small], tmp_path / "m"))
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
        before = wan_source(tmp_path).read(f"{name}.weight").float()
        delta = small.up(name) @ small.down(name) * small.scale(name)
        assert delta.norm() < 0.05 * before.norm()
        for source in (merged, FusedSource(wan_source(tmp_path), [small])):
            found = source.read_slice(f"{name}.weight", ()).float() - before
            assert (found - delta).norm() < 0.1 * delta.norm()


def test_an_adapter_on_some_streams_or_of_another_model_is_not_merged(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="acts on some streams only"):
        merge_adapter(WanFolder(str(base)), [adapter_of(trained(base, "seg"), {})], tmp_path / "m")
    tensors = {"blocks.9.ffn.0.lora_A": torch.ones(1, WIDTH), "blocks.9.ffn.0.lora_B": torch.ones(FFN, 1)}
    foreign = Adapter(tensors, {"blocks.9.ffn.0": 1.0}, {"blocks.9.ffn.0": "all"}, {}, {"family": "wan"})
    with pytest.raises(UserError, match=r"blocks\.9\.ffn\.0\.weight .*absent"):
        merge_adapter(WanFolder(str(base)), [foreign], tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_a_fully_tuned_model_is_read_by_diffusers(shard_bytes: int, tmp_path: Path, base: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = our_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    target = save_model(model.named_parameters(), tmp_path, model=WanFolder(str(base)), shard_bytes=shard_bytes)
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    theirs, report = WanTransformer3DModel.from_pretrained(target, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(diffusers_output(theirs), output(model), atol=1e-5)
    with pytest.raises(UserError, match="never overwritten"):
        save_model(model.named_parameters(), tmp_path, model=WanFolder(str(base)))


def test_a_fully_tuned_joint_model_keeps_its_stream_embeddings_beside_it(tmp_path: Path, base: Path) -> None:
    model = our_model(base, "seg")
    move_adapter(model)
    save_model(model.named_parameters(), tmp_path, model=WanFolder(str(base)), metadata=METADATA)
    again = our_model(tmp_path, "seg")
    assert not torch.equal(output(again), output(model))
    apply_adapter(again, read_adapter(tmp_path))
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_what_is_written_may_be_read_as_the_umask_says(umask: int, tmp_path: Path, base: Path) -> None:
    before = os.umask(umask)
    try:
        write_adapter(adapter_of(trained(base), METADATA), tmp_path / "adapter")
        save_model(our_model(base).named_parameters(), tmp_path / "model", model=WanFolder(str(base)))
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_file()}
    assert len(modes) == 4 and set(modes.values()) == {0o666 & ~umask}


def test_a_save_that_breaks_off_leaves_nothing(tmp_path: Path, base: Path) -> None:
    def broken(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from list(model.named_parameters())[:5]
        raise OSError("disk full")

    save = partial(save_model, folder=tmp_path, model=WanFolder(str(base)))
    with pytest.raises(OSError, match="disk full"):
        save(broken(our_model(base)))
    with pytest.raises(AssertionError, match="would not be a whole model"):
        save(list(our_model(base).named_parameters())[:-1])
    assert not list(tmp_path.iterdir())


def test_a_comfyui_file_alone_is_a_whole_model(tmp_path: Path) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 40, "text_dim": 16}
    model = wan_model(config | {"freq_dim": 32}, streams=("rgb",))
    state = {
        f"model.diffusion_model.{wan_names.parameter(n, source='internal', to='original')}": p.detach()
        for n, p in model.named_parameters()
    }
    save_file(state, tmp_path / "wan.safetensors")
    again = our_model(tmp_path / "wan.safetensors")
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"flux\.safetensors holds no Wan model: embed\.patch_embedding\.weight"):
        _ = WanFolder(str(tmp_path / "flux.safetensors")).config
