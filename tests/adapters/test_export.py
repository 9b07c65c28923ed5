"""Adapters and whole models leave in every published spelling, come back the same, and work where they are read."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.models import wan_source
from tests.support.ranks import run_ranks
from transpixeler import cli, configfile
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.export import (
    FusedSource,
    adapter_of,
    apply_adapter,
    export_command,
    inject_adapter,
    merge_adapter,
    save_model,
)
from transpixeler.adapters.files import ADAPTER_FILE, CONFIG_FILE, FORMATS, join, read_adapter, write_adapter
from transpixeler.config import LoraConfig, UserError
from transpixeler.families.wan import names as wan_names
from transpixeler.families.wan.model import WanModel
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.lora import inject, lora_linears
from transpixeler.models.quantize import quantize
from transpixeler.models.weights import load_weights, local_slices
from transpixeler.sampling.model import base_weights, initial_adapter
from transpixeler.sampling.saves import load_saved
from transpixeler.training import saving

GOLDEN = Path(__file__).parent / "golden"
WIDTH, FFN, LAYERS = 24, 40, 2
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": LAYERS,
    "ffn_dim": FFN,
    "text_dim": 16,
    "freq_dim": 16,
}
TARGETS = LoraConfig().targets
TEXT_TARGETS = ("cross_attn.k", "cross_attn.v")
METADATA = {"base_model": "user/tiny", "streams": '["rgb", "seg"]', "fill": "keep", "step": "7", "ema": "false"}


def diffusers_wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    diffusers_wan().save_pretrained(folder / "transformer")
    return folder


def our_model(base: Path, *streams: str) -> WanModel:
    model = WanModel.from_config(WanModel.read_config(base), streams=("rgb", *streams))
    load_weights(model, wan_source(base))
    return model.eval().requires_grad_(False)


def moved(shape: tuple[int, ...], name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.2 * torch.randn(shape, generator=generator)


def move_adapter(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "stream_embedding" in name:
                parameter.copy_(moved(tuple(parameter.shape), name))


def trained(base: Path, *streams: str, **lora: Any) -> WanModel:
    """A model whose adapter has moved away from its first values."""
    model = our_model(base, *streams)
    inject(model, LoraConfig(rank=4, **{"scope": "aux" if streams else "all"} | lora))
    move_adapter(model)
    return model.eval()


def sample(streams: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    torch.manual_seed(1)
    shape = (16, 2, 4, 4)
    return torch.randn(1, streams, *shape), torch.full((1, streams), 0.4), torch.randn(1, 512, 16), shape


@torch.no_grad()
def output(model: WanModel) -> Tensor:
    latents, timesteps, text, shape = sample(len(model.streams))
    return model(latents.flatten(1), timesteps, text, layout=model.layout(shape))


@torch.no_grad()
def diffusers_output(model: nn.Module) -> Tensor:
    latents, timesteps, text, _ = sample(1)
    return model(latents[:, 0], timestep=1000 * timesteps[:, 0], encoder_hidden_states=text).sample.flatten(1)


def pipeline() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=diffusers_wan(), scheduler=UniPCMultistepScheduler()
    )


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


# -- the file


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["plain", "joint"])
def test_the_keys_of_each_format_are_golden(format: str, kind: str, tmp_path: Path, base: Path) -> None:
    model = trained(base, *(["seg"] if kind == "joint" else []))
    file = write_adapter(adapter_of(model, METADATA), tmp_path / "a.safetensors", format=format)
    keys = sorted({re.sub(r"(blocks[._])\d+", r"\1N", key) for key in load_file(file)})
    assert keys == (GOLDEN / f"adapter_{kind}_{format}.txt").read_text().splitlines()


def test_an_adapter_folder_says_what_it_holds(tmp_path: Path, base: Path) -> None:
    write_adapter(adapter_of(trained(base, "seg", alpha=2.0), METADATA), tmp_path / "epoch1")
    assert {file.name for file in (tmp_path / "epoch1").iterdir()} == {ADAPTER_FILE, CONFIG_FILE}
    assert header(tmp_path / "epoch1" / ADAPTER_FILE) == {
        "format": "pt",
        "transpixeler.format": "adapter",
        "transpixeler.version": "1",
        "transpixeler.rank": "4",
        "transpixeler.alpha": "2.0",
        "transpixeler.scope": "aux",
    } | {f"transpixeler.{key}": value for key, value in METADATA.items()}
    config = json.loads((tmp_path / "epoch1" / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 2.0)
    assert config["target_modules"] == sorted(TARGETS)
    assert config["transpixeler"]["fill"] == "keep"


scales = st.sampled_from([0.25, 1.0, 2.0, 0.3])
scopes = st.sampled_from(["aux", "all", ("seg",), ("rgb", "seg")])
modules = st.builds(
    lambda block, part: f"blocks.{block}.{part}", st.integers(0, 12), st.sampled_from([*TARGETS, *TEXT_TARGETS])
) | st.sampled_from(["head.head", "embed.text_embedding.0", "embed.time_projection.1", "embed.time_embedding.2"])


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    targets = draw(st.lists(modules, min_size=1, max_size=4, unique=True))
    ranks = {target: draw(st.integers(1, 4)) for target in targets}
    tensors = {f"{t}.lora_A": moved((r, 5), t) for t, r in ranks.items()}
    tensors |= {f"{t}.lora_B": moved((6, r), t) for t, r in ranks.items()}
    alphas = {t: torch.tensor(draw(scales) * r).item() for t, r in ranks.items()}
    embeddings = {name: moved((5,), name) for name in draw(st.sets(st.sampled_from(["seg", "depth.x", "a_b"])))}
    return Adapter(tensors, alphas, {t: draw(scopes) for t in targets}, embeddings, METADATA)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters())
def test_what_is_exported_comes_back_the_same(format: str, adapter: Adapter, tmp_path: Path) -> None:
    back = read_adapter(write_adapter(adapter, tmp_path / "a.safetensors", format=format))
    assert back.matches(adapter)
    if all(adapter.scale(t) in (0.25, 1.0, 2.0) for t in adapter.targets) or format != "diffusers":
        for ours, theirs in ((adapter.tensors, back.tensors), (adapter.stream_embeddings, back.stream_embeddings)):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # to the last bit


def test_a_changed_weight_scale_or_scope_does_not_match(base: Path) -> None:
    adapter = adapter_of(trained(base, "seg"), METADATA)
    target = adapter.targets[0]
    for change in (
        {"tensors": adapter.tensors | {f"{target}.lora_A": adapter.down(target) + 1e-5}},
        {"alphas": adapter.alphas | {target: 1.0}},
        {"scopes": adapter.scopes | {target: "all"}},
        {"metadata": {}},
        {"stream_embeddings": {}},
    ):
        assert not adapter.matches(Adapter(**(vars(adapter) | change)))


def test_a_failed_write_leaves_the_old_file_and_no_draft(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(trained(base), METADATA)
    file = write_adapter(adapter, tmp_path / "a.safetensors")
    before = file.read_bytes()

    def torn(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr("transpixeler.adapters.files.save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(adapter, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_whoever_reads_the_old_file_while_it_is_replaced_reads_the_old_file(tmp_path: Path, base: Path) -> None:
    file = write_adapter(adapter_of(trained(base), METADATA), tmp_path / "a.safetensors")
    before = file.read_bytes()
    with file.open("rb") as reader:
        write_adapter(adapter_of(trained(base, alpha=1.0), METADATA), file)
        assert reader.read() == before
    assert file.read_bytes() != before


# -- in other programs


def in_diffusers(model: WanModel, folder: Path, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers gives out without the model's adapter and with it."""
    write_adapter(adapter_of(model, METADATA), folder / "pytorch_lora_weights.safetensors", format=format)
    pipe = pipeline()
    plain = diffusers_output(pipe.transformer)
    pipe.load_lora_weights(folder)
    return plain, diffusers_output(pipe.transformer)


@pytest.mark.parametrize("format", FORMATS)
def test_a_plain_adapter_gives_our_output_in_diffusers(format: str, tmp_path: Path, base: Path) -> None:
    model = trained(base, alpha=1.0, targets=(*TARGETS, *TEXT_TARGETS))
    plain, adapted = in_diffusers(model, tmp_path, format)
    assert torch.allclose(output(model), adapted, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01
    apply_adapter(model, Adapter(**vars(adapter_of(model, {})) | {"alphas": dict.fromkeys(lora_names(model), 4.0)}))
    assert not torch.allclose(output(model), adapted, atol=1e-3)  # the strength counts


@pytest.mark.parametrize("format", FORMATS)
def test_ranks_that_differ_keep_their_strength_in_diffusers(
    format: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, ranks = (*TARGETS, *TEXT_TARGETS), {"ffn.*": 8, "blocks.1.self_attn.q": 2}
    model = trained(base, alpha=1.0, targets=targets, ranks=ranks)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    write_adapter(adapter_of(model, METADATA), file, format=format)
    monkeypatch.setattr("diffusers.utils.peft_utils.get_peft_kwargs", None)  # older ones guess wrong
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path)
    assert torch.allclose(output(model), diffusers_output(pipe.transformer), atol=1e-4)
    write_adapter(adapter_of(trained(base), METADATA), file, format=format)
    assert "lora_adapter_metadata" not in header(file), "one rank needs no word"


@pytest.mark.parametrize("ranks", [{}, {"ffn.*": 8}], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("targets", [TARGETS, ("blocks.1.ffn.2", "blocks.1.self_attn.q")], ids=["default", "few"])
@pytest.mark.parametrize("format", FORMATS)
def test_diffusers_reads_an_adapter_of_some_linears_in_every_spelling(
    format: str, targets: tuple[str, ...], ranks: dict[str, int], tmp_path: Path, base: Path
) -> None:
    model = trained(base, alpha=1.0, targets=targets, ranks=ranks)
    plain, adapted = in_diffusers(model, tmp_path, format)
    assert torch.allclose(output(model), adapted, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3
    back = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(back.targets) == set(lora_names(model)), "pairs of zeros stay in the file"


def test_an_export_that_diffusers_would_not_read_warns(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for targets, warned in ((TARGETS, False), (("*.self_attn.q",), True)):
        caplog.clear()
        write_adapter(adapter_of(trained(base, targets=targets), METADATA), tmp_path / "a")
        export_command(tmp_path / "a", format="kohya", out=tmp_path / "k.safetensors")
        assert ("use --format diffusers" in caplog.text) == warned


def lora_names(model: nn.Module) -> list[str]:
    return [name for name, _ in lora_linears(model)]


def test_diffusers_refuses_a_joint_adapter_instead_of_misusing_it(tmp_path: Path, base: Path) -> None:
    write_adapter(adapter_of(trained(base, "seg"), METADATA), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"should be empty .*eam_embedding\.seg"):
        pipeline().load_lora_weights(tmp_path)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_an_adapter_trained_by_peft_in_diffusers_comes_in(rank_stabilized: bool, tmp_path: Path, base: Path) -> None:
    from diffusers import WanPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig as PeftConfig
    from peft.utils import get_peft_model_state_dict

    theirs = diffusers_wan()
    options = {"r": 4, "lora_alpha": 8, "use_rslora": rank_stabilized}
    config = PeftConfig(**options, target_modules=["to_q", "to_out.0", "net.2"])
    theirs.add_adapter(config)
    move_adapter(theirs)
    layers = get_peft_model_state_dict(theirs)
    WanPipeline.save_lora_weights(tmp_path / "header", layers, transformer_lora_adapter_metadata=config.to_dict())
    WanPipeline.save_lora_weights(tmp_path / "beside", convert_state_dict_to_diffusers(layers))
    (tmp_path / "beside" / CONFIG_FILE).write_text(json.dumps(options))
    for name in ("header", "beside"):
        model = our_model(base)
        apply_adapter(model, read_adapter(tmp_path / name))
        assert torch.allclose(output(model), diffusers_output(theirs), atol=1e-5)


# -- the published code's adapters


def published(folder: Path, *, averaged: bool = False, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    parts = (*TARGETS, *TEXT_TARGETS)
    stored = {"transformer.modality_embedding": moved((1, WIDTH), "embedding")}
    for block in range(LAYERS):
        for part in parts:
            out, inner = {"ffn.0": (FFN, WIDTH), "ffn.2": (WIDTH, FFN)}.get(part, (WIDTH, WIDTH))
            key = f"diffusion_model.blocks.{block}.{part}"
            stored[f"{key}.lora_A.weight"] = moved((8, inner), key).bfloat16()
            stored[f"{key}.lora_B.weight"] = moved((out, 8), key + "B").bfloat16()
    if averaged:
        stored["diffusion_model.modality_embedding"] = stored["transformer.modality_embedding"].clone()
    save_file(stored, folder / ADAPTER_FILE, {"format": "pt"})
    if config:
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("averaged", [False, True])
def test_a_published_adapter_comes_in_with_its_quirks(averaged: bool, tmp_path: Path, base: Path) -> None:
    folder = published(tmp_path / "p", averaged=averaged, config={"r": 8, "lora_alpha": 1})
    adapter = read_adapter(folder, stream="alpha")
    assert set(adapter.alphas.values()) == {1.0}
    assert adapter.scale("blocks.0.ffn.0") == 1 / 8
    assert {t.split(".", 2)[2] for t, scope in adapter.scopes.items() if scope == "all"} == {
        "cross_attn.o",
        *TEXT_TARGETS,
    }
    assert set(adapter.scopes.values()) == {"all", "aux"}
    assert torch.equal(adapter.stream_embeddings["alpha"], moved((1, WIDTH), "embedding")[0])
    model = our_model(base, "alpha")
    before = output(model)
    apply_adapter(model, adapter)
    assert (output(model) - before).abs().max() > 1e-3
    again = adapter_of(model, {})
    assert again.matches(adapter)
    assert read_adapter(write_adapter(again, tmp_path / "ours")).matches(adapter)


def test_a_published_adapter_without_its_alpha_needs_to_be_told(tmp_path: Path) -> None:
    folder = published(tmp_path / "p")
    with pytest.raises(UserError, match=r"^lora\.init_from: .*without alpha its strength is unknown") as told:
        read_adapter(folder, key="lora.init_from")
    words = re.search(r"`transpixeler (export .*) NEW\.safetensors`", str(told.value))[1].split()
    assert cli.main([*words, str(tmp_path / "new.safetensors")]) == 0
    again = read_adapter(tmp_path / "new.safetensors")
    assert set(again.alphas.values()) == {1} and again.matches(read_adapter(folder, alpha=1))


def test_a_foreign_file_without_alpha_has_the_strength_that_its_readers_give_it(tmp_path: Path) -> None:
    key = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 3), f"{key}.lora_B.weight": torch.ones(3, 2)}, tmp_path / "x.safetensors"
    )
    adapter = read_adapter(tmp_path)
    assert adapter.scale("blocks.0.self_attn.q") == 1
    assert adapter.is_plain


# -- on models


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
            initial_adapter(configfile.from_overrides(keys))


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
        model = WanModel.from_config(WanModel.read_config(base), streams=("rgb", "seg"))
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


# -- merged and whole models


def test_a_merged_model_gives_our_output_in_diffusers(tmp_path: Path, base: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = trained(base, alpha=1.0)
    merged = WanTransformer3DModel.from_pretrained(merge_adapter(base, [adapter_of(model, {})], tmp_path / "m"))
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
    merged = wan_source(merge_adapter(tmp_path, [small], tmp_path / "m"))
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
        before = wan_source(tmp_path).read(f"{name}.weight").float()
        delta = small.up(name) @ small.down(name) * small.scale(name)
        assert delta.norm() < 0.05 * before.norm()
        for source in (merged, FusedSource(wan_source(tmp_path), [small])):
            found = source.read_slice(f"{name}.weight", ()).float() - before
            assert (found - delta).norm() < 0.1 * delta.norm()


def test_an_adapter_on_some_streams_or_of_another_model_is_not_merged(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="acts on some streams only"):
        merge_adapter(base, [adapter_of(trained(base, "seg"), {})], tmp_path / "m")
    tensors = {"blocks.9.ffn.0.lora_A": torch.ones(1, WIDTH), "blocks.9.ffn.0.lora_B": torch.ones(FFN, 1)}
    foreign = Adapter(tensors, {"blocks.9.ffn.0": 1.0}, {"blocks.9.ffn.0": "all"}, {}, {})
    with pytest.raises(UserError, match=r"blocks\.9\.ffn\.0\.weight .*absent"):
        merge_adapter(base, [foreign], tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_a_fully_tuned_model_is_read_by_diffusers(shard_bytes: int, tmp_path: Path, base: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = our_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = WanModel.read_config(base)
    target = save_model(model.named_parameters(), tmp_path, config=config, shard_bytes=shard_bytes)
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    theirs, report = WanTransformer3DModel.from_pretrained(target, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(diffusers_output(theirs), output(model), atol=1e-5)
    with pytest.raises(UserError, match="never overwritten"):
        save_model(model.named_parameters(), tmp_path, config=config)


def test_a_fully_tuned_joint_model_keeps_its_stream_embeddings_beside_it(tmp_path: Path, base: Path) -> None:
    model = our_model(base, "seg")
    move_adapter(model)
    save_model(model.named_parameters(), tmp_path, config=WanModel.read_config(base), metadata=METADATA)
    again = our_model(tmp_path, "seg")
    assert not torch.equal(output(again), output(model))
    apply_adapter(again, read_adapter(tmp_path))
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_what_is_written_may_be_read_as_the_umask_says(umask: int, tmp_path: Path, base: Path) -> None:
    before = os.umask(umask)
    try:
        write_adapter(adapter_of(trained(base), METADATA), tmp_path / "adapter")
        save_model(our_model(base).named_parameters(), tmp_path / "model", config=WanModel.read_config(base))
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_file()}
    assert len(modes) == 4 and set(modes.values()) == {0o666 & ~umask}


def test_a_save_that_breaks_off_leaves_nothing(tmp_path: Path, base: Path) -> None:
    def broken(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from list(model.named_parameters())[:5]
        raise OSError("disk full")

    save = partial(save_model, folder=tmp_path, config=WanModel.read_config(base))
    with pytest.raises(OSError, match="disk full"):
        save(broken(our_model(base)))
    with pytest.raises(AssertionError, match="would not be a whole model"):
        save(list(our_model(base).named_parameters())[:-1])
    assert not list(tmp_path.iterdir())


def test_a_comfyui_file_alone_is_a_whole_model(tmp_path: Path) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 40, "text_dim": 16}
    model = WanModel.from_config(config | {"freq_dim": 32}, streams=("rgb",))
    state = {f"model.diffusion_model.{wan_names.from_internal(n)}": p.detach() for n, p in model.named_parameters()}
    save_file(state, tmp_path / "wan.safetensors")
    again = our_model(tmp_path / "wan.safetensors")
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"flux\.safetensors holds no Wan model: embed\.patch_embedding\.weight"):
        WanModel.read_config(tmp_path / "flux.safetensors")


# -- the command


def test_a_runs_newest_adapter_is_exported(tmp_path: Path, base: Path) -> None:
    run = tmp_path / "output" / "run"
    for name, step in (("epoch2", 20), ("epoch10", 100), ("step50", 50)):
        write_adapter(adapter_of(trained(base), METADATA | {"step": str(step)}), run / name)
    (tmp_path / "output" / "latest").symlink_to(run)
    for path in (run, tmp_path / "output"):
        out = export_command(path, format="kohya", out=tmp_path / "k.safetensors")
        assert header(out)["transpixeler.step"] == "100"
        assert all(key.startswith("lora_unet_") for key in load_file(out))


def test_a_runs_newest_whole_model_is_that_of_the_last_step_however_it_was_copied(tmp_path: Path, base: Path) -> None:
    for step in (1000, 2000):
        folder = tmp_path / f"step{step}"
        state = our_model(base).named_parameters()
        save_model(state, folder, config=WanModel.read_config(base), metadata={"step": str(step)})
        (folder / "config.yaml").write_text("streams: {rgb: ''}\nlora: {enabled: false}\n")
        os.utime(folder, (5000 - step, 5000 - step))
    (tmp_path / "config.yaml").write_text("streams: {rgb: ''}\n")
    found = load_saved(str(tmp_path))
    assert (found.name, found.step) == (str(tmp_path / "step2000"), 2000)


def test_an_export_has_the_averaged_weights_unless_the_raw_ones_are_asked_for(tmp_path: Path, base: Path) -> None:
    run = tmp_path / "output" / "run"
    for folder, ema in ((run / "step50", "false"), (run / "step50" / "ema", "true")):
        write_adapter(adapter_of(trained(base), METADATA | {"ema": ema}), folder)
    (run / "config.yaml").write_text("streams: {rgb: ''}\n")
    (tmp_path / "output" / "latest").symlink_to(run)
    for words, ema in (([], "true"), (["--ema"], "true"), (["--no-ema"], "false")):
        for path in (tmp_path / "output", run / "step50"):
            out = tmp_path / "k.safetensors"
            assert cli.main(["export", str(path), "--format", "kohya", "--out", str(out), *words]) == 0
            assert header(out)["transpixeler.ema"] == ema


def test_a_whole_model_needs_no_export(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    save_model(our_model(base).named_parameters(), tmp_path / "step1", config=WanModel.read_config(base))
    assert cli.main(["export", str(tmp_path / "step1"), "--format", "merged", "--out", str(tmp_path / "m")]) == 2
    assert "holds a whole model, not an adapter" in capsys.readouterr().err


def test_a_merged_export_finds_its_base_or_asks_for_it(tmp_path: Path, base: Path) -> None:
    adapter = adapter_of(trained(base), METADATA | {"base_model": str(base)})
    write_adapter(adapter, tmp_path / "a")
    assert export_command(tmp_path / "a", format="merged", out=tmp_path / "m") == tmp_path / "m" / "transformer"
    write_adapter(Adapter(**vars(adapter) | {"metadata": {}}), tmp_path / "b")
    with pytest.raises(UserError, match="--base"):
        export_command(tmp_path / "b", format="merged", out=tmp_path / "n")
    export_command(tmp_path / "b", format="merged", out=tmp_path / "n", base=base)


def test_an_adapter_of_a_fused_base_brings_what_is_fused_along(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    style = write_adapter(adapter_of(trained(base, alpha=1.0, targets=("*.v",)), {}), tmp_path / "style.safetensors")
    keys = [f"model.path={base}", f"model.fuse=[{style}]", "streams={rgb: ''}", "lora.rank=4", "lora.scope=all"]
    config = configfile.from_overrides(keys)
    model = WanModel.from_config(WanModel.read_config(base), streams=("rgb",))
    load_weights(model, base_weights(config))
    inject(model.eval(), config.lora)
    move_adapter(model)
    metadata = saving.Saver(config, *[None] * 4)._metadata(7, averaged=False)
    file = write_adapter(adapter_of(model, metadata), tmp_path / "a.safetensors")
    assert load_saved(str(file)).config.model == config.model
    for format in ("merged", "kohya"):
        assert cli.main(["export", str(file), "--format", format, "--out", str(tmp_path / format)]) == 0
    assert torch.allclose(output(our_model(tmp_path / "merged")), output(model), atol=1e-5)
    assert "with" in caplog.text and str(style) in caplog.text
    style.unlink()
    with pytest.raises(UserError, match=r"model\.fuse: .*style\.safetensors does not exist"):
        export_command(file, format="merged", out=tmp_path / "again")


def test_exporting_a_joint_adapter_for_others_warns(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(adapter_of(trained(base, "seg"), METADATA), tmp_path / "a")
    export_command(tmp_path / "a", format="transpixeler", out=tmp_path / "t.safetensors")
    assert not caplog.records
    export_command(tmp_path / "a", format="comfyui", out=tmp_path / "c.safetensors")
    assert "some streams only" in caplog.text


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(1)}, "1 strange keys: diffusion_model.*diff_b"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 2)}, "not a pair"),
        ({"lora_unet_double_blocks_0_img_attn.lora_up.weight": torch.ones(1, 2)}, "strange keys"),
        ({}, "holds no LoRA weights"),
    ],
)
def test_a_file_that_is_no_adapter_of_ours_is_refused(stored: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "x.safetensors")


def test_an_ambiguous_folder_a_pickle_a_torn_file_and_a_wrong_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 0 \.safetensors files"):
        read_adapter(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="name the file itself"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_adapter(tmp_path / "a.safetensors")
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UserError, match="only"):
        read_adapter(tmp_path / "x.pt")
    with pytest.raises(UserError, match="adapter: /no/such does not exist"):
        read_adapter("/no/such")
    with pytest.raises(UserError, match=r"--format: onnx is unknown; there are .*merged"):
        export_command(tmp_path, format="onnx", out=tmp_path / "x")
