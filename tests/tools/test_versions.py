"""The program that tries other versions reads the ranges that the project has, and keeps one row of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import versions

ROOT = Path(__file__).parents[2]
GUIDE = f"""Before.

{versions._line(versions.HEAD)}
{versions._line(["---"] * len(versions.HEAD))}
| newest | 3.11.2 | 1 | old |
| newest | 3.13.5 | 1 | old |

After.
"""


def test_the_oldest_are_the_lower_bounds_of_what_is_always_needed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    oldest, newest = (versions.requirements(text, oldest=oldest) for oldest in (True, False))
    assert [one.replace("==", ">=") for one in oldest] == newest
    pinned = [one for one in oldest if "==" in one]
    assert pinned == oldest[: len(pinned)] and pinned[0].startswith("torch==") and pinned[-1].startswith("tqdm==")
    assert "pytest>=8" in oldest


def test_a_row_takes_the_place_of_its_own_alone() -> None:
    found = versions.recorded(GUIDE, ("newest", "3.11.7", "2", "new"))
    assert found.startswith("Before.") and found.endswith("After.\n")
    assert [line for line in found.splitlines() if line.startswith("| newest")] == [
        "| newest | 3.11.7 | 2 | new |",
        "| newest | 3.13.5 | 1 | old |",
    ]
    assert versions.recorded(found, ("oldest", "3.11.7", "2", "new")).count("| 3.11.7 |") == 2


def test_the_guide_has_the_table() -> None:
    assert versions.recorded(versions.GUIDE.read_text(), ("newest", "0.0", "none"))


def test_it_needs_nothing_but_python() -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "tools/versions.py"), "--help"]
    assert "newest" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
