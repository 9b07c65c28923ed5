"""What was found is told in a table that fits a terminal."""

from __future__ import annotations

from transpixeler.evaluation.results import summary, table

TIMES = [f"0.{n}" for n in range(1, 10)]


def test_a_table_has_a_row_for_each_set_and_stream_and_fits_a_terminal() -> None:
    losses = {stream: {t: float(t) + shift for t in TIMES} for stream, shift in (("rgb", 0.0), ("seg", 1.0))}
    found = {
        "eval": {"loss": losses, "metrics": {"alpha_mae": 0.25, "flicker": 0.00123456}},
        "eval/rgb_to_aux": {"loss": {"seg": losses["seg"]}, "metrics": {"alpha_mae": 0.5}},
        "prompts": {"metrics": {"flicker": 0.5}},
    }
    assert table(found).splitlines() == [
        "loss at t               mean     0.1     0.3     0.5     0.7     0.9",
        "eval             rgb  0.5000  0.1000  0.3000  0.5000  0.7000  0.9000",
        "eval             seg  1.5000  1.1000  1.3000  1.5000  1.7000  1.9000",
        "eval/rgb_to_aux  seg  1.5000  1.1000  1.3000  1.5000  1.7000  1.9000",
        "",
        "samples          alpha_mae   flicker",
        "eval                  0.25  0.001235",
        "eval/rgb_to_aux        0.5         –",
        "prompts                  –       0.5",
    ]


def test_experts_have_the_noise_levels_of_their_own() -> None:
    found = {"eval/high": {"loss": {"rgb": {"0.95": 1.0}}}, "eval/low": {"loss": {"rgb": {"0.45": 2.0}}}}
    assert [line.split() for line in table(found).splitlines()] == [
        ["loss", "at", "t", "mean", "0.95"],
        ["eval/high", "rgb", "1.0000", "1.0000"],
        ["loss", "at", "t", "mean", "0.45"],
        ["eval/low", "rgb", "2.0000", "2.0000"],
    ]
    assert table({}) == ""


def test_a_set_of_which_nothing_was_measured_has_no_line() -> None:
    found = {"eval": {"loss": {"rgb": {"0.5": 0.25}}, "metrics": {"flicker": 0.5}}, "prompts": {"metrics": {}}}
    assert [*summary(found)] == ["eval: loss_rgb 0.2500, flicker 0.5"]
