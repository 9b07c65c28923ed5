"""A config that would exhaust the machine is refused, with the key or the file."""

from pathlib import Path

import pytest

from transpixeler.config import loading
from transpixeler.config.sections import UserError


def test_aliases_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    """Some hundred bytes would be ten to the tenth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\nsample: {prompts: *a9}\n")
    with pytest.raises(UserError, match=r"aliases unfold into more than 100,000 values"):
        loading.load(tmp_path / "c.yaml")


def test_a_count_without_bounds_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.aspect_count: 99999999999 is out of range: must be ≥ 1 and ≤ 1000"):
        loading.from_overrides(["data.aspect_count=99999999999"])
