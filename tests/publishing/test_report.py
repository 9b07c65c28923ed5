"""The report of a run: what it gathers from the folder, and the page as a browser draws it, offline, at two widths."""

import dataclasses
import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.support.browser import CHROMIUM, browse, needs_browser
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config, ModelConfig, UserError
from transpixeler.files import shown_path
from transpixeler.publishing import page, report
from transpixeler.sampling.files import write_sample

TIMES = ("0.1", "0.5", "0.9")
SKIPPED = [["fx/017", "the mask has 16 frames, the video 17"], ["fx/044", "<script>alert(1)</script> & more"]]


def step_line(step: int) -> dict:
    loss = 2 / step**0.5
    rates = {"seconds": 0.5, "data_wait": 0.001, "samples_per_second": 8.0, "tokens_per_second": 900.0, "tflops": 0.01}
    return {
        "step": step, "epoch": 1, "loss": loss, "loss_rgb": loss * 1.1, "loss_seg": loss * 0.9, "grad_norm": 0.1,
        "lr": 1e-3, "loss_by_t": [loss, None, loss, loss / 2, loss], "samples": ["a", "b"], **rates,
        "checkpoint_stall": 0.0, "memory_gib": 1.5,
    }  # fmt: skip


def eval_line(step: int) -> dict:
    losses = {s: {t: (1 + float(t)) * (1 - step / 100) for t in TIMES} for s in ("rgb", "seg")}
    metrics = {"iou": 0.5 + step / 100, "mad": 0.2, "flicker": 0.01}
    prompts = {"metrics": {"flicker": 0.02}}  # of videos without a data set
    return {
        "step": step,
        "eval": {"held": {"loss": losses, "loss_ema": losses, "metrics": metrics}, "prompts": prompts},
    }


def write_run(folder: Path, *, steps: int = 30, samples: bool = True) -> Path:
    """A run's folder as training leaves it."""
    folder.mkdir(parents=True)
    config = dataclasses.replace(Config(), seed=5, model=ModelConfig(path="/models/Wan</script>"))
    (folder / "config.yaml").write_text(loading.dump(config))
    lines = [
        json.dumps(line)
        for n in range(1, steps + 1)
        for line in [step_line(n), *([eval_line(n)] if n % 10 == 0 else [])]
    ]
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(eval_line(0)), *lines]) + '\n{"step": 31, "lo')
    manifest = {
        "versions": {"python": "3.11", "transpixeler": "0.1.0"}, "git": "abc",
        "machine": {"host": "box", "device": "H200"},
        "command": ["train", "c.yaml"], "layout": {"pipeline": 2, "replicate": 1, "shard": 2}, "steps": steps,
        "clips": {"train": 48, "eval": 8}, "skipped": SKIPPED, "model": {"path": "/models/Wan", "vae": "0" * 64},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for step in (0, 10, 30) if samples else ():
        for name in ("000", "001"):
            rgb = np.full((5, 32, 48, 3), 40 + step, np.uint8)
            write_sample(
                folder / f"samples/step{step:08}" / name,
                {"rgb": rgb, "seg": rgb},
                fps=Fraction(8),
                formats=("checkerboard",),
                alpha_mode="straight",
                facts={"prompt": f"a star, {name}", "seed": 3, "step": None},
            )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "glass-fx")
    for facts in run.glob("samples/*/001/sample.json"):
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"given": ["rgb"]}))
    return run


# --- what is gathered ------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(run: Path, capsys) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == shown_path(run / "report.html")
    assert (run / "report.html").stat().st_size > 20_000


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path, capsys) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds no config.yaml" in said and "OUTPUT_DIR/latest" in said and said.count("\n") == 1


def test_all_of_a_run_is_gathered(run: Path) -> None:
    data = report.gather(run)
    assert data["steps"]["step"] == list(range(1, 31))
    assert data["steps"]["loss"][3] == 1.0
    assert "loss_by_t.0" in data["steps"] and "loss_by_t.1" not in data["steps"]  # no sample had such a time
    assert [line["step"] for line in data["evals"]] == [0, 10, 20, 30]
    assert data["seconds"] == 15 and data["last"]["memory_gib"] == 1.5
    assert dict(data["changed"]) == {"seed": 5, "model.path": "/models/Wan</script>"}
    assert data["skipped"] == SKIPPED
    assert [(sample["step"], sample["name"]) for sample in data["samples"]] == [
        (step, name) for step in (30, 10, 0) for name in ("001", "000")
    ]


def test_a_scorers_cosines_are_better_where_they_are_more(run: Path) -> None:
    told = report.gather(run)["words"]
    assert told["score_caption"]["more"] and told["score_seg"]["more"] and told["score_seg"]["alone"]
    assert "score_depth" not in told and not told["mad"]["more"]


def test_a_video_that_was_deleted_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for file in [run / "samples/step00000030/000/seg.mp4", *run.glob("samples/step00000010/001/*.mp4")]:
        file.unlink()
    assert report.write_report(run).is_file()
    shown = {(sample["step"], sample["name"]): sample["videos"] for sample in report.gather(run)["samples"]}
    assert len(shown) == 5 and [*shown[30, "000"]] == ["rgb", "checkerboard"]


def test_a_copy_that_a_user_keeps_beside_the_samples_is_left_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.copytree(run / "samples/step00000010", run / "samples/step00000010-best")
    assert {sample["step"] for sample in report.gather(run)["samples"]} == {0, 10, 30}


def test_a_long_run_is_thinned_by_means_and_keeps_its_last_step() -> None:
    curves = report.thinned([{"step": n, "loss": float(n), "lr": math.nan, "samples": []} for n in range(1, 10_001)])
    assert len(curves["step"]) <= report.CURVE_POINTS and curves["step"][-1] == 10_000
    size = math.ceil(10_000 / report.CURVE_POINTS)
    assert curves["loss"][0] == (size + 1) / 2
    assert set(curves["lr"]) == {None}


def test_each_expert_has_a_curve_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", samples=False)
    lines = [step_line(n) | {"expert": "high" if n % 20 > 9 else "low"} for n in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = report.gather(run)["steps"]
    for name in ("high", "low"):
        own = [all_ if line["expert"] == name else None for all_, line in zip(curves["loss"], lines)]
        assert curves[f"loss.{name}"] == own and None in own


def test_nothing_in_a_run_can_leave_the_value_that_holds_it(run: Path) -> None:
    text = report.render(report.gather(run) | {"evals": [{"step": 1, "eval": {"x": {"metrics": {"psnr": math.inf}}}}]})
    value = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert value and json.loads(value[1])["changed"][1][1] == "/models/Wan</script>"
    assert json.loads(value[1])["evals"][0]["eval"]["x"]["metrics"]["psnr"] is None
    assert "<script>alert" not in text
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:|@import|fetch\(""", text)


def test_small_videos_are_held_by_the_page_and_large_ones_named_by_their_place(run: Path, monkeypatch) -> None:
    held = report.gather(run)["samples"][0]["videos"]
    assert list(held) == ["rgb", "seg", "checkerboard"]
    assert all(source.startswith("data:video/mp4;base64,") for source in held.values())
    monkeypatch.setattr(page, "EMBEDDED_FILE", 10)
    named = report.gather(run)["samples"][0]["videos"]
    assert named["seg"] == "samples/step00000030/001/seg.mp4" and (run / named["seg"]).is_file()


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "young", steps=0, samples=False)
    (run / "manifest.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert "No step" not in report.write_report(run).read_text()[:200]
    assert report.gather(run)["steps"] == {"step": []}


def test_a_config_without_a_run_is_told_apart(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        report.write_report(tmp_path)


# --- in a browser ----------------------------------------------------------------------------------------------------

LOOK = """
  const latest = all("video.thumb").map(v => v.src), slider = one("#steps input");
  if (slider) { slider.value = 0; slider.oninput(); }
  const chart = one("#training svg"), box = chart?.getBoundingClientRect();
  chart?.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  const lines = id => all(`#${id} path.curve`).map(p => p.getAttribute("d")).filter(d => d.includes("L")).length;
  return {
    wide: overflowing("body"), title: document.title,
    lines: Object.fromEntries(all("section").map(s => [s.id, lines(s.id)])),
    text: Object.fromEntries(all("section, header").map(s => [s.id || "header", s.textContent])),
    videos: latest.length, changed: all("video.thumb").filter((v, i) => v.src !== latest[i]).length,
    broken: all("video.thumb").filter(v => v.error).length, tip: one("#training .tip")?.textContent,
    bad: one("main").textContent.match(/NaN|undefined|Infinity/g),
    named: all(".card > svg").filter(s => s.querySelectorAll("text.name").length === 1).length,
    charts: all(".card > svg").length,
    titles: all("#samples article > p").map(p => p.textContent),
  };
"""


@pytest.fixture(scope="module")
def seen(run: Path) -> dict:
    if CHROMIUM is None:
        pytest.skip("chromium is not on PATH")
    return browse(report.write_report(run), LOOK)


@pytest.mark.parametrize("width", ["w390", "w1280"])
def test_the_page_draws_all_its_charts_and_fits(seen: dict, width: str) -> None:
    page = seen[width]
    assert page["faults"] == [] and page["bad"] is None
    assert page["wide"] == []
    assert page["title"] == "glass-fx · transpixeler"
    assert page["lines"] == {
        "samples": 0,
        "training": 3 + 4 + 2,
        "held-out": 2 * (3 + 3),
        "alpha": 3 + 1,
        "speed": 6,
        "data": 0,
        "settings": 0,
    }


def test_the_page_says_what_was_trained_and_what_was_skipped(seen: dict) -> None:
    text = seen["w1280"]["text"]
    assert "A LoRA of rank 128 on the aux streams, trained on 48 clips" in text["header"]
    assert "4 devices (pipeline 2 × replicate 1 × shard 2)" in text["header"]
    assert "−30 % against the base" in text["header"] and "0.8held, best 0.8" in text["header"]
    for sample, reason in SKIPPED:
        assert sample in text["data"] and reason in text["data"]
    assert "seed5" in text["settings"]


def test_each_axis_has_a_name_and_what_is_made_of_a_given_video_says_so(seen: dict) -> None:
    for found in (seen["w390"], seen["w1280"]):
        assert found["named"] == found["charts"] == 17
        assert found["titles"] == ["a star, 000", "a star, 001 given rgb"]


def test_samples_play_and_the_slider_goes_back_through_the_steps(seen: dict) -> None:
    page = seen["w1280"]
    assert (page["videos"], page["changed"], page["broken"]) == (6, 6, 0)
    assert "a star, 000" in page["text"]["samples"] and "step 0" in page["text"]["samples"]


def test_a_cursor_reads_all_curves_of_a_chart(seen: dict) -> None:
    assert re.fullmatch(r"step 1\dall[\d.]+ \([\d.]+\)rgb[\d.]+ \([\d.]+\)seg[\d.]+ \([\d.]+\)", seen["w1280"]["tip"])


@needs_browser
def test_a_young_run_says_what_is_missing_and_a_fault_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "young", steps=0, samples=False)
    (run / "metrics.jsonl").write_text("")
    page = report.write_report(run)
    found = browse(page, LOOK)["w390"]
    assert found["faults"] == [] and found["bad"] is None and found["wide"] == []
    said = {"samples": "No sample", "training": "No step", "held-out": "Nothing was evaluated", "alpha": "No sample"}
    assert all(text in found["text"][part] for part, text in said.items())
    page.write_text(page.read_text().replace("function trainingPart() {", "function trainingPart() { gone();"))
    assert "gone is not defined" in browse(page, LOOK)["w390"]["faults"][0]
