"""HunyuanVideo's two image-to-video models: diffusers' class, pipeline and text encoder agree, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

from tests.families.conformance.test_costs import counted
from tests.families.hunyuan.pipeline import FORMS, TINY, published, write_pipeline
from tests.support.families.cases import inputs
from tests.support.models import move
from transpixeler.config.sections import Config, ModelConfig, SampleConfig, UserError
from transpixeler.data.given import digest_of
from transpixeler.data.loader import padded_fields
from transpixeler.data.prompts import GivenFiles, Prompt
from transpixeler.families.hunyuan.config import EVERY, HunyuanConfig
from transpixeler.families.hunyuan.family import FAMILY, HunyuanFolder
from transpixeler.families.hunyuan.model import HunyuanEmbed, HunyuanModel
from transpixeler.families.hunyuan.names import NAMES, config_from_shapes
from transpixeler.flow.solver import start_noise
from transpixeler.models.costs import Costs, forward_flops
from transpixeler.models.family import open_model
from transpixeler.models.names import pieces
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.requests import Maker, list_requests, seen_pictures
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.texts import PromptTexts

CPU = torch.device("cpu")
CELLS = (3, 4, 6)
PIXELS = (9, 64, 96)
PROMPT = "a red circle before a wall of grey bricks"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {form: tmp_path_factory.mktemp(form) / "pipeline" for form in FORMS}
    for form, folder in found.items():
        write_pipeline(folder, form)
    return found


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*PIXELS[1:], 3), dtype=np.uint8)


knows_our_tokenizer = pytest.mark.skipif(
    Version(version("diffusers")) < Version("0.42"), reason="this pipeline wants a line break that the tiny one has not"
)

# --- the text encoder ------------------------------------------------------------------------------------------------


@knows_our_tokenizer
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_caption_beside_a_picture_is_the_pipelines(form: str, folders: dict[str, Path]) -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import HunyuanVideoImageToVideoPipeline
    from PIL import Image

    pipeline: Any = HunyuanVideoImageToVideoPipeline.from_pretrained(folders[form])
    ours: Any = HunyuanFolder(str(folders[form])).load_text_encoder(device=CPU, dtype=torch.float32)
    for text, shown in ((PROMPT, picture()), ("", None), ("many words " * 60, picture(1))):
        image = Image.fromarray(picture() * 0 if shown is None else shown)
        rows, pooled, mask = pipeline.encode_prompt(image, text, image_embed_interleave=EVERY[form])
        (found,) = ours.encode_beside([text], [None if shown is None else torch.from_numpy(shown)])
        length = int(mask[0].sum())
        assert len(found["text"]) == length and mask[0, :length].all()
        torch.testing.assert_close(found["text"], rows[0, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["pooled"], pooled[0], atol=1e-6, rtol=1e-6)


# --- the transformer -------------------------------------------------------------------------------------------------


def ours_of(form: str, theirs: Any, streams: tuple[str, ...] = ("rgb",), **options: Any) -> HunyuanModel:
    """Return our model with the weights of diffusers' class."""
    model = HunyuanModel(HunyuanConfig.read(TINY | FORMS[form]), streams=streams, **options)
    stored = theirs.state_dict()
    with torch.no_grad():
        for name, there in NAMES.internal_names(stored).items():
            parts = [(stored[part.name], part) for part in pieces(there)]
            model.get_parameter(name).copy_(torch.cat([value[part.rows(len(value))] for value, part in parts]))
    return model


def inputs_of(model: HunyuanModel, layout: StreamLayout, form: str) -> list[Tensor]:
    """Draw latents, times with given first frames at 0, masked text of two lengths, pooled text and what is shown."""
    given = list(inputs(model, layout))
    if form == "token_replace":
        given[1][:, 0] = 0
    else:
        width, count = model.fields[-1].width, layout.elements // layout.shapes[0][0]
        given[-1] = torch.randn(2, width * count, generator=torch.Generator().manual_seed(4))
    return given


def layout_for(form: str, streams: tuple[str, ...] = ("rgb",)) -> StreamLayout:
    layout = StreamLayout.equal(streams, (4, *CELLS), (1, 2, 2))
    return layout.cut([[1], *([] for _ in streams[1:])]) if form == "token_replace" else layout


def theirs_run(published: Any, given: list[Tensor], layout: StreamLayout) -> Tensor:
    """Return the velocity of diffusers' class, [B, C, F, H, W]."""
    x, times, text, lengths, pooled, *shown = given
    latents = layout.unpack(x)[0]
    for part in shown:  # which it wants behind the latents, with the mask last
        latents = torch.cat([latents, part.view(2, -1, *CELLS)[:, 1:], part.view(2, -1, *CELLS)[:, :1]], dim=1)
    return published(
        hidden_states=latents,
        timestep=1000 * times[:, -1],
        encoder_hidden_states=text,
        encoder_attention_mask=(torch.arange(text.shape[1]) < lengths[:, None]).float(),
        pooled_projections=pooled,
        guidance=torch.full((len(x),), 6000.0) if published.config.guidance_embeds else None,
        return_dict=False,
    )[0]


def both(form: str, change: Callable[[list[Tensor]], None] = lambda given: None) -> tuple[Any, Any, Tensor, Tensor]:
    """Return both models and their velocities where something is made; `change` is done to what ours takes first."""
    theirs = published(**FORMS[form])
    model, layout = ours_of(form, theirs), layout_for(form)
    given = inputs_of(model, layout, form)
    expected = theirs_run(theirs, given, layout)
    change(given)
    found = layout.unpack(model(*given, layout=layout))[0]
    made = slice(1, None) if form == "token_replace" else slice(None)  # of what is given nothing is asked
    return theirs, model, expected[:, :, made], found[:, :, made]


@pytest.mark.parametrize("form", FORMS)
def test_it_equals_diffusers_forward_and_gradients(form: str) -> None:
    theirs, model, expected, found = both(form)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    there = hunyuan_gradients(theirs, model)
    assert len(there) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        here, scale = parameter.grad, float(there[name].abs().max())
        assert here is not None and scale > 0, name
        torch.testing.assert_close(here, there[name], atol=1e-5 * scale + 1e-6, rtol=1e-4, msg=name)


def hunyuan_gradients(theirs: Any, model: HunyuanModel) -> dict[str, Tensor]:
    """Return the gradients of diffusers' class under our names."""
    stored = {name: p.grad for name, p in theirs.named_parameters()}
    parts = {name: pieces(there) for name, there in NAMES.internal_names(stored).items()}
    return {
        name: torch.cat([stored[one.name][one.rows(len(stored[one.name]))] for one in some])
        for name, some in parts.items()
    }


def _mask_first(given: list[Tensor]) -> None:
    given[-1] = given[-1].view(2, 5, -1).roll(1, 1).flatten(1)


def _time_of_the_rest(given: list[Tensor]) -> None:
    given[1][:, 0] = given[1][:, 1]


def _no_mask(given: list[Tensor]) -> None:
    given[3] = torch.full_like(given[3], given[2].shape[1])


BROKEN = [("latent_concat", _mask_first), ("token_replace", _time_of_the_rest), *((form, _no_mask) for form in FORMS)]


@pytest.mark.parametrize(("form", "change"), BROKEN)
@torch.no_grad()
def test_a_broken_twin_is_caught(form: str, change: Callable[[list[Tensor]], None]) -> None:
    *_, expected, found = both(form, change)
    assert (found - expected).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_given_is_told_of_no_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HunyuanEmbed, "guided", lambda self, times, guidance: guidance)
    *_, expected, found = both("token_replace")
    assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("form", "count"), [("latent_concat", 12_810_991_680), ("token_replace", 12_821_012_544)])
def test_the_published_models_have_the_parameters_of_diffusers_class(form: str, count: int) -> None:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    shape = {"latent_concat": "13b-i2v-33ch", "token_replace": "13b-i2v"}[form]
    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel(**FAMILY.shapes[shape])
        config = HunyuanConfig.read({**theirs.config})
        model = HunyuanModel(config, streams=("rgb",))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) == count
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    told = config_from_shapes(shapes)["image_condition_type"]
    assert told == (form if form == "latent_concat" else None), "replacing tokens changes no shape"
    stored = [p.name for n in shapes for p in pieces(NAMES.parameter(n, source="internal", to="diffusers"))]
    assert set(stored) == set(theirs.state_dict())
    assert [field.length for field in model.fields[:1]] == [{"latent_concat": 540, "token_replace": 396}[form]]


# --- the sampler -----------------------------------------------------------------------------------------------------


def sampled(folder: Path, image: Path | None, **sample: Any) -> tuple[StreamLayout, Tensor]:
    """Return the latents that our session makes of a prompt, from an image where one is given."""
    config = Config(
        model=ModelConfig(path=str(folder)),
        streams={"rgb": ""},
        lora=replace(Config().lora, enabled=False),
        sample=SampleConfig(size=(PIXELS[2], PIXELS[1], PIXELS[0]), steps=4, guidance=1, shift="auto", **sample),
        data=replace(Config().data, fps=24.0),
    )
    model = HunyuanFolder(str(folder))
    given = GivenFiles(image=str(image)) if image else GivenFiles()
    requests = list_requests(config, [Prompt(PROMPT)], model, given=given)
    # in fp32, where a session rounds to the cache's bf16
    encoder: Any = model.load_text_encoder(device=CPU, dtype=torch.float32)
    ((_, picture),) = seen_pictures(config, requests, model) or [("", None)]
    (found,) = encoder.encode_beside([PROMPT], [None if picture is None else torch.from_numpy(picture)])
    fields = padded_fields(found, model.fields)
    texts = PromptTexts({PROMPT: fields}, None, {(PROMPT, digest_of(picture)): fields} if image else {})
    video = Maker(config, model, Frames(model, CPU), texts).video(requests[0])
    built = model.build(streams=("rgb",))
    load_weights(built, WeightSource(str(folder), FAMILY.internal_names))
    engine: Any = SimpleNamespace(
        config=SimpleNamespace(pipeline=1),
        mesh=SimpleNamespace(device=CPU),
        forward=lambda x, inputs, layout, batch: built(x, *inputs, layout=layout),
        remembering_rgb=lambda *args, **kwargs: nullcontext(),
    )
    return video.layout, Sampler(engine, engine.mesh, config.sample, None, model)._latents(video, lambda: None)


@knows_our_tokenizer
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_video_from_an_image_is_the_pipelines(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import HunyuanVideoImageToVideoPipeline
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "image.png")
    layout, found = sampled(folders[form], tmp_path / "image.png", scheduler="euler", seed=3)
    pipeline: Any = HunyuanVideoImageToVideoPipeline.from_pretrained(folders[form])
    pipeline.set_progress_bar_config(disable=True)
    noise = layout.unpack(start_noise(replace(layout, cuts=()), 3))[0]
    frames, height, width = PIXELS
    expected = pipeline(
        image=Image.open(tmp_path / "image.png"),
        prompt=PROMPT,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=4,
        guidance_scale=6.0,
        latents=noise,
        output_type="latent",
    ).frames
    ours = layout.unpack(found[None])[0]
    assert (ours[:, :, 1:] - expected[:, :, -ours.shape[2] + 1 :]).abs().max() < 1e-4
    if form == "token_replace":
        first = expected[:, :, :1].float()  # is given; its numbers reach 16
        assert (ours[:, :, :1] - first).abs().max() < 2e-6 * first.abs().max()
    _, blind = sampled(folders[form], None, scheduler="euler", seed=3)
    assert (layout.unpack(blind[None])[0][:, :, 1:] - ours[:, :, 1:]).abs().max() > 1e-2


@torch.no_grad()
def test_noise_without_a_trace_of_the_image_is_seen(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "image.png")
    _, traced = sampled(folders["token_replace"], tmp_path / "image.png", scheduler="euler")
    monkeypatch.setattr(HunyuanFolder, "image_trace", 0.0)
    _, plain = sampled(folders["token_replace"], tmp_path / "image.png", scheduler="euler")
    assert (plain - traced).abs().max() > 3e-4


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_an_original_file_is_the_same_model(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    theirs = HunyuanFolder(str(folders[form]))
    source = WeightSource(theirs.path, NAMES.internal_names)
    spelled = {
        NAMES.parameter(n, source="internal", to="original"): source.read(n).contiguous() for n in source.names()
    }
    save_file(spelled, tmp_path / "model.safetensors")
    ours = open_model(ModelConfig(path=str(tmp_path / "model.safetensors"), encoders=str(folders[form])))
    assert ours.fields == theirs.fields and ours.image_trace == theirs.image_trace == 0.001
    known = {key: theirs.diffusers_config()[key] for key in ("image_condition_type", "in_channels", "guidance_embeds")}
    assert {key: ours.diffusers_config()[key] for key in known} == known
    models = [one.build(streams=("rgb",)) for one in (ours, theirs)]
    for one, model in zip((ours, theirs), models):
        load_weights(model, WeightSource(one.path, one.family.internal_names))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_text_encoders_that_see_nothing_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for part in ("text_encoder", "text_encoder_2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text('{"model_type": "llama"}')
    model = open_model(ModelConfig(path=str(folders["token_replace"] / "transformer"), encoders=str(tmp_path)))
    with pytest.raises(
        UserError, match=r"text_encoder is llama, which sees no picture.*model\.encoders.*HunyuanVideo-I2V"
    ):
        model.load_text_encoder(device=CPU, dtype=torch.float32)


# --- what a form can break -------------------------------------------------------------------------------------------


def shaped(form: str, *streams: str, **options: Any) -> HunyuanModel:
    """Build a tiny model, every parameter moved."""
    model = HunyuanModel(HunyuanConfig.read(TINY | FORMS[form]), streams=streams, **options)
    move(model, seed=0)
    return model


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_alike_streams_without_embeddings_are_the_bases(form: str) -> None:
    model, single = shaped(form, "rgb", "seg"), shaped(form, "rgb")
    torch.nn.init.zeros_(model.embed.stream_embedding["seg"])
    single.load_state_dict({name: value for name, value in model.state_dict().items() if "stream" not in name})
    one = StreamLayout.equal(("rgb",), (4, *CELLS), (1, 2, 2)).cut([[1]])
    x, times, *others = inputs_of(single, one, form)
    times[:, 0] = 0
    base = single(x, times, *others, layout=one)
    both = StreamLayout.equal(("rgb", "seg"), (4, *CELLS), (1, 2, 2)).cut([[1], [1]])
    shown = [other.repeat(1, 2) for other in others[3:]]
    found = model(x.repeat(1, 2), times.repeat(1, 2), *others[:3], *shown, layout=both)
    torch.testing.assert_close(found, base.repeat(1, 2), atol=1e-5, rtol=1e-5)
    if form == "latent_concat":
        blank = torch.cat([*others[3:], 0 * others[3]], dim=1)
        moved = model(x.repeat(1, 2), times.repeat(1, 2), *others[:3], blank, layout=both)
        assert (moved - found).abs().max() > 1e-2, "what a companion is shown is its own"


@pytest.mark.parametrize("form", FORMS)
def test_two_stages_equal_the_whole_bit_for_bit(form: str) -> None:
    whole, first, last = (shaped(form, "rgb", "seg") for _ in range(3))
    first.keep(embed=True, blocks=[0, 1], head=False)
    last.keep(embed=False, blocks=[2, 3], head=True)
    layout = layout_for(form, ("rgb", "seg"))
    given = inputs_of(whole, layout, form)
    expected = whole(*given, layout=layout)
    flow = first(*given, layout=layout)
    for part, meta in zip(flow, whole.flow_meta(layout, 2, torch.float32), strict=True):
        assert (part.shape, part.dtype) == (meta.shape, meta.dtype)
    found = last(*flow, layout=layout)
    assert torch.equal(found, expected)
    for value in (found, expected):
        value.square().sum().backward()
    grads = {name: p.grad for model in (first, last) for name, p in model.named_parameters()}
    assert all(torch.equal(grads[name], p.grad) for name, p in whole.named_parameters())


@pytest.mark.parametrize("form", FORMS)
def test_the_forward_pass_is_what_torch_counts(form: str) -> None:
    model, layout = shaped(form, "rgb"), StreamLayout.equal(("rgb",), (4, 4, 16, 16), (1, 2, 2))
    x, times, text, _, pooled, *_ = inputs(model, layout, batch=1, full=True)
    shown = [torch.randn(1, 5 * 4 * 16 * 16)] * (form == "latent_concat")
    given = [x, times, text, torch.tensor([text.shape[1]]), pooled, *shown]
    total = forward_flops(Costs.of(model), layout.lengths).total
    assert total == pytest.approx(counted(model, layout, given), rel=0.01)
