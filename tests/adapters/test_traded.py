"""Adapters as they are traded, speed-ups above all, change the base as slow formulas say; nothing in them is lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.adapters import FFN, LAYERS, WIDTH, moved, our_model, output, trained_over
from tests.support.families.cases import CASES, Case
from tests.support.models import wan_model, wan_source
from transpixeler import cli
from transpixeler.adapters import merge
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.merge import FusedSource, adapted
from transpixeler.adapters.readers import readers
from transpixeler.config import loading
from transpixeler.config.sections import FuseConfig, UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.names import NAMES as wan_names
from transpixeler.models.family import ModelFolder
from transpixeler.models.weights import load_weights
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import running
from transpixeler.sampling.model import base_weights, initial_adapters, open_engine
from transpixeler.sampling.saves import load_saved

ATTENTIONS = ("self_attn", "cross_attn")


def originals(base: Path) -> dict[str, Tensor]:
    """The base's weights in its authors' names."""
    source = wan_source(base)
    return {wan_names.parameter(n, source="internal", to="original"): source.read(n).float() for n in source.names()}


def pair(key: str, out: int, inner: int, *, down: str, up: str, rank: int = 3) -> dict[str, Tensor]:
    return {f"{key}.{down}.weight": moved((rank, inner), key), f"{key}.{up}.weight": moved((out, rank), key + "up")}


def name(module: str) -> str:
    return f"diffusion_model.{module}"


def speed_up(*, up: str = "lora_up", down: str = "lora_down") -> dict[str, Tensor]:
    """Every kind of key that distilled models are traded with: pairs, norms, biases, tables, weights, a kernel."""
    stored: dict[str, Tensor] = {}
    for block in range(LAYERS):
        for attention in ATTENTIONS:
            for part in "qkvo":
                key = name(f"blocks.{block}.{attention}.{part}")
                stored |= pair(key, WIDTH, WIDTH, down=down, up=up)
                stored[f"{key}.diff_b"] = moved((WIDTH,), key + "b")
                if part in "qk":
                    stored[f"{key}.alpha"] = torch.tensor(1.5)
            for norm in ("norm_q", "norm_k"):
                key = name(f"blocks.{block}.{attention}.{norm}")
                stored[f"{key}.diff"] = moved((WIDTH,), key)
        key = name(f"blocks.{block}.ffn.0")
        stored |= pair(key, FFN, WIDTH, down=down, up=up) | {f"{key}.alpha": torch.tensor(2.0)}
        stored[f"{key}.dora_scale"] = 1 + moved((FFN, 1), key).abs()
        key = name(f"blocks.{block}.ffn.2")
        stored |= pair(key, WIDTH, FFN, down=down, up=up) | {f"{key}.dora_scale": 1 + moved((1, FFN), key).abs()}
        stored[name(f"blocks.{block}.norm3") + ".diff"] = moved((WIDTH,), "norm3")
        stored[name(f"blocks.{block}.norm3") + ".diff_b"] = moved((WIDTH,), "norm3b")
        stored[name(f"blocks.{block}") + ".diff_m"] = moved((1, 6, WIDTH), "table")
    stored[name("head.head") + ".diff"] = moved((64, WIDTH), "head")
    stored[name("head.head") + ".diff_b"] = moved((64,), "head b")
    stored |= pair(name("time_projection.1"), 6 * WIDTH, WIDTH, down=down, up=up)
    stored[name("patch_embedding") + f".{down}.weight"] = moved((3, 16, 1, 2, 2), "patches")
    stored[name("patch_embedding") + f".{up}.weight"] = moved((WIDTH, 3, 1, 1, 1), "patches up")
    stored[name("text_embedding.0") + ".diff_b"] = torch.zeros(WIDTH)
    return stored


def changed(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, up: str, down: str) -> dict[str, Tensor]:
    """Add each key to the weight that it means, number by number where the formula is more than a sum."""
    stored = {key: value.float() for key, value in stored.items()}
    made = {name: value.clone() for name, value in weights.items()}
    for name in weights:
        module = f"diffusion_model.{name.removesuffix('.weight').removesuffix('.bias')}"
        if name.endswith(".bias"):
            made[name] += stored.get(f"{module}.diff_b", torch.zeros(()))
        elif name.endswith(".modulation"):
            made[name] += stored.get(f"{module.removesuffix('.modulation')}.diff_m", torch.zeros(()))
        elif f"{module}.{up}.weight" in stored:
            a, b = stored[f"{module}.{down}.weight"], stored[f"{module}.{up}.weight"]
            strength = stored[f"{module}.alpha"].item() / len(a) if f"{module}.alpha" in stored else 1.0
            w = made[name].flatten(1)
            for i in range(w.shape[0]):
                for j in range(w.shape[1]):
                    w[i, j] += strength * sum(b[i].flatten()[k] * a[k].flatten()[j] for k in range(len(a)))
            made[name] = decomposed(w, stored.get(f"{module}.dora_scale")).reshape(made[name].shape)
        else:
            made[name] += stored.get(f"{module}.diff", torch.zeros(()))
    return made


def decomposed(w: Tensor, scale: Tensor | None) -> Tensor:
    """Each row of [out, 1], or column of [1, in], has the norm that it says, whatever it had."""
    if scale is not None and scale.shape == (len(w), 1):
        return torch.stack([row / row.square().sum().sqrt() * s for row, s in zip(w, scale.flatten())])
    if scale is not None:
        return torch.stack([col / col.square().sum().sqrt() * s for col, s in zip(w.T, scale.flatten())]).T
    return w


def fused(base: Path, file: Path) -> dict[str, Tensor]:
    source = FusedSource(wan_source(base), [read_adapter(file)])
    return {wan_names.parameter(n, source="internal", to="original"): source.read(n).float() for n in source.names()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("up", "down"), [("lora_up", "lora_down"), ("lora_B", "lora_A")])
def test_a_speed_up_changes_the_base_as_the_slow_formula_does(
    dtype: torch.dtype, up: str, down: str, tmp_path: Path, base: Path
) -> None:
    stored = {key: value.to(dtype) for key, value in speed_up(up=up, down=down).items()}
    save_file(stored, tmp_path / "fast.safetensors")
    before = originals(base)
    expected, found = changed(before, stored, up=up, down=down), fused(base, tmp_path / "fast.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)
    moved_names = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert {"head.head.weight", "blocks.0.modulation", "patch_embedding.weight", "blocks.1.norm3.bias"} < moved_names
    assert "text_embedding.0.bias" not in moved_names


def test_a_strength_takes_its_share_of_every_change(tmp_path: Path, base: Path) -> None:
    stored, file = speed_up(), tmp_path / "fast.safetensors"
    save_file(stored, file)
    before = originals(base)
    expected = changed(before, stored, up="lora_up", down="lora_down")
    source = FusedSource(wan_source(base), merge.read_fused([FuseConfig(str(file), 0.7)]))
    for name in source.names():
        there = wan_names.parameter(name, source="internal", to="original")
        wanted = before[there] + 0.7 * (expected[there] - before[there])
        torch.testing.assert_close(source.read(name).float(), wanted, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("twin", ["no alpha", "the other axis", "norms of the base"])
def test_a_twin_that_ignores_alpha_or_takes_other_norms_is_caught(
    twin: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(speed_up(), tmp_path / "fast.safetensors")
    if twin == "no alpha":
        monkeypatch.setattr(Adapter, "scale", lambda self, target: 1.0)
    elif twin == "the other axis":
        columns = torch.linalg.vector_norm
        monkeypatch.setattr(
            merge,
            "adapted",
            lambda w, low, m, **_: (
                w + low if m is None else (w + low) * m.flatten().mean() / columns(w + low, dim=int(m.ndim == 2))[0]
            ),
        )
    else:
        monkeypatch.setattr(merge, "adapted", lambda w, low, m, **_: adapted(w, low, m, of_base=True))
    expected = changed(originals(base), speed_up(), up="lora_up", down="lora_down")
    found = fused(base, tmp_path / "fast.safetensors")
    assert any(not torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


def prefixed(key: str, prefix: str) -> str:
    ending = next(e for e in (".lora_up.weight", ".lora_down.weight", key[key.rindex(".") :]) if key.endswith(e))
    module = key.removeprefix("diffusion_model.").removesuffix(ending)
    return prefix + (module.replace(".", "_") if prefix == "lora_unet_" else module) + ending


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "", "lora_unet_", "transformer."])
def test_every_prefix_means_the_same(prefix: str, tmp_path: Path, base: Path) -> None:
    save_file(speed_up(), tmp_path / "a.safetensors")
    renamed = {prefixed(key, prefix): value for key, value in speed_up().items()}
    save_file(renamed, tmp_path / "b.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").matches(read_adapter(tmp_path / "b.safetensors"))


def test_a_slice_of_a_fused_weight_is_that_of_the_whole(tmp_path: Path, base: Path) -> None:
    save_file(speed_up(), tmp_path / "fast.safetensors")
    source = FusedSource(wan_source(base), [read_adapter(tmp_path / "fast.safetensors")] * 2)
    cut = (slice(3, 9), slice(1, 5))
    for name in ("blocks.0.ffn.0.weight", "blocks.1.ffn.2.weight", "blocks.0.self_attn.q.weight", "head.head.weight"):
        torch.testing.assert_close(source.read_slice(name, cut), source.read(name)[cut], msg=name)
    for name in ("embed.patch_embedding.weight", "blocks.0.norm3.bias", "blocks.0.self_attn.q.bias"):
        torch.testing.assert_close(source.read_slice(name, cut[:1]), source.read(name)[cut[:1]], msg=name)


def test_pefts_bias_is_scaled_as_its_matrices(tmp_path: Path, base: Path) -> None:
    key = "transformer.blocks.0.attn1.to_q"
    stored = pair(key, WIDTH, WIDTH, down="lora_A", up="lora_B") | {f"{key}.alpha": torch.tensor(1.5)}
    save_file(stored | {f"{key}.lora_B.bias": torch.ones(WIDTH)}, tmp_path / "peft.safetensors")
    name = "blocks.0.self_attn.q.bias"
    torch.testing.assert_close(fused(base, tmp_path / "peft.safetensors")[name], originals(base)[name] + 0.5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("diffusion_model.blocks.0.ffn.0.hada_w1_a", torch.ones(1), r"1 strange keys: .*ffn\.0\.hada_w1_a"),
        ("lora_te_text_model_encoder.alpha", torch.ones(()), "strange keys: lora_te_text_model_encoder.alpha"),
        (
            "diffusion_model.blocks.0.norm1.diff",
            torch.ones(2),
            r"strange keys: diffusion_model\.blocks\.0\.norm1\.diff",
        ),
        ("diffusion_model.blocks.0.self_attn.q.diff", torch.ones(WIDTH, WIDTH), "matrices and a whole change"),
        ("transformer.blocks.0.self_attn.q.diff_b", torch.ones(WIDTH), "twice, the second time as transformer.blocks"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", torch.ones(5), "neither one number a row nor one a column"),
        ("diffusion_model.blocks.9.norm3.diff", torch.ones(WIDTH), r"changes blocks\.9\.norm3\.weight .*absent"),
        ("diffusion_model.blocks.0.self_attn.norm_q.diff_b", torch.ones(WIDTH), r"norm_q\.bias \[24\].*absent"),
        ("diffusion_model.head.head.diff", torch.ones(64, 3), r"head\.head\.weight \[64, 3\].*is \[64, 24\]"),
        ("diffusion_model.blocks.0.norm3.alpha", torch.ones(()), r"norm3 is not a pair of low-rank matrices"),
    ],
)
def test_what_is_not_understood_or_has_no_place_is_an_error_with_its_name(
    key: str, value: Tensor, message: str, tmp_path: Path, base: Path
) -> None:
    file = tmp_path / "odd.safetensors"
    save_file(speed_up() | {key: value}, file)
    words = [f"model.path={base}", f"model.fuse=[{file}]", "streams={rgb: ''}", "lora.scope=all"]
    config = loading.from_overrides(words)
    with pytest.raises(UserError, match=message) as told:
        base_weights(config)
    assert "\n" not in str(told.value)


def test_a_speed_up_is_no_adapter_to_go_on_from_unless_its_changes_are_zero(tmp_path: Path, base: Path) -> None:
    stored, file = speed_up(), tmp_path / "fast.safetensors"
    save_file(stored, file)
    words = [f"model.path={base}", f"lora.init_from={file}", "streams={rgb: ''}", "lora.scope=all", "lora.rank=3"]
    with pytest.raises(UserError, match=r"lora\.init_from: .* changes .*; name it in model\.fuse"):
        initial_adapters(loading.from_overrides(words))
    pairs = {key for key in stored if ".blocks." in key and "_attn" in key and key.endswith((".weight", ".alpha"))}
    zeros = {key: torch.zeros_like(value) for key, value in stored.items() if key.endswith((".diff", ".diff_b"))}
    save_file({key: stored[key] for key in pairs} | zeros, file)
    (adapter,) = initial_adapters(loading.from_overrides(words)).values()
    assert len(adapter.targets) == 2 * 4 * LAYERS


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_trained_over_a_speed_up_sampled_and_merged_are_equal(strength: float, tmp_path: Path, base: Path) -> None:
    speed = tmp_path / "fast.safetensors"
    save_file({key: value.bfloat16() for key, value in speed_up().items()}, speed)
    fuse = f"[{speed}]" if strength == 1 else f"[{{path: {speed}, strength: {strength}}}]"
    model, config, file = trained_over(base, fuse, tmp_path / "a.safetensors")
    assert output(our_model(base)).sub(output(model)).abs().max() > 1e-2
    assert load_saved(str(file)).config.model == config.model and read_adapter(file).fused[0].strength == strength
    assert torch.allclose(sampled(str(file)), output(model), atol=1e-5)
    assert cli.main(["export", str(file), "--format", "merged", "--out", str(tmp_path / "m")]) == 0
    assert torch.allclose(output(our_model(tmp_path / "m")), output(model), atol=1e-5)


def sampled(file: str, *overrides: str) -> Tensor:
    with running(device="cpu") as runtime:
        source = load_saved(file, overrides)
        engine = open_engine(source, meshes.build(meshes.resolve(source.config.parallel, 1), runtime))
        return output(next(iter(engine.models())).eval())


def test_a_speed_up_can_be_sampled_merged_and_written_for_comfyui_alone(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "fast.safetensors"
    save_file({k: v for k, v in speed_up().items() if not k.endswith("ffn.0.dora_scale")}, file)
    model = wan_model(WanFolder(str(base)).config, streams=("rgb",))
    load_weights(model, FusedSource(wan_source(base), [read_adapter(file)]))
    assert torch.equal(sampled(str(file), f"model.path={base}"), output(model.eval()))
    words = ["export", str(file), "--base", str(base), "--format", "merged", "--out", str(tmp_path / "m")]
    assert cli.main(words) == 0
    assert torch.allclose(output(our_model(tmp_path / "m")), output(model), atol=1e-5)
    adapter = read_adapter(file)
    for format, programs in (("comfyui", ("ComfyUI",)), ("kohya", ("ComfyUI",))):
        again = write_adapter(adapter, tmp_path / f"{format}.safetensors", format=format)
        assert read_adapter(again).matches(adapter) and readers(adapter, format) == programs
    with pytest.raises(UserError, match="diffusers cannot apply"):
        write_adapter(adapter, tmp_path / "d.safetensors", format="diffusers")
    assert not (tmp_path / "d.safetensors").exists()


@torch.no_grad()
def test_another_familys_norms_and_biases_are_fused_by_its_own_names(tmp_path: Path) -> None:
    case = CASES["ltx"]
    model = case.model()
    width = model.width
    state = {name: p.detach() for name, p in model.named_parameters()}
    folder = tmp_path / "base"
    merge.save_model(state.items(), folder, model=_folder(case, tmp_path))
    block = "diffusion_model.transformer_blocks.1"
    stored = {
        f"{block}.attn1.q_norm.diff": moved((width,), "norm"),
        f"{block}.attn1.to_out.0.diff_b": moved((width,), "bias"),
        f"{block}.scale_shift_table.diff": moved((6, width), "table"),
    }
    save_file(
        stored | pair(f"{block}.attn2.to_q", width, width, down="lora_A", up="lora_B"), tmp_path / "x.safetensors"
    )
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert adapter.family is case.family
    base = case.family.open(str(folder))
    source = FusedSource(merge.WeightSource(base.path, case.family.internal_names), [adapter])
    found = {name: source.read(name) - value for name, value in state.items()}
    names = ("attn1.q_norm.weight", "attn1.to_out.bias", "scale_shift_table", "attn2.to_q.weight")
    assert {name for name, change in found.items() if change.any()} == {f"blocks.1.{name}" for name in names}
    for name, value in zip(names, stored.values()):
        torch.testing.assert_close(found[f"blocks.1.{name}"], value, msg=name)


def _folder(case: Case, tmp_path: Path) -> ModelFolder:
    """A folder of the tiny model's config, in diffusers' layout."""
    reference = case.reference(case.model())
    reference.module.save_pretrained(tmp_path / "config" / "transformer")
    return case.family.open(str(tmp_path / "config"))
