"""The house of the design, held: a module imports from its own floor or from below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "transpixeler"
FLOORS = [
    {"config", "configfile", "files", "runtime", "tooling"},
    {"data", "models", "objective", "metrics", "regions"},
    {"parallel", "optim", "ema", "facts", "telemetry"},
    {"checkpoint", "checks", "export", "adapters", "peft_config", "runs", "saving", "sampling", "trained"},
    {
        "trainer",
        "plan",
        "account",
        "evaluate",
        "hub",
        "card",
        "demo",
        "demo_model",
        "inspection",
        "report",
        "generate",
        "heldout",
    },
    {"cli", "arguments", "__main__"},
]
HEAVY = {"diffusers", "transformers", "torchao", "av", "tensorboard", "peft", "torchvision", "PIL", "pyarrow", "wandb"}


def floor_of(part: str) -> int:
    floors = [number for number, names in enumerate(FLOORS) if part in names]
    assert floors, f"{part} stands on no floor: add it to the house"
    return floors[0]


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every module that is named in an import, and whether that is at module level."""
    tree = ast.parse(source)
    lazy = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        top = id(node) not in lazy and id(node) not in typing_only
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def breaches(name: str, source: str) -> list[str]:
    """What a module `transpixeler.NAME` imports against the rules."""
    part = name.split(".")[0]
    found = []
    for module, top in imports(source):
        root, *rest = module.split(".")
        if root == "transpixeler" and rest:
            if floor_of(rest[0]) > floor_of(part):
                found.append(f"{name} imports {module} from a floor above")
            if part == "models" and rest[0] == "data":
                found.append(f"{name} imports {module}: a model knows no data")
            if part == "parallel" and rest[0] == "models" and rest[1:2] == ["wan"]:
                found.append(f"{name} imports {module}: parallel knows no concrete model")
        if top and root in HEAVY:
            found.append(f"{name} imports {root} at module level")
        if part in ("config", "configfile", "cli") and top and root in ("torch", "numpy"):
            found.append(f"{name} imports {root}, and --help would wait for it")
    return found


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_floor_and_below(name: str) -> None:
    assert breaches(name, MODULES[name].read_text()) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_no_package_re_exports(path: Path) -> None:
    assert not list(imports(path.read_text()))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("optim", "from transpixeler.trainer import Trainer"),
        ("data.video", "def f():\n    from transpixeler import checkpoint"),
        ("models.wan", "from transpixeler.data import loader"),
        ("parallel.pipeline", "from transpixeler.models.wan import Wan"),
        ("config", "import torch"),
        ("data.video", "import av"),
        ("data.write", "try:\n    from diffusers import WanPipeline\nfinally:\n    ..."),
    ],
)
def test_a_breach_is_found(name: str, source: str) -> None:
    assert len(breaches(name, source)) == 1


def test_what_is_allowed_passes() -> None:
    assert breaches("data.video", "def f():\n    import av") == []
    assert breaches("trainer", "from transpixeler.parallel import mesh\nimport torch") == []


def test_the_top_level_holds_only_what_the_design_names() -> None:
    import subprocess

    root = PACKAGE.parent
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    allowed = (
        "transpixeler configs tools tests Makefile pyproject.toml README.md LICENSE constraints.txt .ci .gitignore"
    )
    assert {line.split("/")[0] for line in listed.splitlines()} <= set(allowed.split())
