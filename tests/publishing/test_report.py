"""The report of a run: what it gathers from the folder, and the page as a browser draws it, offline, at two widths."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config, LogConfig, ModelConfig, UserError
from transpixeler.publishing import report
from transpixeler.runs.telemetry import Telemetry
from transpixeler.sampling.files import write_sample

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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
    return write_run(tmp_path_factory.mktemp("runs") / "glass-fx")


# --- what is gathered ------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(run: Path, capsys) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
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
    page = report.render(report.gather(run) | {"evals": [{"step": 1, "eval": {"x": {"metrics": {"psnr": math.inf}}}}]})
    value = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert value and json.loads(value[1])["changed"][1][1] == "/models/Wan</script>"
    assert json.loads(value[1])["evals"][0]["eval"]["x"]["metrics"]["psnr"] is None
    assert "<script>alert" not in page
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:|@import|fetch\(""", page)


def test_small_videos_are_held_by_the_page_and_large_ones_named_by_their_place(run: Path, monkeypatch) -> None:
    held = report.gather(run)["samples"][0]["videos"]
    assert list(held) == ["rgb", "seg", "checkerboard"]
    assert all(source.startswith("data:video/mp4;base64,") for source in held.values())
    monkeypatch.setattr(report, "EMBEDDED_FILE", 10)
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

FRAMES = "".join(f'<iframe id="w{w}" style="width:{w}px;height:900px" src="PAGE"></iframe>' for w in (390, 1280))
HOST = f"""<!doctype html><pre id=found></pre>{FRAMES}<script>
const found = {{}};
onmessage = event => {{
  const name = [...document.querySelectorAll("iframe")].find(f => f.contentWindow === event.source).id;
  found[name] = event.data;
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""
WATCH = """<script>
window.faults = [];
onerror = (message, file, line) => faults.push(`${message} at ${line}`);
if (innerWidth < 500) ResizeObserver = class { observe() {} }; // as in a browser too busy to have drawn a frame
</script>"""
PROBE = """<script>
onload = () => setTimeout(() => {
  const all = selector => [...document.querySelectorAll(selector)], one = selector => document.querySelector(selector);
  const wide = all("main *, nav").filter(n => !n.closest(".scroll, nav div, pre, svg"))
    .filter(n => n.getBoundingClientRect().right > innerWidth + 1).map(n => `${n.tagName}.${n.className}`);
  const latest = all("video").map(v => v.src), slider = one("#steps input");
  if (slider) { slider.value = 0; slider.oninput(); }
  const chart = one("#training svg"), box = chart?.getBoundingClientRect();
  chart?.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  const lines = id => all(`#${id} path.curve`).map(p => p.getAttribute("d")).filter(d => d.includes("L")).length;
  parent.postMessage({
    faults, wide, title: document.title, lines: Object.fromEntries(all("section").map(s => [s.id, lines(s.id)])),
    text: Object.fromEntries(all("section, header").map(s => [s.id || "header", s.textContent])),
    videos: latest.length, changed: all("video").filter((v, i) => v.src !== latest[i]).length,
    broken: all("video").filter(v => v.error).length, tip: one("#training .tip")?.textContent,
    bad: one("main").textContent.match(/NaN|undefined|Infinity/g),
  }, "*");
}, 700);
</script>"""


def browse(page: Path) -> dict:
    """What the page shows in frames of a phone's and a desk's width."""
    text = page.read_text(encoding="utf-8")
    probed = page.with_name("probed.html")
    probed.write_text(text.replace("<title>", WATCH + "<title>", 1).replace("</html>", PROBE + "</html>"))
    host = page.with_name("host.html")
    host.write_text(HOST.replace("PAGE", probed.name))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=6000 --window-size=1800,1000 --dump-dom"
    )
    profile = page.with_name("profile")
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", host.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[:2000]
    import html

    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def seen(run: Path) -> dict:
    if CHROMIUM is None:
        pytest.skip("chromium is not on PATH")
    return browse(report.write_report(run))


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
    assert "−30 % against the base" in text["header"] and "0.8best 0.8" in text["header"]
    for sample, reason in SKIPPED:
        assert sample in text["data"] and reason in text["data"]
    assert "seed5" in text["settings"]


def test_samples_play_and_the_slider_goes_back_through_the_steps(seen: dict) -> None:
    page = seen["w1280"]
    assert (page["videos"], page["changed"], page["broken"]) == (6, 6, 0)
    assert "a star, 000" in page["text"]["samples"] and "step 0" in page["text"]["samples"]


def test_a_cursor_reads_all_curves_of_a_chart(seen: dict) -> None:
    assert re.fullmatch(r"step 1\dall[\d.]+ \([\d.]+\)rgb[\d.]+ \([\d.]+\)seg[\d.]+ \([\d.]+\)", seen["w1280"]["tip"])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
def test_a_young_run_says_what_is_missing_and_a_fault_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "young", steps=0, samples=False)
    (run / "metrics.jsonl").write_text("")
    page = report.write_report(run)
    found = browse(page)["w390"]
    assert found["faults"] == [] and found["bad"] is None and found["wide"] == []
    said = {"samples": "No sample", "training": "No step", "held-out": "Nothing was evaluated", "alpha": "No sample"}
    assert all(text in found["text"][part] for part, text in said.items())
    page.write_text(page.read_text().replace("function trainingPart() {", "function trainingPart() { gone();"))
    assert "gone is not defined" in browse(page)["w390"]["faults"][0]


# --- on TensorBoard --------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_line_of_metrics_and_stops_nobody(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, LogConfig(tensorboard=False), step=0, total=3, name="x")
    telemetry.write({"step": 1})
    there = telemetry.metrics
    with Path("/dev/full").open("ab", buffering=0) as telemetry.metrics:
        for step in (2, 3):
            telemetry.write({"step": step})
    telemetry.metrics = there
    telemetry.write({"step": 4})
    telemetry.close()
    told = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told == [1, 2, 3, 4]


def test_lines_that_a_full_disk_never_took_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry(tmp_path, LogConfig(tensorboard=False), step=0, total=2, name="x")
    telemetry.metrics.close()
    with Path("/dev/full").open("ab", buffering=0) as telemetry.metrics:
        for step in (1, 2):
            telemetry.write({"step": step})
        telemetry.close()
    kept, lost = caplog.messages
    assert "kept until there is room" in kept and "its last 2 lines are lost" in lost


def test_a_board_that_cannot_write_is_left(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    telemetry = Telemetry(tmp_path, LogConfig(tensorboard=False), step=0, total=1, name="x")
    telemetry.board = Full()
    for step in (1, 2):
        telemetry.scalars(step, {"loss": 1.0})
    telemetry.close()
    assert telemetry.board is None


def test_videos_stand_on_the_board(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frames = np.zeros((7, 40, 1000, 3), np.uint8)
    frames[..., 0] = np.arange(7)[:, None, None] * 40
    telemetry = Telemetry(tmp_path, LogConfig(), step=0, total=1, name="x")
    telemetry.video(3, "samples/star", frames, fps=8)
    telemetry.close()
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {"samples/star"}
    (video,) = board.Images("samples/star")
    import io

    gif = Image.open(io.BytesIO(video.encoded_image_string))
    assert (gif.format, gif.n_frames, gif.info["duration"], video.step) == ("GIF", 7, 120, 3)
    assert gif.size == (video.width, video.height) == (334, 14)
    gif.seek(6)
    assert abs(gif.convert("RGB").getpixel((5, 5))[0] - 240) <= 4
