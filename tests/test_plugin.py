"""Transforms of other packages: installed beside the library, and used by its name in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fresh import ROOT, python

import mlpreduce
from mlpreduce import registry, transforms

# one that registers itself, under another name than its entry point's, and one that is a plain function
PLUGIN = '''
import mlpreduce
from mlpreduce.edits import Share


@mlpreduce.register("tie_ends", scope="chains")
def tie_ends(parts, *, count=1):
    """Share the MLPs of the first and the last blocks."""
    for chain in parts.chains:
        for first, last in zip(chain[:count], chain[-count:], strict=True):
            for source, target in zip(first.leaves, last.leaves, strict=True):
                yield Share(source.path, target.path)


def cut_last(parts, *, ratio=0.5):
    """Slice the last MLP."""
    yield parts.slice(parts[-1], range(int(parts[-1].hidden_features * ratio)))
'''

RECIPE = """
seeds = [1]

[model]
name = "vit_tiny_patch16_224"
kwargs = { img_size = 8, patch_size = 4, embed_dim = 12, depth = 2, num_heads = 2, num_classes = 2 }

[data]
name = "synthetic"
image_size = 8
classes = 2
train_samples = 8
val_samples = 8
workers = 0

[train]
epochs = 1
batch_size = 8
warmup_epochs = 0
ema_decay = 0.0

[launch]
workers = 0

[variants]
tied = [{ transform = "tie_ends", count = 1 }]
cut = [{ transform = "cut_last", ratio = 0.25 }]
"""


def install(site: Path, package: str, code: str, entries: dict[str, str]) -> None:
    """What pip leaves of a package of one module: the module, and its metadata with the entry points."""
    metadata = site / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{package}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    points = [f"{name} = {package}:{function}" for name, function in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[mlpreduce.transforms]", *points, ""]))
    (metadata / "RECORD").write_text("")


def run(site: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return python(*arguments, cwd=cwd, paths=[site])


def output(site: Path, *arguments: str, cwd: Path = ROOT) -> str:
    done = run(site, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "acme_transforms", PLUGIN, {"ends": "tie_ends", "cut_last": "cut_last"})
    return folder


@pytest.mark.processes
def test_it_is_listed_by_the_name_it_registers(site: Path) -> None:
    assert not {"tie_ends", "cut_last"} & set(mlpreduce.list_transforms())
    text = output(site, "-m", "mlpreduce", "list")
    assert "  tie_ends(count=1)\n      Share the MLPs of the first and the last blocks.\n" in text
    assert "  cut_last(ratio=0.5)\n      Slice the last MLP.\n" in text
    assert "  ends(" not in text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tie_ends", "count=2"], "tie_ends(count=2)"),
        (["cut_last", "ratio=0.25"], "11 blocks.11.mlp plain 768 -> 192 295,872 -> 74,112"),
    ],
)
def test_its_parameters_are_arguments_of_the_command_line(site: Path, words: list[str], line: str) -> None:
    lines = output(site, "-m", "mlpreduce", "plan", "vit_tiny_patch16_224", *words).splitlines()
    assert line in [" ".join(text.split()) for text in lines]


@pytest.mark.processes
def test_it_keeps_the_contract(site: Path) -> None:
    code = (
        "from mlpreduce.testing import check_transform\n"
        "print(len(check_transform('tie_ends', count=2).edits), len(check_transform('cut_last').edits))\n"
        "check_transform('tie_ends', cout=2)"
    )
    done = run(site, "-c", code)
    assert done.stdout == "4 1\n", done.stderr
    assert "tie_ends(cout=2): unknown argument 'cout'; did you mean 'count'?" in done.stderr


@pytest.mark.processes
@pytest.mark.slow
def test_it_is_a_variant_of_a_recipe(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE)
    output(site, "-m", "mlpreduce", "recipe", "mine.toml", "--output", "out", cwd=tmp_path)
    variants = json.loads((tmp_path / "out" / "results.json").read_text())["variants"]
    mlp = 2 * 12 * 48 + 48 + 12
    assert {name: (v["mlp_params"], v["unique_mlps"]) for name, v in variants.items()} == {
        "tied": (mlp, 1),
        "cut": (mlp + 2 * 12 * 12 + 12 + 12, 2),
    }
    record = json.loads((tmp_path / "out" / "cut" / "seed1" / "record.json").read_text())
    assert record["status"] == "finished"


REGISTERS = "import mlpreduce\n\n\n@mlpreduce.register({!r})\ndef mine(parts, *, ratio=0.5):\n    return ()\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("packages", "taken"),
    [
        ({"acme": ("def mine(parts):\n    return ()\n", "grouped")}, "grouped"),
        ({"acme": (REGISTERS.format("shallow"), "mine")}, "shallow"),
        ({"acme": (REGISTERS.format("same"), "same"), "zeta": ("def mine(parts):\n    return ()\n", "same")}, "same"),
    ],
)
def test_a_name_that_is_taken_raises(packages: dict[str, tuple[str, str]], taken: str, tmp_path: Path) -> None:
    for package, (code, name) in packages.items():
        install(tmp_path, package, code, {name: "mine"})
    done = run(tmp_path, "-m", "mlpreduce", "list")
    assert done.returncode == 2, done.stderr
    assert f"register({taken!r}): there is a transform of this name already" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("other = 1\n", "AttributeError: module 'acme' has no attribute 'mine'"),
        ("mine = 3\n", "register('made'): 3 is no function"),
        ("def mine(parts, ratio=0.5):\n    return ()\n", "its parameters are (parts, ratio=0.5); write (parts, *,"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_named_each_time(code: str, reason: str, tmp_path: Path) -> None:
    install(tmp_path, "acme", code, {"made": "mine"})
    script = (
        "import mlpreduce\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        mlpreduce.list_transforms()\n"
        "    except mlpreduce.ReductionError as error:\n"
        "        print(error)\n"
    )
    first, second = output(tmp_path, "-c", script).splitlines()
    assert first == second
    assert first.startswith("the transform 'made' of the package acme cannot be loaded: ")
    assert reason in first


@pytest.mark.processes
def test_an_entry_point_may_be_a_module_that_registers(tmp_path: Path) -> None:
    install(tmp_path, "acme", REGISTERS.format("mine"), {})
    (tmp_path / "acme-1.0.dist-info" / "entry_points.txt").write_text("[mlpreduce.transforms]\nanything = acme\n")
    assert "  mine(ratio=0.5)" in output(tmp_path, "-m", "mlpreduce", "list")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("result", "fact"), [("[5]", "the transform gave 5; edits are"), ("None", "nothing would change")]
)
def test_what_is_no_edit_is_refused(result: str, fact: str, tmp_path: Path) -> None:
    install(tmp_path, "acme", f"def mine(parts, *, ratio=0.5):\n    return {result}\n", {"made": "mine"})
    script = (
        "import mlpreduce\nfrom mlpreduce.testing import tiny_vit\n"
        "try:\n    mlpreduce.apply(tiny_vit(), 'made')\nexcept mlpreduce.ReductionError as error:\n    print(error)\n"
    )
    assert fact in output(tmp_path, "-c", script)


def test_a_function_of_another_package_comes_from_the_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker finds it by the entry point too, wherever the function is defined."""
    names = ("plain", "registers", "imported_before")
    decorators = ("", "@mlpreduce.register('registers')\n", "@mlpreduce.register('imported_before')\n")
    for name, decorator in zip(names, decorators, strict=True):
        (tmp_path / f"acme_{name}_core.py").write_text(
            f"import mlpreduce\n\n\n{decorator}def mine(parts, *, ratio=0.5):\n    return ()\n"
        )
        install(tmp_path, f"acme_{name}", f"from acme_{name}_core import mine\n", {name: "mine"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_added", registry._added - {"transform"})
    monkeypatch.setattr(registry, "_origins", dict(registry._origins))
    monkeypatch.setattr(transforms.registry, "_TRANSFORMS", dict(transforms.registry._TRANSFORMS))
    for module in (f"acme_{name}{end}" for name in names for end in ("", "_core")):
        monkeypatch.setitem(sys.modules, module, None)  # so that they are taken away again
        del sys.modules[module]
    registry._packages.cache_clear()
    __import__("acme_imported_before_core")
    found = registry.origin("transform", "imported_before")
    assert found is not None
    assert found.kind == "process"
    assert set(names) <= set(mlpreduce.list_transforms())
    for name in names:
        assert registry.origin("transform", name) == registry.Origin("entry points", f"acme_{name}")
    mlpreduce.register("of_this_test")(lambda parts, *, ratio=0.5: ())
    found = registry.origin("transform", "of_this_test")
    assert found is not None
    assert found.kind == "process"
    registry._packages.cache_clear()
