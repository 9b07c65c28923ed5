"""The model card: a gallery, programs that save a video, measures in words, and the licence of the base."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.publishing.test_report import write_run
from tests.support.saves import BASE, TERMS, save_adapter
from transpixeler import api, cli
from transpixeler.config import loading
from transpixeler.config.sections import ObjectiveConfig
from transpixeler.models.family import APACHE, Family, License, families, find_family
from transpixeler.publishing import card_facts, card_use, hub
from transpixeler.publishing.licenses import license_of
from transpixeler.publishing.words import MEASURES, in_words


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("card") / "flames")
    save_adapter(folder / "step30")
    return folder


def card_of(source: Path, terms: hub.Terms = TERMS) -> str:
    text = hub.pack(str(source), terms).files["README.md"]
    assert isinstance(text, bytes)
    return text.decode()


def head(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def programs(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("streams", [1, 2])
def test_a_card_names_its_base_as_an_adapters(streams: int, tmp_path: Path) -> None:
    said = head(card_of(save_adapter(tmp_path / "step30", streams=streams)))
    assert (said["base_model"], said["base_model_relation"]) == (BASE, "adapter")


def test_an_unknown_base_is_told_before_it_is_sent(run: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ["push", str(run), "--repo", "me/flames", "--dry-run"]
    assert cli.main(asked) == 0
    assert "names no base_model" in capsys.readouterr().out
    assert cli.main([*asked, "--base", BASE]) == 0
    assert "names no base_model" not in capsys.readouterr().out


def test_the_gallery_shows_what_has_alpha_over_a_background(tmp_path: Path) -> None:
    run = write_run(tmp_path / "flames")
    save_adapter(run / "step30")
    for folder in run.glob("samples/*/*"):
        (folder / "checkerboard.mp4").unlink()
    facts = run / "samples/step00000030/001/sample.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"prompt": "a: [b] # c\n- d"}))
    card = card_of(run)
    assert head(card)["widget"] == [
        {"text": "a star, 000", "output": {"url": "samples/000/rgb.mp4"}},
        {"text": "a: [b] # c - d", "output": {"url": "samples/001/rgb.mp4"}},
    ]
    shutil.rmtree(run / "samples")
    assert "widget" not in head(card_of(run)) and "<Gallery" not in card_of(run)


def test_a_matte_of_a_given_video_is_told_from_a_pair_of_a_caption(tmp_path: Path) -> None:
    run = write_run(tmp_path / "flames")
    config = save_adapter(run / "step30") / "config.yaml"
    assert "--rgb clip.mp4" not in card_of(run)
    tasks = ObjectiveConfig(tasks={"joint": 0.8, "rgb_to_aux": 0.2})
    config.write_text(loading.dump(dataclasses.replace(loading.load(config), objective=tasks)))
    facts = run / "samples/step00000030/001/sample.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"given": ["rgb"]}))
    card = card_of(run)
    assert [one["text"] for one in head(card)["widget"]] == ["a star, 000", "a star, 001, given rgb"]
    assert "> a star, 001, given rgb\n" in card and "> a star, 000\n" in card
    assert "It was trained for this, too: `--rgb clip.mp4` makes the other streams of a given video." in card


def test_the_programs_save_a_video_of_the_samples_size(run: Path, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    save_adapter(plain / "step30", streams=1)
    shell, ours = programs(card_of(run), "sh")[0], programs(card_of(run), "python")[0]
    assert "pip install" in shell and "--size 48x32x5" in shell and "--format mov" in shell
    assert '"a star, 000", size=(48, 32, 5), formats=("mov",), out="samples"' in ours
    _, theirs = programs(card_of(plain), "python")
    assert 'pipe("a star, 000", width=48, height=32, num_frames=5).frames[0]' in theirs
    assert 'export_to_video(frames, "video.mp4", fps=16)' in theirs
    for program in (ours, theirs):
        compile(program, "card", "exec")


def test_our_program_runs_as_it_stands(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict = {}

    class Made:
        folder, rgba = tmp_path, type("Frames", (), {"shape": ()})

    class Loaded:
        def sample(self, prompt: str, **settings: object) -> list[Made]:
            asked.update(settings, prompt=prompt)
            return [Made()]

    monkeypatch.setattr(api, "load", lambda *words: asked.update(words=words) or Loaded())
    exec(programs(card_of(run), "python")[0], {})
    assert asked["words"] == ("me/flames", f"model.path={BASE}") and asked["size"] == (48, 32, 5)


def test_a_prompt_that_could_act_is_in_no_program(tmp_path: Path) -> None:
    run = write_run(tmp_path / "flames")
    save_adapter(run / "step30")
    for facts in run.glob("samples/*/*/sample.json"):
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"prompt": 'a" ; rm -rf $HOME `x`'}))
    for program in (*programs(card_of(run), "sh"), *programs(card_of(run), "python")):
        assert "rm -rf" not in program and '"…"' in program


def test_the_node_goes_with_a_joint_adapter_and_no_other(run: Path, tmp_path: Path, monkeypatch) -> None:
    parcel = hub.pack(str(run), TERMS)
    nodes = {path: file for path, file in parcel.files.items() if path.startswith(card_use.NODE_FOLDER)}
    folder = f"{card_use.NODE_FOLDER}/transpixeler"
    assert f"]({folder}/README.md)" in card_of(run) and {Path(path).suffix for path in nodes} == {".py", ".md", ".json"}
    assert "Joint Adapter" in Path(str(nodes[f"{folder}/nodes.py"])).read_text()
    plain = hub.pack(str(save_adapter(tmp_path / "step30", streams=1)), TERMS)
    assert not [path for path in plain.files if path.startswith(card_use.NODE_FOLDER)]
    monkeypatch.setattr(card_facts, "NODES", tmp_path / "none")
    assert "the streams need the custom nodes" in card_of(run)


def test_measures_are_told_in_words(run: Path) -> None:
    card = card_of(run)
    assert "|  | held | prompts |\n|---|---|---|\n| held-out loss of rgb | 1.0500 |  |" in card
    assert "| IoU ↑, overlap at one half | 0.8 |  |" in card
    assert "| flicker ↓, comes and goes | 0.01 | 0.02 |" in card
    assert in_words("of_tomorrow") == "of tomorrow"
    assert in_words("score_caption") == "caption score ↑, cosine of all streams with the caption"
    assert in_words("score_seg") == "seg score ↑, cosine of seg with RGB"


def test_every_measure_that_has_words_is_made() -> None:
    from transpixeler.evaluation import metrics

    made = {name for name in vars(metrics) if callable(getattr(metrics, name)) and not name.startswith("_")}
    assert set(MEASURES) - made == {"vae_psnr", "score_caption"}


# --- the licence -----------------------------------------------------------------------------------------------------


def test_each_family_says_under_which_licence_it_was_published() -> None:
    for family in families():
        assert re.fullmatch(r"[a-z0-9.-]+", family.license.id)
        assert family.license.id != "other" or family.license.link.startswith("https://")


@pytest.fixture(scope="module")
def flux() -> Family:
    return find_family("flux")


def test_the_licence_is_what_the_bases_own_folder_says(flux: Family, tmp_path: Path) -> None:
    dev = flux.license
    assert license_of(str(tmp_path), "", flux) == dev and dev.id == "other"
    assert license_of("", "black-forest-labs/FLUX.1-schnell", flux) == APACHE
    (tmp_path / "LICENSE").write_text("\n   Apache License\n   Version 2.0\n")
    assert license_of(str(tmp_path), "", flux) == APACHE
    (tmp_path / "LICENSE").write_text("Lab <b>Licence</b> 1.0\n…")
    assert license_of(str(tmp_path), "", flux) == License("other", "Lab bLicenceb 1.0")
    said = "---\nlicense: other\nlicense_name: lab-1\nlicense_link: LICENSE.md\n---\n# a model"
    (tmp_path / "README.md").write_text(said)
    link = "https://huggingface.co/lab/model/blob/main/LICENSE.md"
    assert license_of(str(tmp_path), "lab/model", flux) == License("other", "lab-1", link)
    assert license_of(str(tmp_path), "", flux) == License("other", "lab-1")


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [a\n---\n",
        "---\nlicense: 'x](https://evil.example)'\n---\n",
        "---\n- license\n---\n",
        "license: mit",
        "---\na: &a [*a]\nlicense: mit\n---\n",
    ],
)
def test_a_bases_card_that_says_nothing_usable_is_passed_over(card: str, flux: Family, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path), "", flux) == flux.license


def test_the_card_is_under_the_bases_licence_unless_another_is_named(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: openrail\n---\n")
    save = save_adapter(tmp_path / "step30", base=str(base))
    assert head(card_of(save))["license"] == "openrail"
    assert "Base: `openrail`. This adapter is under the same." in card_of(save)
    other = card_of(save, dataclasses.replace(TERMS, license="mit"))
    assert head(other)["license"] == "mit" and "Base: `openrail`. This adapter: `mit`." in other
