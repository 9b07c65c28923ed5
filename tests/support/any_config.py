"""Draw any config by hypothesis strategies made from the dataclasses, so that a new key needs nothing here; load it."""

import dataclasses
import json
import math
import os
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from transpixeler.config import loading
from transpixeler.config.faults import faults
from transpixeler.config.sections import Config, PathKind, Range, family_names

EXAMPLES = int(os.environ.get("CONFIG_EXAMPLES", "20"))  # more, and others, to look for faults that these do not show
fast = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    derandomize="CONFIG_EXAMPLES" not in os.environ,
)

TEXT = st.text(max_size=8)
SIDE = st.integers(16, 4096)
# Where the limits are not in the type, because they hang on other keys.
CHOSEN: dict[str, st.SearchStrategy] = {
    "streams": st.just({"rgb": "", "seg": "_seg"}),
    "family": st.sampled_from(["", *family_names()]),
    "lora.scope": st.sampled_from(["aux", "all", ("seg",), ("rgb", "seg")]),
    "lora.enabled": st.just(True),
    "objective.t_min": st.floats(0, 0.4),
    "objective.t_max": st.floats(0.5, 1),
    "objective.tasks": st.fixed_dictionaries({"joint": st.floats(0.1, 2)}, optional={"rgb_to_aux": st.floats(0, 2)}),
    "objective.stream_weights": st.dictionaries(st.sampled_from(["rgb", "seg"]), st.floats(0, 2)),
    "optim.lr": st.floats(0.1, 1),
    "optim.lr_min": st.floats(0, 0.1),
    "data.aspect_min": st.floats(0.1, 1),
    "data.aspect_max": st.floats(1, 4),
    "run_name": st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="./\\"), max_size=8),
    "columns": st.dictionaries(st.sampled_from(["rgb", "seg"]), st.sampled_from(["clip", "mask"])),
    "hub.repo": st.sampled_from(["", "me/model"]),
    "deterministic": st.just(False),  # it leaves out some kernels of model.attention
    "guidance": st.floats(0, 9) | st.fixed_dictionaries({"high": st.floats(0, 9), "low": st.floats(0, 9)}),
    "eval.times": st.lists(st.floats(0, 1), min_size=1, max_size=3).map(tuple),
    "frames": st.lists(st.integers(0, 40).map(lambda k: 4 * k + 1), min_size=1, max_size=3).map(tuple),
    "resolutions": st.lists(SIDE | st.tuples(SIDE, SIDE), min_size=1, max_size=3).map(tuple),
}


def values(hint: Any, key: str = "") -> st.SearchStrategy:
    """Any value of a field's type, within its limits."""
    for name in (key, key.rpartition(".")[2]):
        if name in CHOSEN:
            return CHOSEN[name]
    origin, arguments = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        return limited(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{name: values(h, f"{key}.{name}".lstrip(".")) for name, h in hints.items()})
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(TEXT, values(arguments[1]), max_size=3)
    number = st.floats(allow_nan=False, allow_infinity=False)
    return {str: TEXT, int: st.integers(), float: number, bool: st.booleans(), type(None): st.none()}[hint]


def limited(hint: Any) -> st.SearchStrategy:
    mark = hint.__metadata__[0]
    if isinstance(mark, PathKind):
        names = st.text("ab c/ü.", min_size=1, max_size=8).map(lambda name: str(Path("/", name)))
        hub = [st.just("user/name")] if mark is PathKind.HUB_OR_LOCAL else []
        return st.one_of(names, *hub)
    assert isinstance(mark, Range), mark
    low = None if math.isinf(mark.low) else mark.low
    high = None if math.isinf(mark.high) else mark.high
    if hint.__origin__ is int:
        return st.integers(low, high)
    return st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min=mark.open_low)


configs = values(Config).filter(lambda config: not list(faults(config)))


def plain(config: object) -> dict:
    """Return dataclasses as dicts and tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def leaves(tree: dict, key: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}{name}.")
        else:
            yield key + name, value


def load(*files: object, overrides: tuple[str, ...] = ()) -> Config:
    """Write files a.yaml, b.yaml …, text as it is and all else as YAML, and load the last one."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in zip("abcdefgh", files):
            text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
            (Path(folder) / f"{name}.yaml").write_text(text, encoding="utf-8")
        return loading.load(Path(folder) / f"{'abcdefgh'[len(files) - 1]}.yaml", overrides)
