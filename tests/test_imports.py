"""Who may import whom, and what `import mlpreduce` costs."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlpreduce

PACKAGE = Path(mlpreduce.__file__).parent

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
# a module may import those in lines above its own, and those of its own line
ORDER = [
    re.split(r",\s*", re.split(r"\s{2,}", line)[0])
    for line in DESIGN.read_text("utf-8").split("```")[1].split("\n")
    if line
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
OWNERS = {"ray": "launch", "mlflow": "records", "matplotlib": "report", "optuna": "search", "torch_pruning": "bench"}
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "ray",
    "optuna",
    "mlflow",
    "matplotlib",
    "sklearn",
    "pandas",
    "scipy",
    "pydantic",
)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room(path) not in ("recipes", "search_spaces"))


NAMES = {
    ".".join(("mlpreduce", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}


def imported(path: Path) -> set[str]:
    """Modules, or packages whose names are taken, also those that are imported late or for types alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            taken = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            inside = node.module == "mlpreduce"
            names |= {whole if inside or whole in NAMES else node.module for whole in taken.values()}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    mine = room(path)
    if mine == "__init__":
        return  # names only, each loaded when first used
    for name in imported(path):
        if name.split(".")[0] == "mlpreduce":
            other = name.split(".")[1] if name.split(".")[1:] and name.split(".")[1] in RANK else "__init__"
            assert RANK[other] <= RANK[mine], f"{mine} imports {other}"
        owner = OWNERS.get(name.split(".")[0])
        assert owner in (None, mine), f"{mine} imports {name}"


def arrows() -> dict[str, set[str]]:
    """From each room to those that it imports, without those that follow from others."""
    found: dict[str, set[str]] = {name: set() for name in RANK}
    for name, path in NAMES.items():
        taken = {room(NAMES[other]) for other in imported(path) & NAMES.keys()} - {"__init__", room(path)}
        found[room(path)] |= taken if name != "mlpreduce" else set()
    beyond: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(found).static_order():
        beyond[name] = found[name].union(*(beyond[other] for other in found[name]))
    return {name: some - set().union(*(beyond[other] for other in some)) for name, some in found.items()}


def test_the_picture_is_drawn_from_the_imports() -> None:
    drawn = [f"    {name} --> {other}" for name, others in sorted(arrows().items()) for other in sorted(others)]
    assert "flowchart BT\n" + "\n".join(drawn) in DESIGN.read_text("utf-8"), "\n".join(drawn)


def test_every_room_has_its_floor() -> None:
    assert RANK.keys() == {room(path) for path in FILES}


def test_transforms_and_surgery_do_not_know_each_other() -> None:
    for path in FILES:
        if room(path) == "surgery":
            assert not any("transforms" in name for name in imported(path))
        if room(path) in ("transforms", "criteria"):
            assert not any("surgery" in name for name in imported(path))


def test_no_files_import_each_other() -> None:
    graph = {name: imported(path) & NAMES.keys() for name, path in NAMES.items() if name != "mlpreduce"}
    graphlib.TopologicalSorter({name: found - {"mlpreduce"} for name, found in graph.items()}).prepare()


def test_a_folder_in_a_room_and_what_lies_beside_it_do_not_import_each_other() -> None:
    def part(path: Path) -> Path:
        inside = path.relative_to(PACKAGE / room(path)).parts
        return PACKAGE / room(path) / inside[0] if inside else path

    graph: dict[Path, set[Path]] = {}
    for path in FILES:
        if path.parent != PACKAGE:
            taken = {NAMES[name] for name in imported(path) & NAMES.keys() if NAMES[name].parent != PACKAGE}
            graph.setdefault(part(path), set()).update({part(other) for other in taken} - {part(path)})
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_no_module_has_the_name_of_a_function_of_its_package(path: Path) -> None:
    package = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(package) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(package):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in NAMES}
    public = set(mlpreduce.__all__) if path.parent == PACKAGE else set()
    assert not {each.stem for each in path.parent.iterdir()} & (names | public)


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    return set(result.stdout.split())


@pytest.mark.processes
def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import mlpreduce") == set()
    assert loaded_after("import mlpreduce, mlpreduce.errors; mlpreduce.ReductionError; dir(mlpreduce)") == set()


@pytest.mark.processes
def test_apply_on_a_users_own_model_loads_no_timm() -> None:
    code = (
        "import torch, mlpreduce\n"
        "class Own(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)\n"
        "    def forward(self, x):\n"
        "        return x + self.down(self.up(x).relu())\n"
        "mlpreduce.apply(Own(), 'shallow')\n"
    )
    assert loaded_after(code) == {"torch"}


def test_every_public_name_loads_and_is_documented() -> None:
    for name in mlpreduce.__all__:
        assert getattr(mlpreduce, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        mlpreduce.aply  # noqa: B018


def test_modules_are_small() -> None:
    long = {str(path.relative_to(PACKAGE)): n for path in FILES if (n := len(path.read_text().splitlines())) > 500}
    assert long == {}
