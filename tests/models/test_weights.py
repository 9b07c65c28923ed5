"""Base weights come from any published layout, whole or in slices, or with one clear line about what is wrong."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.models import wan_source
from tests.support.ranks import run_ranks
from transpixeler.config import UserError
from transpixeler.families.wan import names as wan_names
from transpixeler.families.wan.original import (
    T5_FILE,
    VAE_FILE,
    original_t5_config,
    original_t5_state,
    original_vae_config,
    original_vae_state,
)
from transpixeler.models.weights import PACKED_PREFIX, load_weights, resolve

GOLDEN = Path(__file__).parents[1] / "families/wan/golden"
WIDTH, FFN, LAYERS = 24, 40, 3


def diffusers_wan(seed: int = 0) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=LAYERS, ffn_dim=FFN, text_dim=16, freq_dim=16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


class Holder(nn.Module):
    """The names and shapes of a Wan in three parts, without its arithmetic."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Module()
        self.blocks = nn.ModuleDict()
        self.head: nn.Module | None = nn.Module()
        for name, shape in shapes.items():
            *modules, leaf = name.split(".")
            owner: nn.Module = self
            for module in modules:
                if module not in owner._modules:
                    owner.add_module(module, nn.Module())
                owner = owner._modules[module]
            owner.register_parameter(leaf, nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    return {wan_names.from_diffusers(name): tensor for name, tensor in diffusers_wan().state_dict().items()}


@pytest.fixture(scope="module")
def internal(original: dict[str, Tensor]) -> dict[str, Tensor]:
    return {wan_names.to_internal(name): tensor for name, tensor in original.items()}


def holder(internal: dict[str, Tensor], **options: Any) -> Holder:
    return Holder({name: tuple(tensor.shape) for name, tensor in internal.items()}, **options)


# -- names


def test_the_names_of_each_spelling_are_golden(original: dict[str, Tensor]) -> None:
    for spelling, rename in (
        ("original", str),
        ("diffusers", wan_names.to_diffusers),
        ("internal", wan_names.to_internal),
    ):
        names = sorted({re.sub(r"^blocks\.\d+", "blocks.N", rename(name)) for name in original})
        assert names == (GOLDEN / f"wan_{spelling}.txt").read_text().splitlines()


def test_the_diffusers_names_are_those_of_diffusers(original: dict[str, Tensor]) -> None:
    assert {wan_names.to_diffusers(name) for name in original} == set(diffusers_wan().state_dict())


ORIGINAL_NAMES = (GOLDEN / "wan_original.txt").read_text().splitlines()
original_names = st.builds(
    lambda name, block: name.replace("blocks.N", f"blocks.{block}"), st.sampled_from(ORIGINAL_NAMES), st.integers(0, 99)
)


@given(original_names)
def test_the_name_maps_are_bijections(name: str) -> None:
    assert wan_names.from_diffusers(wan_names.to_diffusers(name)) == name
    assert wan_names.from_internal(wan_names.to_internal(name)) == name
    module = name.removesuffix(".weight").removesuffix(".bias")
    assert wan_names.module_from_flat(wan_names.module_to_flat(module)) == module
    assert wan_names.module_from_diffusers(wan_names.module_to_diffusers(module)) == module


@given(st.sets(original_names, min_size=2))
def test_two_weights_never_share_a_name(names: set[str]) -> None:
    for rename in (wan_names.to_diffusers, wan_names.to_internal):
        assert len({rename(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["blocks.0.norm2.weight", "blocks.00.norm3.weight", "blocks.0.modulation.weight", "x"])
def test_a_name_outside_the_table_is_refused(name: str) -> None:
    with pytest.raises(wan_names.UnknownName):
        wan_names.to_diffusers(name)


# -- layouts of files


def write_diffusers(folder: Path) -> Path:
    diffusers_wan().save_pretrained(folder / "transformer", max_shard_size="40KB")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    return folder


def write_original(folder: Path, original: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = sorted(original)
    for shard, half in enumerate((names[::2], names[1::2]), 1):
        save_file(
            {n: original[n].contiguous() for n in half},
            folder / f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors",
        )
    torch.save({}, folder / T5_FILE)
    return folder


def write_pickled(folder: Path, original: dict[str, Tensor]) -> Path:
    folder.mkdir()
    torch.save(original, folder / "diffusion_pytorch_model.pth")
    return folder


def write_comfyui(file: Path, original: dict[str, Tensor], prefix: str = PACKED_PREFIX) -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in original.items()}, file)
    return file


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


# -- quantized files


def quantize(original: dict[str, Tensor], *, per_row: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as ComfyUI's `fp8_scaled` ones are, and what it stands for."""
    stored, meant = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, dict(original)
    for name, weight in original.items():
        stored[name] = weight.contiguous()
        if not re.search(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.[qkvo02]\.weight", name):
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 448 if per_row else weight.abs().max() / 448
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", ".scale_weight")] = scale
        stored[name.replace(".weight", ".scale_input")] = torch.tensor(3.0)
        meant[name] = stored[name].float() * scale
    return stored, meant


@pytest.mark.parametrize("per_row", [False, True])
def test_a_scaled_fp8_file_is_dequantized(tmp_path: Path, original: dict[str, Tensor], per_row: bool) -> None:
    stored, meant = quantize({name: 0.01 * tensor for name, tensor in original.items()}, per_row=per_row)
    source = wan_source(write_comfyui(tmp_path / "c.safetensors", stored))
    model = holder({wan_names.to_internal(name): tensor for name, tensor in meant.items()})
    load_weights(model, source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, meant[wan_names.from_internal(name)]), name
    name = "blocks.0.ffn.0.weight"
    assert torch.equal(source.read_slice(name, (slice(5, 9), slice(None))), meant[name][5:9])


def test_a_plain_fp8_file_is_cast(tmp_path: Path, original: dict[str, Tensor]) -> None:
    low = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in original.items()}
    model = holder({wan_names.to_internal(name): tensor for name, tensor in original.items()})
    load_weights(model, wan_source(write_comfyui(tmp_path / "c.safetensors", low)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, low[wan_names.from_internal(name)].float())


def test_newer_quantized_files_are_dequantized_or_refused(tmp_path: Path, original: dict[str, Tensor]) -> None:
    name = "blocks.0.self_attn.q"
    stored = {n: t.contiguous() for n, t in original.items()} | {
        f"{name}.weight": torch.ones(WIDTH, WIDTH).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": torch.tensor(0.5),
        f"{name}.comfy_quant": torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8),
    }
    source = wan_source(write_comfyui(tmp_path / "good.safetensors", stored))
    assert torch.equal(source.read(f"{name}.weight"), torch.full((WIDTH, WIDTH), 0.5))
    stored[f"{name}.comfy_quant"] = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    source = wan_source(write_comfyui(tmp_path / "bad.safetensors", stored))
    with pytest.raises(UserError, match="mxfp8"):
        source.read(f"{name}.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_weight_without_its_scale_is_refused(
    tmp_path: Path, original: dict[str, Tensor], dtype: torch.dtype
) -> None:
    stored, _ = quantize(original, per_row=False)
    del stored["blocks.1.ffn.2.scale_weight"]
    stored["blocks.1.ffn.2.weight"] = torch.ones(WIDTH, FFN).to(dtype)
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.2\.weight is quantized"):
        wan_source(write_comfyui(tmp_path / "c.safetensors", stored)).read("blocks.1.ffn.2.weight")


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
    with pytest.raises(UserError, match="does not hold plain weights"):
        wan_source(tmp_path)


def test_an_unknown_path_and_an_unreachable_hub_give_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    with pytest.raises(UserError, match=r"model\.path: /no/such/folder does not exist"):
        resolve("/no/such/folder", only=("*",))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hf download someone/some-wan") as caught:
        resolve("someone/some-wan", only=("*",))
    assert "\n" not in str(caught.value)


# -- Wan's own VAE and text encoder


def original_vae_name(name: str) -> str:
    """The way back, by replacements, so that it shares nothing with the map under test."""
    for new, old in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"conv_in", "conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
        (r"down_blocks", "downsamples"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"norm1\.", "residual.0."),
        (r"(middle\.\d|samples\.\d+|resnets\.\d)\.conv1\.", r"\1.residual.2."),
        (r"norm2\.", "residual.3."),
        (r"(middle\.\d|samples\.\d+|resnets\.\d)\.conv2\.", r"\1.residual.6."),
        (r"conv_shortcut", "shortcut"),
    ):
        name = re.sub(new, old, name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)


def test_wans_own_vae_file_gives_the_same_vae(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 4])
    state = {original_vae_name(name): tensor for name, tensor in vae.state_dict().items()}
    assert {"encoder.downsamples.5.time_conv.weight", "decoder.upsamples.14.residual.6.bias"} <= set(state)
    torch.save(state, tmp_path / VAE_FILE)
    again = AutoencoderKLWan(**original_vae_config(tmp_path))
    again.load_state_dict(original_vae_state(tmp_path))
    public = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    assert public == {key: again.config[key] for key in public}
    video = torch.randn(1, 3, 5, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(video).sample, vae(video).sample)


def test_wans_own_text_encoder_file_gives_the_same_embeddings(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, is_encoder_decoder=False)
    encoder = UMT5EncoderModel(config).eval()
    state = {"token_embedding.weight": encoder.shared.weight, "norm.weight": encoder.encoder.final_layer_norm.weight}
    for index, block in enumerate(encoder.encoder.block):
        attention, ffn = block.layer
        state |= {
            f"blocks.{index}.attn.{part}.weight": getattr(attention.SelfAttention, part).weight for part in "qkvo"
        }
        state |= {
            f"blocks.{index}.pos_embedding.embedding.weight": attention.SelfAttention.relative_attention_bias.weight,
            f"blocks.{index}.norm1.weight": attention.layer_norm.weight,
            f"blocks.{index}.norm2.weight": ffn.layer_norm.weight,
            f"blocks.{index}.ffn.gate.0.weight": ffn.DenseReluDense.wi_0.weight,
            f"blocks.{index}.ffn.fc1.weight": ffn.DenseReluDense.wi_1.weight,
            f"blocks.{index}.ffn.fc2.weight": ffn.DenseReluDense.wo.weight,
        }
    torch.save({name: parameter.detach() for name, parameter in state.items()}, tmp_path / T5_FILE)
    again = UMT5EncoderModel(UMT5Config(**original_t5_config(tmp_path))).eval()
    again.load_state_dict(original_t5_state(tmp_path))
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_another_models_pickle_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"first_stage.weight": torch.zeros(1)}, tmp_path / VAE_FILE)
    with pytest.raises(UserError, match=r"first_stage\.weight"):
        original_vae_state(tmp_path)
    with pytest.raises(UserError, match=T5_FILE):
        original_t5_state(tmp_path)
