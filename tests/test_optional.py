"""Where an optional package is missing, one ReductionError names the extra and the command that installs it."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.outcome import outcome

import mlpreduce
from mlpreduce.errors import EXTRAS, ReductionError, missing, optional, require

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(mlpreduce.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# modules whose distribution has another name, and those that come with another distribution, which requires it
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
COMES_WITH = {"pillow": "torchvision", "sqlalchemy": "optuna"}


def distribution(requirement: str) -> str:
    """Name of a requirement, as pip compares them."""
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


CORE = {distribution(text) for text in PROJECT["dependencies"]}
EXTRA_OF = {
    distribution(text): extra
    for extra, texts in PROJECT["optional-dependencies"].items()
    for text in texts
    if extra not in ("dev", "all") and distribution(text) != "mlpreduce"
}


def source_of(module: str) -> str:
    """The distribution that a top-level module comes from, or with."""
    name = distribution(DISTRIBUTIONS.get(module, module))
    return COMES_WITH.get(name, name)


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports when it runs, those of `optional` and `require` too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional":
            found.add(ast.literal_eval(node.args[1]))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"mlpreduce"}


OPTIONAL = sorted(
    {module for path in PACKAGE.rglob("*.py") for module in imported(path) if source_of(module) not in CORE}
    | {module for module in EXTRAS if source_of(module) not in CORE}
)


def test_every_optional_import_has_its_extra_in_the_table() -> None:
    assert {"ray", "mlflow", "optuna", "sklearn", "matplotlib", "torch_pruning", "sqlalchemy"} <= set(OPTIONAL)
    assert {module: EXTRAS.get(module) for module in OPTIONAL} == {
        module: EXTRA_OF.get(source_of(module)) for module in OPTIONAL
    }


def test_every_package_of_an_extra_is_in_the_table() -> None:
    assert set(EXTRA_OF) - CORE <= {source_of(module) for module in EXTRAS}


def test_what_comes_with_another_package_is_required_by_it() -> None:
    for name, owner in COMES_WITH.items():
        assert name in {distribution(text) for text in importlib.metadata.requires(owner) or ()}


def test_the_first_command_of_the_readme_installs_what_its_commands_need() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = re.findall(r'pip install -c constraints\.txt -e "\.\[(\w+)\]"', text)
    assert extras == ["all", "dev"]
    known = PROJECT["optional-dependencies"]
    assert re.findall(r"\w+", known["all"][0])[1:] == ["train", "search"]
    # the peer is not among them: its extra stands beside the command
    (line,) = [line for line in text.splitlines() if "--peer torch-pruning" in line]
    assert '".[bench]"' in line


def test_the_message() -> None:
    text = str(missing("mlpreduce search", "optuna.trial"))
    assert text == (
        'mlpreduce search needs optuna, which is not installed: pip install "mlpreduce[search]", or from a checkout '
        'pip install -e ".[search]"'
    )


def test_require_and_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for call in (lambda: optional("this", "optuna.trial"), lambda: require("this", "onnx", "optuna")):
        with pytest.raises(ReductionError, match=r"^this needs optuna"):
            call()
    assert optional("this", "sklearn.utils").__name__ == "sklearn.utils"


def test_a_folder_of_the_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "webdataset").mkdir()  # such as one of data
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "webdataset", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ReductionError, match=r"^this needs webdataset, which is not installed"):
        require("this", "webdataset")


@pytest.mark.parametrize(
    ("status", "printed", "text"),
    [
        (0, "", ""),
        (None, "", ""),
        (2, "error: no", "refused: no"),
        (1, "worse", "broken: status 1: worse"),
        (2, "", "broken: status 2: nothing was printed"),
        (SystemExit(2), "error: usage", "refused: usage"),
        (SystemExit(2), "", "broken: status 2: nothing was printed"),
        (SystemExit("done for"), "", "broken: status 1: done for"),
        (SystemExit(), "", ""),
        (ReductionError("not so"), "", "refused: not so"),
        (KeyError("x"), "", "broken: KeyError: 'x'"),
    ],
)
def test_what_a_case_came_to(status: int | BaseException | None, printed: str, text: str) -> None:
    def call() -> int | None:
        print(printed, end="", file=sys.stderr)
        if isinstance(status, BaseException):
            raise status
        return status

    assert outcome(call) == text


TRAIN, SEARCH, BENCH, ONNX, DATA = "train", "search", "bench", "onnx", "data"
# case of helpers/without_packages.py -> the extra that it names, or None where it works
EXPECTED = {
    **dict.fromkeys(["list", "plan", "profile", "recipe --list", "recipe --dry-run", "search --list"]),
    **dict.fromkeys(["recipe", "recipe workers=0", "recipe synthetic", "report"], TRAIN),
    **dict.fromkeys(["search", "search workers=0", "search show", "search export", "search compare"], SEARCH),
    **dict.fromkeys(["bench apply", "bench gram_schmidt", "bench latency", "bench layers"]),
    **{"bench apply --peer": BENCH, "bench search": SEARCH, "bench criteria": TRAIN},
    **dict.fromkeys(["save_and_load", "grouped_align_mean", "grouped_match_forward", "grouped_similarity"]),
    **dict.fromkeys(["every_criterion_and_repair", "block_orders", "latency_table", "examine", "summarize"]),
    **{"to_onnx": ONNX, "search_run": SEARCH, "search_names": None, "report_build": TRAIN},
    **{"report_console_table": None, "recorder": TRAIN, "execute_on_ray": TRAIN, "pool": TRAIN},
    **{"fit_digits": TRAIN, "fit_synthetic": None, "data_digits": TRAIN, "data_hfds": DATA, "data_wds": DATA},
}
# one package alone: module -> cases that must name it; nothing has been trained by then
ALONE = {
    "ray": ["recipe", "search", "bench search", "execute_on_ray", "pool"],
    "mlflow": ["recipe", "recipe workers=0", "search", "search_run", "bench search", "recorder"],
    "matplotlib": ["recipe", "search", "search_run", "report", "report_build"],
    "sklearn": ["recipe", "recipe workers=0", "bench criteria", "fit_digits", "data_digits"],
    "optuna": ["search", "search compare", "search_run", "bench search"],
    "onnxscript": ["to_onnx"],
    "onnx": ["to_onnx"],
    "psycopg": ["storage_postgresql"],
    "torch_pruning": ["bench apply --peer"],
    "datasets": ["data_hfds"],
    "webdataset": ["data_wds"],
}


@pytest.mark.slow
@pytest.mark.processes
def test_every_command_and_call_works_or_names_the_extra(tmp_path: Path) -> None:
    stages = [",".join(OPTIONAL)]
    stages += [f"{module}={';'.join(cases)}" for module, cases in ALONE.items() if module in OPTIONAL]
    script = Path(__file__).parent / "helpers" / "without_packages.py"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    result = subprocess.run(
        [sys.executable, str(script), *stages], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    wrong = []
    for hidden, name, problem in found:
        alone = hidden in ALONE
        extra = EXTRAS[hidden] if alone else EXPECTED.get(name)
        if not alone and name == "storage_postgresql":
            continue  # that one is asked for with Optuna
        package = re.escape(hidden) if alone else r"\w+"
        wanted = "" if extra is None else rf'refused: .+ needs {package}, .*"mlpreduce\[{extra}\]".* -e "\.\[{extra}\]"'
        if not re.fullmatch(wanted, problem):
            wrong.append((hidden, name, problem))
    assert wrong == []
    assert {name for hidden, name, _ in found if hidden == stages[0]} - {"storage_postgresql"} == set(EXPECTED)
