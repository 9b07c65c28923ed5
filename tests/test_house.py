"""The house of the design, held: who may import whom, and where an architecture may be named."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "transpixeler"
# From the ground up. A package imports from those before it; the top floor's modules count as packages of one.
ORDER = (
    *(
        "config",
        "files",
        "models",
        "flow",
        "families",
        "parallel",
        "data",
        "adapters",
        "runs",
    ),
    *(
        "sampling",
        "scoring",
        "evaluation",
        "publishing",
        "training",
        "planning",
        "demo",
        "api",
        "usage",
        "arguments",
        "commands",
        "cli",
        "__main__",
    ),
)
TOP_FLOOR = {"__init__", "__main__", "api", "arguments", "cli", "commands", "files", "usage"}
HEAVY = {
    *("diffusers", "transformers", "torchao", "av", "tensorboard", "peft", "torchvision", "PIL", "pyarrow", "wandb"),
    "OpenEXR",
}
LIGHT = ("config", "cli", "commands", "arguments")  # what `--help` and a misspelt key load
KNOWS_ARCHITECTURES = ("families", "demo")

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield every module that is imported, also inside functions and for types, and whether at run time at once."""
    tree = ast.parse(source)
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package"
            yield from ((f"{node.module}.{alias.name}", id(node) not in later) for alias in node.names)


def own(imported: str) -> str:
    """Return the module of this package that an import leads to, or nothing."""
    parts = imported.split(".")
    if parts[0] != "transpixeler" or imported == "transpixeler.__version__":
        return ""
    for end in range(len(parts), 1, -1):
        if (name := ".".join(parts[1:end])) in MODULES:
            return name
    return parts[1] if len(parts) > 1 else ""


def package_of(name: str) -> str:
    package = name.split(".")[0]
    assert package in ORDER, f"{package} has no place in the order: add it to the house"
    return package


def breaches(name: str, source: str) -> list[str]:
    """List what a module `transpixeler.NAME` imports against the rules."""
    package, found = package_of(name), []
    for imported, at_once in imports(source):
        root = imported.split(".")[0]
        target = own(imported)
        if target and ORDER.index(package_of(target)) > ORDER.index(package):
            found.append(f"{name} imports {imported} from a package above")
        if at_once and root in HEAVY:
            found.append(f"{name} imports {root} at module level")
        if package in LIGHT and at_once and root in ("torch", "numpy"):
            found.append(f"{name} imports {root}, and --help would wait for it")
    return found


def circle(sources: dict[str, str]) -> list[str]:
    """Return modules that import each other in a circle, whatever Python sees of it."""
    graph = {name: {own(module) for module, _ in imports(text)} - {"", name} for name, text in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def named_architectures(source: str) -> list[str]:
    """List the architectures of `families/` that a source imports, names or speaks of."""
    families = [folder.name for folder in (PACKAGE / "families").iterdir() if (folder / "__init__.py").exists()]
    spellings = {name: "|".join((name, name.capitalize(), name.upper())) for name in families}
    return [name for name, ways in spellings.items() if re.search(rf"(?<![A-Za-z])({ways})(?![a-z])", source)]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_package_and_below(name: str) -> None:
    assert breaches(name, MODULES[name].read_text()) == []


def test_no_module_imports_another_in_a_circle() -> None:
    assert circle({name: path.read_text() for name, path in MODULES.items()}) == []


@pytest.mark.parametrize("name", [name for name in MODULES if package_of(name) not in KNOWS_ARCHITECTURES])
def test_only_families_and_the_demo_name_an_architecture(name: str) -> None:
    assert named_architectures(MODULES[name].read_text()) == []


def test_the_top_floor_is_small() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP_FLOOR


@pytest.mark.parametrize("path", [p for p in sorted(PACKAGE.rglob("__init__.py")) if p.parent != PACKAGE], ids=str)
def test_no_package_re_exports(path: Path) -> None:
    assert not list(imports(path.read_text()))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("flow.objective", "from transpixeler.training.trainer import Trainer"),
        ("data.media.decode", "def f():\n    from transpixeler.runs import checkpoint"),
        ("families.wan.model", "from transpixeler.data import loader"),
        ("models.lora", "if TYPE_CHECKING:\n    from transpixeler.families.wan.model import WanModel"),
        ("config", "import torch"),
        ("data.media.decode", "import av"),
        ("data.media.write", "try:\n    from diffusers import WanPipeline\nfinally:\n    ..."),
    ],
)
def test_a_breach_is_found(name: str, source: str) -> None:
    assert len(breaches(name, source)) == 1


def test_what_is_allowed_passes() -> None:
    assert breaches("data.media.decode", "def f():\n    import av") == []
    assert breaches("training.trainer", "from transpixeler.parallel import mesh\nimport torch") == []


def test_a_circle_is_found() -> None:
    there, back = "import transpixeler.files", "def f():\n    from transpixeler.config.sections import UserError"
    room = "config.sections"
    assert circle({room: there, "files": back}) and not circle({room: there, "files": ""})


QUESTION = re.compile(r"(What|Of|Whether|How|Where|Which|As)\b")
DOCUMENTED = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


def riddles(source: str) -> list[str]:
    """List the docstrings that begin with a word that promises an answer instead of saying what is done."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return [text.splitlines()[0] for text in found if text and QUESTION.match(text)]


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_docstring_says_what_is_done(path: Path) -> None:
    assert riddles(path.read_text()) == []


def test_a_riddle_is_found() -> None:
    assert riddles('"""How it is."""\nclass A:\n    """As it was."""\n    def f(): "Whatever comes."') == [
        "How it is.",
        "As it was.",
    ]


def test_an_architecture_is_found() -> None:
    assert named_architectures("from transpixeler.families.wan import model") == ["wan"]
    assert named_architectures('"""A WanModel in."""') == ["wan"] and not named_architectures("what is wanted")


def test_the_top_level_holds_only_what_the_design_names() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    allowed = (
        "transpixeler configs tools tests Makefile pyproject.toml README.md LICENSE constraints.txt .ci .gitignore"
    )
    assert {line.split("/")[0] for line in listed.splitlines()} <= set(allowed.split())


# -- sizes


def long_functions(source: str) -> list[str]:
    """List the functions of more than forty lines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [node.name for node in found if (node.end_lineno or 0) - node.lineno >= 40]


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_fit_a_sitting(path: Path) -> None:
    source = path.read_text()
    assert long_functions(source) == [] and len(source.splitlines()) <= 400


def test_a_long_function_is_found() -> None:
    assert long_functions("def a():\n" + "    1\n" * 40) == ["a"] and not long_functions("def a():\n" + "    1\n" * 39)
