"""The page shows what is wrong with a data set, and it works in a browser."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import chromium, needs_browser
from transpixeler import cli
from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data.features.needs import Needs
from transpixeler.data.media.write import write_mp4, write_png, write_webm_alpha
from transpixeler.models.geometry import USUAL
from transpixeler.publishing import dataset
from transpixeler.publishing.dataset import inspect_dataset
from transpixeler.publishing.inspection import FLAGS, Inspection

STREAMS = {"rgb": "", "seg": "_seg"}
NEEDS = Needs(USUAL, {"rgb": 1, "seg": 1})
DATA = DataConfig(resolutions=((96, 64),), frames=(1, 5), fill="black")


def film(kind: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A disc that moves over what lies hidden, and its matte with one fault."""
    y, x = np.mgrid[:64, :96]
    pictures, mattes = [], []
    for i in range(9):
        disc = np.hypot(y - 32, x - 20 - 6 * i) < 16
        hidden = np.dstack([x * 2, y * 3, 128 + 0 * x]) if kind == "hidden color" else np.zeros((64, 96, 3))
        pictures.append(np.where(disc[..., None], (220, 120, 40), hidden).astype(np.uint8))
        disc = np.hypot(y - 32, x - 48) < 16 if kind == "static alpha" else disc
        matte = {"blank alpha": 0 * disc, "all opaque": 0 * disc + 1}.get(kind, disc)[..., None].repeat(3, 2) * 255
        mattes.append((matte * (1.0, 0.3, 0.1) if kind == "colored alpha" else matte).astype(np.uint8))
    return pictures, mattes


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    root = tmp_path_factory.mktemp("inspect")
    folder = root / "set"
    for kind in ("fine", *FLAGS):
        for suffix, frames in zip(("", "_seg"), film(kind)):
            write_mp4(folder / f"{kind}{suffix}.mp4", frames, fps=Fraction(16))
        (folder / f"{kind}.txt").write_text(f"A <b>disc</b> & a matte: {kind}")
    for name in ("still", "still_seg"):
        Image.fromarray(film("fine")[name.endswith("seg")][3]).save(folder / f"{name}.png")
    (folder / "still.txt").write_text("an image")
    (folder / "lonely.mp4").write_bytes((folder / "fine.mp4").read_bytes())
    data = (folder / "fine.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data)
    (folder / "cut_seg.mp4").write_bytes(data[:900])
    (folder / "cut.txt").write_text("cut short")
    sources = [SourceConfig(str(folder))]
    return inspect_dataset(sources, root / "out" / "page.html", streams=STREAMS, data=DATA, needs=NEEDS, seed=0)


def test_each_flag_is_raised_where_it_belongs_and_nowhere_else(report: Inspection) -> None:
    articles = re.findall(r'data-flags="([^"]*)".*?<h3>set/([^<]*)', report.page.read_text())
    expected = {kind: kind for kind in FLAGS} | {"fine": "", "still": ""}
    for kind in ("blank alpha", "static alpha"):  # where the matte misses the disc, the disc is what it hides
        expected[kind] += "|hidden color"
    assert {name: flags for flags, name in articles} == expected
    assert dict(report.flags) == dict.fromkeys(FLAGS, 1) | {"hidden color": 3}


def test_every_problem_is_in_the_report_and_on_the_page(report: Inspection) -> None:
    told = {bad.id: bad.reason for bad in report.bad}
    assert set(told) == {"set/lonely", "set/cut"} and told["set/lonely"] == "no seg file lonely_seg.*"
    page, text = report.page.read_text(), "\n".join(report.lines())
    for reason in told.values():
        assert reason in text and reason in page
    assert report.samples == 7 and [(str(bucket), count) for bucket, count in report.buckets] == [
        ("96×64×5", 6),
        ("96×64×1", 1),
    ]


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_from_captions(report: Inspection) -> None:
    page = report.page.read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|<link|@import|url\(", page)
    assert "A &lt;b&gt;disc&lt;/b&gt; &amp; a matte" in page and "<b>disc" not in page


def test_an_rgba_source_is_shown_with_both_streams(tmp_path: Path) -> None:
    pictures, mattes = film("fine")
    frames = [np.dstack([picture, matte[..., :1]]) for picture, matte in zip(pictures, mattes)]
    write_webm_alpha(tmp_path / "set" / "a.webm", frames, fps=Fraction(16))
    (tmp_path / "set" / "a.txt").write_text("a disc")
    source = SourceConfig(str(tmp_path / "set"), rgba=True)
    report = inspect_dataset([source], tmp_path / "page.html", streams=STREAMS, data=DATA, needs=NEEDS, seed=0)
    assert report.samples == 1 and not any(count for _, count in report.flags)
    assert "figcaption>cut out<" in report.page.read_text()


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight pairs of one picture each."""
    folder = tmp_path_factory.mktemp("stills") / "set"
    for number in range(8):
        for suffix in STREAMS.values():
            write_png(folder / f"{number}{suffix}.png", np.full((64, 64, 3), 20 * number, np.uint8))
        (folder / f"{number}.txt").write_text("a still")
    return folder


def test_what_lies_beside_the_samples_and_how_sequences_are_taken_is_told(tmp_path: Path, capsys) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for number, (rgb, matte) in enumerate(zip(*film("fine"))):
        Image.fromarray(rgb).save(root / f"fire.{number}.png")
        Image.fromarray(matte).save(root / f"fire_seg.{number}.png")
    for name in ("plate.psd", "b.psd", "comp.nk"):
        (root / name).write_bytes(b"x")
    (root / "fire.TXT").write_text("fire")
    words = [f"--out={tmp_path / 'page.html'}", "data.resolutions=[64]", "data.frames=[1,9]", "data.sequence_fps=16"]
    assert cli.main(["inspect", str(root), *words]) == 0
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "18 × numbered image without a caption of its own, a frame of one clip" in said
    assert "2 × file of a kind that is not read: *.psd" in said
    assert "1 × file of a kind that is not read: *.nk" in said
    assert "1 × image sequence, taken at 16 fps" in said
    assert "file of a kind that is not read: *.psd" in page and "<summary>Notes" in page


def test_clips_are_counted_as_the_config_s_seed_deals_them(
    stills: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["data.sizes=[[64,64,1],[32,32,1]]", "data.buckets=[{size: [64,64,1], keep: 0.5}]"]
    counts = set()
    for seed in range(6):
        assert cli.main(["inspect", str(stills), *words, f"seed={seed}", "--out", str(tmp_path / "page.html")]) == 0
        counts.add(tuple(re.findall(r"×1: (\d+)", capsys.readouterr().out)))
    assert len(counts) > 1 and all(sum(map(int, found)) == 8 for found in counts)


def test_data_of_which_nothing_can_be_used_are_the_users_to_mend(
    stills: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.yaml").write_text("seed: 1\n")
    words = ["--out", str(tmp_path / "page.html")]
    assert cli.main(["inspect", str(tmp_path / "empty"), "streams.alpha=_a", *words]) == 2
    assert "expected NAME.mp4, NAME_seg.mp4, NAME_a.mp4 and NAME.txt in a folder" in capsys.readouterr().out
    assert cli.main(["inspect", str(stills), "data.frames=[33]", *words]) == 2
    said = capsys.readouterr().out
    assert "8 samples can be used" in said and "0 clips in 0 buckets" in said and "expected" not in said
    assert "no clip fits: data.resolutions and data.frames say which" in said
    page = (tmp_path / "page.html").read_text()
    assert "No clip fits: data.resolutions" in page and "<details open><summary>Clips dropped" in page
    assert cli.main(["inspect", str(tmp_path / "none.yaml"), *words]) == 2
    assert "none.yaml names no data" in capsys.readouterr().err


def test_a_page_goes_into_a_folder_and_a_place_that_takes_none_is_told_before_the_work(
    stills: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["inspect", str(stills), "data.resolutions=[64]", "--out"]
    assert cli.main([*words, str(tmp_path)]) == 0
    assert (tmp_path / "inspect.html").stat().st_size > 1000
    assert cli.main([*words, str(tmp_path / "new/folder/page.html")]) == 0
    assert (tmp_path / "new/folder/page.html").is_file()
    monkeypatch.setattr(dataset, "survey", None)
    for place in (tmp_path / "inspect.html/page.html", tmp_path / ("x" * 300), Path("/proc/page.html")):
        assert cli.main([*words, str(place)]) == 2
        assert f"--out: {place} cannot be written" in capsys.readouterr().err


@needs_browser
def test_a_browser_shows_the_page_and_filters_it(report: Inspection) -> None:
    shot = report.page.with_name("page.png")
    chromium(report.page, f"--screenshot={shot}", "--window-size=1280,1600")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    orange = (np.abs(pixels - (220, 120, 40)).max(axis=2) < 20).sum()
    assert orange > 3000, "the discs are not to be seen"
    clicking = report.page.with_name("click.html")
    click = "<script>document.querySelector('[data-flag=\"blank alpha\"]').click()</script>"
    clicking.write_text(report.page.read_text() + click)
    dom = chromium(clicking, "--dump-dom")
    assert "1 of 7 shown" in dom and len(re.findall(r"<article[^>]* hidden(?=[ >=])", dom)) == 6
