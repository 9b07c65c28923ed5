"""The ComfyUI node gives our own forward, on a model that has ComfyUI's names and a patcher that has its methods."""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import TINY, inputs, move, tiny
from transpixeler.adapters.command import export_command
from transpixeler.adapters.files import write_adapter
from transpixeler.adapters.on_model import adapter_of
from transpixeler.config.sections import LoraConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.families.wan.names import NAMES
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout

FILE = Path(__file__).parents[2] / "tools/comfyui/transpixeler_wan.py"
WIDTH, HEADS, INNER = 48, TINY["num_attention_heads"], TINY["ffn_dim"]
SHAPE = (4, 3, 8, 6)


@pytest.fixture(scope="module")
def node() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("transpixeler_wan", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["transpixeler_wan"] = module
    spec.loader.exec_module(module)
    return module


# --- a model as ComfyUI names it, spelled out ------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, freqs: Tensor, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        def turn(y: Tensor) -> Tensor:
            pairs = y.unflatten(2, (HEADS, -1, 1, 2))  # [B, T, H, d/2, 1, 2] times [1, T, 1, d/2, 2, 2]
            return (freqs * pairs).sum(-1).flatten(2)

        return self.attend(turn(self.norm_q(self.q(x))), turn(self.norm_k(self.k(x))), self.v(x))


class CrossAttention(SelfAttention):
    def forward(self, x: Tensor, context: Tensor, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        return self.attend(self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(), CrossAttention()
        self.norm3 = nn.LayerNorm(WIDTH, 1e-6)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(approximate="tanh"), nn.Linear(INNER, WIDTH))
        self.modulation = nn.Parameter(torch.zeros(1, 6, WIDTH))

    def forward(self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor) -> Tensor:
        def normed(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return F.layer_norm(y, (WIDTH,), eps=1e-6) * (1 + scale) + shift

        parts = (self.modulation + e).chunk(6, dim=1)
        x = x + self.self_attn(normed(x, *parts[:2]), freqs, transformer_options={}) * parts[2]
        x = x + self.cross_attn(self.norm3(x), context, transformer_options={})
        return x + self.ffn(normed(x, *parts[3:5])) * parts[5]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 16)
        self.modulation = nn.Parameter(torch.zeros(1, 2, WIDTH))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)


class ComfyWan(nn.Module):
    """One video [B, C, F, h, w] at one time t of 0 to 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(16, WIDTH), nn.GELU("tanh"), nn.Linear(WIDTH, WIDTH))
        self.time_embedding = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(TINY["num_layers"])])
        self.head = Head()
        self.img_emb = None

    def rope_encode(self, t: int, h: int, w: int, device: Any = None, dtype: Any = None) -> Tensor:
        """[1, tokens, 1, d/2, 2, 2], a rotation for each pair of a head's 24 channels: 8 for each axis."""
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (t, h // 2, w // 2)))
        rates = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        angles = (places[:, :, None] * rates).flatten(1)
        rows = [torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)]
        return torch.stack(rows, -2).float()[None, :, None]

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        freqs = self.rope_encode(frames, height, width, device=x.device, dtype=x.dtype)
        tokens = self.patch_embedding(x.float()).to(x.dtype)
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        phase = timestep[:, None] * 10000.0 ** -(torch.arange(16) / 16)
        e = self.time_embedding(torch.cat([phase.cos(), phase.sin()], dim=1))
        e0 = self.time_projection(e).unflatten(1, (6, -1))
        text = self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, e=e0, freqs=freqs, context=text)
        patches = self.head(tokens, e).unflatten(2, (1, 2, 2, 4)).unflatten(1, grid)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Patcher:
    """The methods of ComfyUI's ModelPatcher that the node calls; patches are on the model during a run alone."""

    def __init__(self, wan: nn.Module, patches: dict[str, Any] | None = None) -> None:
        self.model = types.SimpleNamespace(diffusion_model=wan)
        self.patches = dict(patches or {})

    def clone(self) -> Patcher:
        return Patcher(self.model.diffusion_model, self.patches)

    def add_object_patch(self, name: str, value: Any) -> None:
        self.patches[name] = value

    def get_model_object(self, name: str) -> Any:
        return self.patches[name] if name in self.patches else self._owner(f"{name}.x")[0]

    def _owner(self, name: str) -> tuple[Any, str]:
        *path, last = name.split(".")
        owner: Any = self.model
        for part in path:
            owner = getattr(owner, part)
        return owner, last

    @torch.no_grad()
    def run(self, *args: Tensor) -> Tensor:
        for name, value in self.patches.items():
            setattr(*self._owner(name), value)
        try:
            return self.model.diffusion_model(*args)
        finally:
            for name in self.patches:
                delattr(*self._owner(name))


# --- the same weights in both ----------------------------------------------------------------------------------------


def trained(streams: int, *, attends: bool = True, seed: int = 1, **lora: Any) -> WanModel:
    model = tiny(streams, attends=attends)
    inject(model, LoraConfig(rank=4, alpha=2.0, **lora))
    move(model, seed=seed, names="lora_")
    move(model, seed=seed, names="stream_embedding")
    return model.eval()


def comfy(model: WanModel) -> Patcher:
    wan = ComfyWan()
    own = {name: value for name, value in model.state_dict().items() if "lora_" not in name and "stream_" not in name}
    wan.load_state_dict({NAMES.parameter(name, source="internal", to="original"): value for name, value in own.items()})
    return Patcher(wan)


def stored(model: WanModel, path: Path, format: str = "comfyui", **said: str) -> Path:
    metadata = {"streams": ",".join(model.streams), "rgb_attends_aux": str(model.rgb_attends_aux).lower()} | said
    return write_adapter(adapter_of(model, metadata), path, format=format)


@torch.no_grad()
def ours(model: WanModel) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Our velocity as a latent whose streams lie one after another in its frames, and what ComfyUI would give in."""
    layout = StreamLayout.equal(model.streams, SHAPE, (1, 2, 2))
    x, times, text = inputs(layout)
    times[:] = times[:, :1]
    velocity = torch.cat(layout.unpack(model(x, times, text, layout=layout)), dim=2)
    return velocity, (torch.cat(layout.unpack(x), dim=2), 1000 * times[:, 0], text)


CASES = {
    "two streams": {"streams": 2},
    "three streams": {"streams": 3},
    "one of three": {"streams": 3, "scope": ("seg",)},
    "all tokens": {"streams": 2, "scope": "all", "targets": ("self_attn.*", "cross_attn.*", "ffn.*")},
    "rgb by itself": {"streams": 2, "attends": False},
    "rgb by itself, adapted": {"streams": 2, "attends": False, "scope": "all"},
    "plain": {"streams": 1, "scope": "all"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["comfyui", "transpixeler"])
def test_the_node_gives_our_forward(tmp_path: Path, node, case: str, format: str) -> None:
    model = trained(**CASES[case])
    adapter = node.read_adapter(stored(model, tmp_path / "a.safetensors", format))
    assert adapter.joint.streams == model.streams
    base = comfy(model)
    wanted, given = ours(model)
    assert (node.patched(base, adapter, 1.0).run(*given) - wanted).abs().max() < 2e-5
    assert (base.run(*given) - wanted).abs().max() > 1e-2  # unpatched it is another model, and stays it


@pytest.mark.parametrize("lost", ["rope_encode", "patch_embedding.forward", "blocks.1.ffn.0.forward"])
def test_a_node_that_left_something_out_is_found(tmp_path: Path, node, lost: str) -> None:
    model = trained(2)
    patched = node.patched(comfy(model), node.read_adapter(stored(model, tmp_path / "a.safetensors")), 1.0)
    del patched.patches[f"diffusion_model.{lost}"]
    wanted, given = ours(model)
    assert (patched.run(*given) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("attends", [True, False])
def test_two_halves_of_an_adapter_are_the_adapter(tmp_path: Path, node, attends: bool) -> None:
    model = trained(2, attends=attends)
    adapter = node.read_adapter(stored(model, tmp_path / "a.safetensors"))
    wanted, given = ours(model)
    half = node.patched(comfy(model), adapter, 0.5)
    rest = node.AdapterFile(node.Joint(model.streams, attends), {}, adapter.targets)  # embeddings have no strength
    assert (half.run(*given) - wanted).abs().max() > 1e-3
    assert (node.patched(half, rest, 0.5).run(*given) - wanted).abs().max() < 2e-5
    with pytest.raises(ValueError, match="need the same streams"):
        node.patched(half, node.AdapterFile(node.Joint(("rgb", "depth"), attends)), 1.0)


def test_what_does_not_fit_is_said(tmp_path: Path, node) -> None:
    model = trained(2)
    adapter = node.read_adapter(stored(model, tmp_path / "a.safetensors"))
    patched = node.patched(comfy(model), adapter, 1.0)
    _, (x, *rest) = ours(model)
    with pytest.raises(ValueError, match="5 latent frames are not 2 streams"):
        patched.run(x[:, :, :5], *rest)
    other = comfy(model)
    other.model.diffusion_model.blocks[0].ffn[0] = nn.Linear(WIDTH, 2 * INNER)
    with pytest.raises(ValueError, match=r"another size of Wan: blocks\.0\.ffn\.0"):
        node.patched(other, adapter, 1.0)
    other.model.diffusion_model.img_emb = nn.Identity()
    with pytest.raises(ValueError, match="it has img_emb"):
        node.patched(other, adapter, 1.0)
    with pytest.raises(ValueError, match="it has no patch_embedding"):
        node.patched(Patcher(nn.Linear(2, 2)), adapter, 1.0)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not an adapter of transpixeler"):
        node.read_adapter(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_an_adapter_under_other_names_is_refused(tmp_path: Path, node, format: str) -> None:
    file = stored(trained(2), tmp_path / "a.safetensors", format)
    with pytest.raises(ValueError, match="is no name of ours; `transpixeler export --format comfyui`"):
        node.read_adapter(file)


def test_smaller_companions_are_refused(tmp_path: Path, node) -> None:
    file = stored(trained(2), tmp_path / "a.safetensors", scales="1,2")
    with pytest.raises(ValueError, match=r"its companions are smaller than RGB.*`transpixeler sample`"):
        node.read_adapter(file)
    assert node.read_adapter(stored(trained(2), tmp_path / "b.safetensors", scales="1,1"))


def test_matrices_of_each_companion_are_refused_and_those_of_one_are_read(tmp_path: Path, node) -> None:
    file = stored(trained(3, per_stream=True), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"seg,depth have matrices of their own.*`transpixeler export --only depth`"):
        node.read_adapter(file)
    (alone,) = export_command(file, format="comfyui", out=tmp_path / "depth.safetensors", companion="depth")
    assert {target.span for target in node.read_adapter(alone).targets.values()} == {(1, 2)}


def test_a_latent_holds_the_streams_and_comes_apart(node) -> None:
    (latent,) = node.JointLatent().make(64, 48, 9, 2, 3)
    assert latent["samples"].shape == (3, 16, 2 * 3, 6, 8)
    samples = {"samples": torch.arange(12.0).view(1, 1, 12, 1, 1), "batch_index": [0]}
    rgb, depth = node.JointSplit().split(samples, 3, 2)
    assert rgb["samples"].flatten().tolist() == [0, 1, 2, 3] and depth["samples"].flatten().tolist() == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="does not hold 2 streams"):
        node.split_latent(torch.zeros(1, 16, 5, 2, 2), 2)


def test_decoding_gives_pictures_and_a_mask(node) -> None:
    class Vae:
        def decode(self, latent: Tensor) -> Tensor:  # [B, C, F, h, w] → [B, F, H, W, 3]
            return latent.mean(1)[..., None].expand(-1, -1, -1, -1, 3)

    latent = torch.cat([torch.full((1, 16, 2, 4, 4), 0.25), torch.full((1, 16, 2, 4, 4), 0.75)], dim=2)
    rgb, mask, companion = node.JointDecode().decode({"samples": latent}, Vae(), 2, False)
    assert rgb.shape == companion.shape == (2, 4, 4, 3) and mask.shape == (2, 4, 4)
    assert math.isclose(rgb.mean(), 0.25) and math.isclose(mask.mean(), 0.75)
    turned = node.JointDecode().decode({"samples": latent}, Vae(), 2, True)[1]
    assert math.isclose(turned.mean(), 0.25)


def test_the_file_stands_alone_and_its_nodes_are_whole(node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = {
        name.split(".")[0]
        for part in ast.walk(ast.parse(FILE.read_text()))
        for name in (
            [alias.name for alias in part.names]
            if isinstance(part, ast.Import)
            else [part.module] if isinstance(part, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= {"__future__", "json", "collections", "dataclasses", "pathlib", "typing", "torch", "safetensors",
                        "folder_paths"}  # fmt: skip
    model = trained(2)
    file = stored(model, tmp_path / "a.safetensors")
    folders = types.ModuleType("folder_paths")
    folders.get_filename_list = lambda kind: ["a.safetensors"] if kind == "loras" else []
    folders.get_full_path_or_raise = lambda kind, name: str(file)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    assert set(node.NODE_CLASS_MAPPINGS) == set(node.NODE_DISPLAY_NAME_MAPPINGS)
    for cls in node.NODE_CLASS_MAPPINGS.values():
        names = set(cls.INPUT_TYPES()["required"])
        function = getattr(cls, cls.FUNCTION)
        assert names == set(function.__code__.co_varnames[1 : function.__code__.co_argcount])
        assert isinstance(cls.RETURN_TYPES, tuple) and cls.CATEGORY
    wanted, given = ours(model)
    (patched,) = node.JointAdapter().load(comfy(model), "a.safetensors", 1.0)
    assert (patched.run(*given) - wanted).abs().max() < 2e-5
