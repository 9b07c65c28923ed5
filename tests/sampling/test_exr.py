"""Samples as OpenEXR: linear light, alpha in the mode that each file names, and a given plate's light untouched."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from transpixeler import cli
from transpixeler.config.sections import UserError
from transpixeler.data.media import exr
from transpixeler.data.media.light import Light, decoded, encoded
from transpixeler.sampling.files import write_sample

FPS = Fraction(24)


def streams() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    matte = draw.integers(40, 256, (3, 32, 48, 1), dtype=np.uint8).repeat(3, axis=3)
    return {"rgb": draw.integers(0, 256, (3, 32, 48, 3), dtype=np.uint8), "seg": matte}


@pytest.mark.parametrize("curve", ["srgb", "rec709"])
@pytest.mark.parametrize("mode", ["straight", "premultiplied"])
def test_a_sample_as_exr_is_linear_light_and_says_how_its_alpha_is_meant(mode: str, curve: str, tmp_path: Path) -> None:
    made = streams()
    files = write_sample(
        tmp_path / "s", made, fps=FPS, formats=["exr"], alpha_mode=mode, transfer=curve, facts={"seed": 1}
    )
    assert [path.name for path in sorted(files["exr"].iterdir())] == ["00000.exr", "00001.exr", "00002.exr"]
    for path, rgb, matte in zip(sorted(files["exr"].iterdir()), *made.values()):
        found = exr.read(path)
        assert found.premultiplied == (mode == "premultiplied")
        picture = found.picture(Light(curve), alpha=True)
        assert np.abs(picture[..., :3].astype(int) - rgb).max() <= 1
        assert np.abs(picture[..., 3].astype(int) - matte[..., 0]).max() == 0
        share = matte[..., :1] / 255 if mode == "premultiplied" else 1
        assert np.allclose(found.rgb, decoded(rgb / 255, curve) * share, rtol=2**-10, atol=1e-6)


def test_a_given_plate_keeps_its_light(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Brighter than white and finer than eight bits, within what half floats hold, though the model sees a picture."""
    plates = np.random.default_rng(0).gamma(0.8, 0.9, (5, 64, 64, 3)).astype(np.float32)
    exr.write_exr_sequence(tmp_path / "in", plates, fps=FPS, alpha_mode="straight")
    for number, path in enumerate(sorted((tmp_path / "in").iterdir())):
        path.rename(tmp_path / f"plate.{1001 + number}.exr")
    words = ["--rgb", str(tmp_path / "plate.####.exr"), "--prompt", "a ball", "--size", "64x64x5", "--steps", "1"]
    assert cli.main(["sample", str(run), *words, "--format", "exr", "--out", str(tmp_path / "out")]) == 0
    (made,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    found = [exr.read(path) for path in sorted((made / "exr").iterdir())]
    assert plates.max() > 5 and all(one.alpha is not None for one in found)
    assert np.allclose(np.stack([one.rgb for one in found]), plates, rtol=2**-11, atol=1e-7)
    shown = encoded(plates, "srgb")
    assert np.abs(decoded(np.rint(shown * 255) / 255, "srgb") - plates).max() > 1, "eight bits would not do"


def test_exr_without_its_package_is_told_before_anything_is_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    words = ["--prompt", "x", "--format", "exr", "--out", str(tmp_path / "out")]
    assert cli.main(["sample", str(run), *words]) == 2
    assert "sample.formats: exr needs the package OpenEXR; pip install 'transpixeler[exr]'" in capsys.readouterr().err
    with pytest.raises(UserError, match="OpenEXR"):
        write_sample(tmp_path / "s", streams(), fps=FPS, formats=["exr"], alpha_mode="straight", facts={})
    assert not list(tmp_path.iterdir())
