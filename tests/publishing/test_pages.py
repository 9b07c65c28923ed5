"""What the pages of runs, samples and data sets have in common: a player, a comparison, and a page that keeps up."""

from __future__ import annotations

import json
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.publishing.test_report import write_run
from tests.support.browser import CHROMIUM, browse, needs_browser
from transpixeler import cli
from transpixeler.publishing import compare, page, report, sheet_page
from transpixeler.runs import lock
from transpixeler.sampling.files import histogram, write_sample
from transpixeler.training.live_page import LivePage

COLOR, GHOST = (200, 40, 40), (40, 40, 200)  # of a shape, and of what lies hidden around it
HEIGHT, WIDTH = 32, 48


def square(frame: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its matte: solid from the frame's number of pixels on, half clear in a band of 8 pixels."""
    left, band = 8 + frame, 8
    alpha = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    alpha[8:24, left : left + band] = 128
    alpha[8:24, left + band : left + 2 * band] = 255
    return np.where(alpha > 0, COLOR, GHOST).astype(np.uint8), alpha


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of which every pixel is known."""
    pictures, mattes = zip(*map(square, range(5)))
    folder = tmp_path_factory.mktemp("made") / "000"
    streams = {"rgb": np.stack(pictures), "seg": np.stack(mattes)}
    facts = {"prompt": "a <b>square</b>", "seed": 3, "steps": 50, "scheduler": "a name that is long for a phone"}
    write_sample(folder, streams, fps=Fraction(8), formats=("checkerboard",), alpha_mode="straight", facts=facts)
    return folder


# --- the player ------------------------------------------------------------------------------------------------------

OPENED = """
  const open = async button => {
    button.click();
    const draw = player.draw.bind(player);
    player.draws = 0;
    player.draw = () => { draw(); player.draws++; };
    await drawn(() => player.seek(0));
  };
  const arrived = ({ shows, picture }) => picture || Math.round(shows * player.clip.fps) === player.frame;
  const drawn = async act => {
    const before = player.draws;
    act();
    await until(() => player.draws > before && player.media.every(arrived) || !player.note.hidden);
  };
  const paint = () => player.screen.getContext("2d");
  const at = (x, y) => [...paint().getImageData(x, y, 1, 1).data].slice(0, 3);
  const pixels_at = (...places) => places.map(x => at(x, x === 2 ? 2 : 16));
  const press = key => drawn(() => player.node.dispatchEvent(new KeyboardEvent("keydown", { key })));
  const frame = () => player.count.textContent;
"""
LOOK = f"""{OPENED}
  const facts = {{}};
  await open(one("button.open"));
  for (const ground of ["black", "white", "checker", "plate", "black"]) {{
    await drawn(() => player.set({{ ground }}));
    facts[ground] = pixels_at(2, 12, 20);
  }}
  for (const view of player.options) {{
    await drawn(() => player.set({{ view }}));
    facts[view] = pixels_at(2, 12, 20);
  }}
  facts.options = player.options; facts.plateColor = player.plateColor;
  await drawn(() => player.set({{ view: "alpha" }}));
  facts.frames = [frame()];
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight"]) {{
    await press(key);
    facts.frames.push(frame());
  }}
  for (let i = 0; i < 3; i++) await press("ArrowRight");
  facts.moved = pixels_at(9, 12, 20);
  await drawn(() => all(".player button").find(b => b.title === "One frame back").click());
  facts.back = frame();
  await press("1"); facts.view = player.view;
  await press("b"); facts.ground = player.ground;
  facts.shares = player.shares.textContent; facts.chart = player.histogram.hidden;
  facts.title = player.title.textContent; facts.note = player.note.textContent;
  facts.wide = overflowing("dialog.player");
  player.node.dispatchEvent(new KeyboardEvent("keydown", {{ key: " " }})); facts.playing = player.playing;
  player.node.close(); facts.open = player.node.open;
  return facts;
"""


def near(found: list[int], expected: tuple[float, ...], within: float = 6) -> bool:
    return all(abs(a - b) <= within for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def played(sample: Path) -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not on PATH")
    made = sheet_page.write_sheet_page(sample.parent, [sample, sample.parent / "on another disk"])
    return browse(made, LOOK)


def test_a_click_opens_a_clip_that_fits_a_phone_and_a_desk(played: dict[str, Any]) -> None:
    for width in ("w390", "w1280"):
        assert played[width]["faults"] == [] and played[width]["wide"] == [] and not played[width]["open"]
        assert played[width]["title"] == "a <b>square</b>" and played[width]["note"] == ""


def test_a_clip_is_laid_over_each_background_exactly(played: dict[str, Any]) -> None:
    seen = played["w1280"]
    half = [c / 2 for c in COLOR]
    assert near(seen["black"][0], (0, 0, 0)) and near(seen["black"][1], tuple(half)) and near(seen["black"][2], COLOR)
    assert near(seen["white"][0], (255, 255, 255)) and near(seen["white"][1], tuple(c + 127 for c in half))
    for ground in ("checker", "plate"):
        (_, mixed, solid) = seen[ground]
        assert near(solid, COLOR) and not near(mixed, tuple(half)) and not near(mixed, COLOR)


def test_alpha_colour_and_edge_have_views_of_their_own(played: dict[str, Any]) -> None:
    seen = played["w1280"]
    assert seen["options"] == ["cut", "fringe", "alpha", "rgb"]
    assert [pixel[0] for pixel in seen["alpha"]] == pytest.approx([0, 128, 255], abs=3)
    assert near(seen["rgb"][0], GHOST, within=12) and near(seen["rgb"][2], COLOR)
    assert seen["plateColor"] == "rgb(0 255 255)"  # the opposite of the edge's red
    clear, edge, solid = seen["fringe"]
    assert near(edge, tuple((c + p) / 2 for c, p in zip(COLOR, (0, 255, 255)))), "the edge over its plate, undimmed"
    assert near(clear, (0, 0x38, 0x38)) and near(solid, tuple(c * 0x38 / 255 for c in COLOR)), "all else is dimmed"


def test_keys_and_buttons_step_through_the_frames(played: dict[str, Any]) -> None:
    for seen in (played["w390"], played["w1280"]):
        assert [text.removeprefix("frame ") for text in seen["frames"]] == [
            *("1 of 5", "2 of 5", "3 of 5", "2 of 5", "5 of 5", "1 of 5")
        ]
        assert [pixel[0] for pixel in seen["moved"]] == pytest.approx([0, 128, 255], abs=3), "the matte has moved by 3"
        assert seen["back"] == "frame 3 of 5" and seen["view"] == "cut" and seen["ground"] == "white"
        assert seen["playing"]


def test_the_histogram_tells_clear_partly_and_solid(played: dict[str, Any]) -> None:
    band = 16 * 8 / (HEIGHT * WIDTH)
    clear, part = round(100 * (1 - 2 * band)), round(100 * band)
    assert played["w1280"]["shares"].startswith(f"clear {clear} % · partly {part} % · solid {part} %")
    assert not played["w1280"]["chart"]


def test_a_samples_histogram_is_in_its_facts(sample: Path) -> None:
    facts = json.loads((sample / "sample.json").read_text())
    shares = facts["alpha_histogram"]
    band = 16 * 8 / (HEIGHT * WIDTH)
    assert (
        len(shares) == 64
        and shares[32] == pytest.approx(band, rel=1e-3)
        and shares[63] == pytest.approx(band, rel=1e-3)
    )
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert histogram(np.full((2, 4, 4), 255, np.uint8)) == [0.0] * 63 + [1.0]


@needs_browser
def test_files_beside_the_page_are_played_and_those_that_are_lost_are_told(
    sample: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(page, "EMBEDDED_FILE", 10)
    folder = tmp_path / "odd #1 %41 ü"
    shutil.copytree(sample, folder / "000")
    made = sheet_page.write_sheet_page(folder, [folder / "000"])
    assert "data:video" not in made.read_text()
    look = f"""{OPENED}
      await open(one("button.open"));
      await drawn(() => player.seek(1));
      const shown = [frame(), player.note.textContent, player.shares.textContent];
      await drawn(() => player.set({{ view: "fringe" }}));
      return {{ shown, color: player.plateColor }};
    """
    seen = browse(made, look, widths=(1280,))["w1280"]
    assert seen["faults"] == [] and seen["shown"][:2] == ["frame 2 of 5", ""]
    assert "alpha of the whole clip" in seen["shown"][2], "pixels of such files cannot be read: the facts are shown"
    assert seen["color"] == "#f0f"
    (folder / "000/rgb.mp4").unlink()
    lost = browse(made, look, widths=(1280,))["w1280"]
    assert lost["faults"] == [] and "rgb: this browser does not play the file" in lost["shown"][1]


# --- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one name, of different rates and lengths."""
    root = tmp_path_factory.mktemp("several")
    first, second = write_run(root / "a/glass"), write_run(root / "b/glass", steps=12)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("seed: 5", "seed: 6", 1))
    shutil.rmtree(second / "samples/step00000030")
    return first, second


def test_runs_are_told_apart_and_only_what_differs_is_listed(runs: tuple[Path, Path], tmp_path: Path) -> None:
    data = compare.gather(runs, tmp_path / "compare.html")
    assert [run["label"] for run in data["runs"]] == ["a/glass", "b/glass"]
    assert data["differences"] == [("seed", [5, 6])]
    assert [run["state"] for run in data["runs"]] == ["done, 30 steps", "done, 12 steps"]


def test_the_command_takes_several_runs(runs: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.strip() == "compare.html" and (tmp_path / "compare.html").stat().st_size > 20_000
    assert cli.main(["report", str(runs[0]), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file() and not (runs[0] / "report.html").exists()
    assert cli.main(["report", str(runs[0]), str(runs[0])]) == 2
    assert "give each once" in capsys.readouterr().err
    assert cli.main(["report", str(runs[0]), str(tmp_path)]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err


@needs_browser
def test_samples_stand_side_by_side_and_curves_over_each_other(runs: tuple[Path, Path], tmp_path: Path) -> None:
    look = f"""{OPENED}
      const lines = all("#training .card:first-child path.curve").map(p => p.getAttribute("stroke"));
      const slider = one("#steps input"), card = one("#samples article"), seen = [];
      for (const value of [0, slider.max]) {{
        slider.value = value; slider.oninput();
        seen.push(all(".facts", card).map(f => f.textContent.split(" · ")[0]));
      }}
      await open(all("button.open", card)[4]);
      const titles = [player.title.textContent];
      player.next(1);
      titles.push(player.title.textContent);
      player.node.close();
      return {{
        lines: lines.slice(0, 2), seen, titles, wide: overflowing("body"), best: all("#last td.best").length,
        differences: one("#differences").textContent, labels: all(".side .run", card).map(p => p.textContent),
        bad: one("main").textContent.match(/NaN|undefined|Infinity/g),
      }};
    """
    made = compare.write_comparison(runs, tmp_path)
    for seen in browse(made, look).values():
        assert seen["faults"] == [] and seen["wide"] == [] and seen["bad"] is None
        assert seen["lines"] == ["var(--c0)", "var(--c1)"]
        assert seen["labels"] == ["a/glass", "b/glass"]
        assert seen["seen"] == [["step 0", "step 0"], ["step 30", "step 10"]], "each shows the newest up to the step"
        assert seen["titles"] == ["b/glass: a star, 000", "a/glass: a star, 000"]
        assert "seed56" in seen["differences"] and seen["best"] > 0


# --- while training --------------------------------------------------------------------------------------------------


def test_a_page_waits_for_its_run_and_no_longer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", samples=False)
    (run / "manifest.json").write_text(json.dumps({"steps": 100}))
    live = LivePage(run, seconds=0.001)
    live.close()
    assert not (run / "report.html").exists(), "a page that nobody asked for"
    time.sleep(0.01)
    live.if_due()
    text = (run / "report.html").read_text()
    assert '"live": 0.001' in text and "training, step 30 of 100" in text
    live.close()
    text = (run / "report.html").read_text()
    assert '"live": 0.0' in text and "stopped, step 30 of 100" in text


def test_writing_the_page_takes_next_to_no_time_of_training(tmp_path: Path, monkeypatch) -> None:
    now, written = [0.0], []
    monkeypatch.setattr("transpixeler.training.live_page.time.monotonic", lambda: now[0])

    def write(run: Path, live: float) -> None:
        now[0] += 2.0
        written.append(now[0])

    monkeypatch.setattr(report, "write_report", write)
    live = LivePage(tmp_path, seconds=30)
    while now[0] < 4000:
        now[0] += 1.0
        live.if_due()
    assert 8 <= len(written) <= 11, "two seconds of writing in four hundred, not in thirty"


def test_a_page_that_cannot_be_written_stops_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = LivePage(tmp_path / "gone", seconds=30)
    live.write()
    assert "was not written" in caplog.text and not (tmp_path / "gone").exists()


def test_the_lock_tells_whether_a_run_is_trained(tmp_path: Path) -> None:
    assert not lock.is_trained(tmp_path)
    held = lock.RunLock(tmp_path)
    assert lock.is_trained(tmp_path)
    held.release()
    assert not lock.is_trained(tmp_path)
    (tmp_path / lock.LOCK).write_text("process 1 on a machine that lost its power")
    assert not lock.is_trained(tmp_path)


@needs_browser
def test_a_page_of_a_training_reads_itself_again_and_the_reader_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    made = report.write_report(run, live=1.0)
    look = """
      const { type } = performance.getEntriesByType("navigation")[0], slider = one("#steps input");
      const found = { type, told: one(".live").textContent, top: scrollY, step: one("#steps output").textContent };
      if (!data.live.live || name === "moved") return found;
      slider.value = 1; slider.oninput();
      scrollTo({ top: 700, behavior: "instant" });
      name = "moved"; // kept when the page is loaded again, which a slow browser may have done before this
      return null;
    """
    seen = browse(made, look, widths=(1280,))["w1280"]
    assert seen["faults"] == [] and seen["type"] == "reload"
    assert seen["step"] == "10" and seen["top"] == 700
    report.write_report(run, live=0.0)
    seen = browse(made, look, widths=(1280,))["w1280"]
    assert seen["type"] == "navigate" and seen["told"].startswith("done")
