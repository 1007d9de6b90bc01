"""Measure what the tests notice: draw faults by a seed, put each into a copy of the project, run the tests that reach it.

    python tests/mutation.py cover                      # which test executes which line; runs the default selection once
    python tests/mutation.py cover -m "slow or processes or ray or postgres"   # adds the other tests
    python tests/mutation.py draw --count 40 --seed 0   # shows the faults, changes nothing
    python tests/mutation.py run --count 40 --seed 0    # runs them; goes on where it was stopped

A fault is one change of one place in a line that the default selection executes: another comparison, another sign, a number
that is off by one, a statement that is left out, or two arguments that have changed places. Every room of the package
(a folder of it, or the modules beside them) has at least one. Faults listed in `mutation_equivalent.json` change nothing that
can be observed; each has its reason there, and the next fault is drawn instead.

For each fault the tests that execute its line run until the first failure, the quickest first: those of the default
selection, and only if none of them fails, the others. A test counts only if it passes without the fault. Faults are put into
copies of what is committed, so nothing else may have changed, and what is known of another commit is not used.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlpreduce"
EQUIVALENT = Path(__file__).with_name("mutation_equivalent.json")
DEFAULT = "default"  # the selection of a plain `pytest`

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
_DROPPED = (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)
_PHASE = re.compile(r" \((setup|call|teardown)\)$")  # of a test, which its name ends with
_ANY_ORDER = ("max", "min")  # the order of their arguments does not matter
_ONE_ORDER = ("isinstance", "issubclass", "getattr", "setattr", "hasattr", "cast")  # any other one fails at once


@dataclass(frozen=True)
class Fault:
    """One change of one place."""

    path: str  # of the file, from the root of the project
    line: int
    column: int
    operator: str
    before: str
    after: str

    @property
    def room(self) -> str:
        """The folder of the package, or "modules" for what lies beside the folders."""
        parts = Path(self.path).parts
        return parts[1] if len(parts) > 2 else "modules"

    @property
    def name(self) -> str:
        """A name that outlives changes of other lines."""
        return f"{self.path} {self.operator}: {self.before} -> {self.after}"


@dataclass
class Outcome:
    """What became of a fault."""

    fault: Fault
    caught_by: str = ""  # the test that failed first
    selection: str = ""  # that of the test
    tests: dict[str, int] = field(default_factory=dict)  # tests that reach the line, by selection
    seconds: float = 0.0


def faults(path: Path, lines: set[int]) -> Iterator[Fault]:
    """All faults of a file on these lines."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    skipped = {id(node) for part in _no_code(tree) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped or getattr(node, "lineno", None) not in lines:
            continue
        for operator, changed in _changes(node):
            before = ast.get_source_segment(text, node) or ""
            yield Fault(
                str(path.relative_to(ROOT)), node.lineno, node.col_offset, operator, before, ast.unparse(changed)
            )


def _no_code(tree: ast.AST) -> Iterator[ast.AST]:
    """What is written as code and computes nothing: annotations, `__all__`, imports for types, docstrings."""
    for node in ast.walk(tree):
        for part in ("annotation", "returns"):
            if (found := getattr(node, part, None)) is not None:
                yield found
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield node
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                yield node
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may be put in the place of a node, with the operator's name."""
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[number] = _COMPARISONS[type(operator)]()
            yield "comparison", changed
    elif (
        isinstance(node, ast.BinOp) and type(node.op) in _SIGNS and not _is_text(node.left) and not _is_text(node.right)
    ):
        changed = copy.deepcopy(node)
        changed.op = _SIGNS[type(node.op)]()
        yield "sign", changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield "off by one", ast.Constant(node.value + 1)
    elif isinstance(node, _DROPPED):
        yield "dropped statement", ast.Pass()
    elif isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func) not in _ANY_ORDER + _ONE_ORDER:
        first, second = node.args[:2]
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            changed = copy.deepcopy(node)
            changed.args[:2] = [changed.args[1], changed.args[0]]
            if ast.dump(changed) != ast.dump(node):
                yield "swapped argument", changed


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def changed_text(fault: Fault, root: Path = ROOT) -> str:
    """The file with the fault in it."""
    text = (root / fault.path).read_text(encoding="utf-8")
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    begin = starts[fault.line - 1] + fault.column
    raw, before = text.encode(), fault.before.encode()
    if raw[begin : begin + len(before)] != before:
        raise SystemExit(f"{fault.path}:{fault.line} is not as it was when the fault was drawn; run `cover` again")
    after = fault.after if fault.operator == "dropped statement" else f"({fault.after})"
    return (raw[:begin] + after.encode() + raw[begin + len(before) :]).decode()


def draw(count: int, seed: int, covered: dict[str, set[int]], equivalent: set[str]) -> list[Fault]:
    """Faults by a seed: one of each room, then any; each time an operator is drawn first, then a place for it."""
    chance = random.Random(seed)
    every: dict[str, dict[str, list[Fault]]] = {}  # by room and operator
    for path in sorted(covered):
        for found in faults(ROOT / path, covered[path]):
            if found.name not in equivalent:
                every.setdefault(found.room, {}).setdefault(found.operator, []).append(found)
    chosen: list[Fault] = []
    waiting = sorted(every, reverse=True)
    while len(chosen) < count and every:
        room = waiting[-1] if waiting else chance.choice(sorted(every))
        operator = chance.choice(sorted(every[room]))
        places = every[room][operator]
        found = places.pop(chance.randrange(len(places)))
        if not places:
            del every[room][operator]
        if _parses(found):
            chosen.append(found)
            waiting = waiting[:-1]
        if not every[room]:
            del every[room]
            waiting = [one for one in waiting if one != room]
    return chosen


def _parses(fault: Fault) -> bool:
    """Whether the change is Python at all: a call in a `with`, or a part of an f-string, may not be."""
    try:
        ast.parse(changed_text(fault))
    except (SyntaxError, SystemExit):
        return False
    return True


def cover(data: Path, marks: str | None) -> int:
    """Run tests once and note which executes which line, and how long each takes."""
    name = marks or DEFAULT
    place = data / name.replace(" ", "_")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    settings = place / "coveragerc"
    settings.write_text(
        f"[run]\nsource = {PACKAGE}\ndata_file = {place / 'coverage'}\nparallel = true\npatch = subprocess\n"
        "context = ${PYTEST_CURRENT_TEST-}\ndisable_warnings = no-data-collected, module-not-imported\n"
    )
    command = [
        sys.executable,
        "-m",
        "coverage",
        "run",
        f"--rcfile={settings}",
        "-m",
        "pytest",
        "-q",
        "-p",
        "mutation_contexts",
    ]
    command += ["-p", "no:cacheprovider", f"--junitxml={place / 'times.xml'}", "-o", "junit_family=xunit1"]
    command += ["-m", marks] if marks else []
    command += ["-n", "0"] if marks and "ray" in marks else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    combine = [sys.executable, "-m", "coverage", "combine", "--quiet", f"--rcfile={settings}"]
    subprocess.run(combine, cwd=ROOT, check=True)
    lines = _lines(place / "coverage")
    tests = sorted({test for found in lines.values() for contexts in found.values() for test in contexts})
    number = {test: index for index, test in enumerate(tests)}
    short = {p: {line: [number[t] for t in contexts] for line, contexts in found.items()} for p, found in lines.items()}
    document = {"commit": commit(), "tests": tests, "lines": short, "seconds": _times(place / "times.xml")}
    (data / f"{place.name}.json").write_text(json.dumps({"selection": name, **document}))
    print(f"{name}: {sum(map(len, lines.values()))} lines executed; pytest ended with {status}")
    return status


def _lines(file: Path) -> dict[str, dict[int, list[str]]]:
    from coverage import CoverageData

    data = CoverageData(str(file))
    data.read()
    found: dict[str, dict[int, list[str]]] = {}
    for name in data.measured_files():
        path = str(Path(name).relative_to(ROOT))
        by_line = data.contexts_by_lineno(name)
        found[path] = {
            line: sorted({_PHASE.sub("", context) for context in contexts})
            for line, contexts in sorted(by_line.items())
        }
    return found


def _times(file: Path) -> dict[str, float]:
    found = {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        found[f"{case.get('file')}::{case.get('name')}"] = float(case.get("time") or 0)
    return found


def reaching(fault: Fault, covered: dict[str, Any]) -> list[str]:
    """Tests of a selection that execute the fault's line, the quickest first."""
    lines, names = covered["lines"].get(fault.path, {}), covered["tests"]
    tests = {names[index] for index in lines.get(str(fault.line), [])}
    if "" in tests:  # executed while something was imported, or by a process of all tests: whatever uses the file
        tests |= {names[index] for found in lines.values() for index in found}
    tests.discard("")
    seconds = covered["seconds"]
    return sorted(tests, key=lambda test: (seconds.get(test, 1.0), test))


def run(chosen: list[Fault], selections: list[dict[str, Any]], results: Path, jobs: int, limit: int) -> list[Outcome]:
    """Run the tests that reach each fault, until the first failure."""
    known = {json.dumps(entry["fault"]): entry for entry in _read(results)}
    copies: Queue[Path] = Queue()

    def one(fault: Fault) -> Outcome:
        if (entry := known.get(json.dumps(asdict(fault)))) is not None:
            return Outcome(fault, **{name: value for name, value in entry.items() if name != "fault"})
        folder = copies.get()
        try:
            outcome = _try(fault, folder, selections, limit)
        finally:
            copies.put(folder)
        with results.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(f"{outcome.caught_by or 'SURVIVED':<60} {fault.path}:{fault.line} {fault.operator}", flush=True)
        return outcome

    with tempfile.TemporaryDirectory(prefix="mutation", ignore_cleanup_errors=True) as scratch:
        for number in range(jobs):
            folder = Path(scratch) / str(number)
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
            copies.put(folder)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, chosen))


def _try(fault: Fault, folder: Path, selections: list[dict[str, Any]], limit: int) -> Outcome:
    outcome, begun = Outcome(fault), time.monotonic()
    file = folder / fault.path
    whole = file.read_text(encoding="utf-8")
    faulty = changed_text(fault, folder)
    for covered in selections:
        tests = reaching(fault, covered)[:limit]
        outcome.tests[covered["selection"]] = len(tests)
        while tests:
            file.write_text(faulty, encoding="utf-8")
            try:
                found = _first_failure(tests, folder)
            finally:
                file.write_text(whole, encoding="utf-8")
            if not found:
                break
            if found not in tests or not _first_failure(
                [found], folder
            ):  # all of them, or one that passes without the fault
                outcome.caught_by, outcome.selection = found, covered["selection"]
                break
            print(f"{found} fails without a fault too, and does not count", flush=True)
            tests.remove(found)
        if outcome.caught_by:
            break
    outcome.seconds = round(time.monotonic() - begun, 1)
    return outcome


def _first_failure(tests: list[str], folder: Path) -> str:
    """The first test that fails; "collection" if the package no longer imports, "timeout" if it never ends, "" if all pass."""
    report = folder / "failure.xml"
    report.unlink(missing_ok=True)
    listed = folder / "tests.txt"
    listed.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
    command += ["--timeout=300", f"--junitxml={report}", "-o", "junit_family=xunit1", f"@{listed}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests")])}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=3600
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return ""
    if done.returncode == 5 or "ERROR: not found:" in done.stdout + done.stderr:
        raise SystemExit(f"tests are not as they were; run `cover` again:\n{(done.stdout + done.stderr)[-2000:]}")
    if report.is_file():
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
                return name if name in tests else "collection"
    return "collection" if done.returncode in (2, 3, 4) else "timeout"


def commit() -> str:
    """The commit that is checked out; nothing else may lie in the package or the tests.

    Raises:
        SystemExit: something was changed since.
    """
    found = subprocess.run(
        ["git", "status", "--porcelain", "mlpreduce", "tests"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    if found:
        raise SystemExit(f"commit these first, or take them back:\n{found}")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    return head.stdout.strip()


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["cover", "draw", "run"])
    parser.add_argument("-m", dest="marks", help="cover: the tests with these marks, instead of the default selection")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "mutation", help="where what is known is kept")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--limit", type=int, default=10**6, help="tests of a selection that are run at most")
    options = parser.parse_args()
    data = options.data.resolve()
    head = commit()
    if options.verb == "cover":
        return cover(data, options.marks)
    selections = [json.loads(path.read_text()) for path in data.glob("*.json")]
    selections = [covered for covered in selections if covered["commit"] == head]
    selections.sort(key=lambda covered: covered["selection"] != DEFAULT)
    if not selections or selections[0]["selection"] != DEFAULT:
        parser.error("run `cover` first")
    lines = {path: set(map(int, found)) for path, found in selections[0]["lines"].items()}
    equivalent = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.is_file() else {}
    chosen = draw(options.count, options.seed, lines, set(equivalent))
    if options.verb == "draw":
        for fault in chosen:
            print(f"{fault.path}:{fault.line} {fault.operator}: {fault.before!r} -> {fault.after!r}")
        return 0
    results = data / f"outcomes_{head[:12]}_{options.seed}.jsonl"
    outcomes = run(chosen, selections, results, options.jobs, options.limit)
    quick = sum(outcome.selection == DEFAULT for outcome in outcomes)
    whole = sum(bool(outcome.caught_by) for outcome in outcomes)
    print(f"\n{len(outcomes)} faults: {quick} caught by the default selection, {whole} by all tests")
    for outcome in outcomes:
        if not outcome.caught_by:
            fault = outcome.fault
            print(f"survived: {fault.path}:{fault.line} {fault.operator}: {fault.before!r} -> {fault.after!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
