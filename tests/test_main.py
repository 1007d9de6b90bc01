"""The command line, and the three ways the package is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlpreduce.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "grouped(group=2, pattern='sequence'" in text
    assert "Share MLP weights between blocks of one stage." in text
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["transforms"]["thin"] == {"mlp_ratio": 2.0}
    assert {"digits", "digits_tiny", "paper_vitb16", "paper_vitb16_tiny"} <= set(found["recipes"])


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vit_base_patch16_224", "grouped", "group=3", "scale=paper"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("grouped(group=3, scale='paper')")
    assert "model: 86,567,656 -> 48,788,200 parameters (-43.64%)" in text
    words = ["plan", "vit_tiny_patch16_224", "depth=4", "shallow", "width=64", "--exclude", "blocks.0.*", "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["edits"]) == 3
    assert document["left_out"] == {"blocks.0.mlp": "in exclude"}


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "vit_base_patch16_224", "thin", "mlp_ratio=2.0", "grouped", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == 58_237_672 - 6 * (2 * 768 * 1536 + 1536 + 768)
    assert main(["profile", "vit_tiny_patch16_224", "depth=1", "img_size=32", "--measure", "--batch-size", "2"]) == 0
    assert "images/s (batch 2, cpu, float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "vit_bse_patch16_224", "grouped"], "no architecture 'vit_bse_patch16_224'; did you mean"),
        (["plan", "vit_tiny_patch16_224", "groupd"], "unknown transform 'groupd'; did you mean 'grouped'?"),
        (["plan", "vit_tiny_patch16_224", "grouped", "group=5"], "grouped(group=5): 12 MLPs do not split"),
        (["plan", "vit_tiny_patch16_224", "depth=4"], "no transform; give one"),
        (["plan", "vit_tiny_patch16_224", "shallow", "criterion=l2"], "the model is on the meta device"),
        (["profile", "vit_tiny_patch16_224", "dept=3"], "timm cannot build vit_tiny_patch16_224 with {'dept': 3}"),
        (["profile", "vit_tiny_patch16_224", "shallow", "=3"], "'=3' is not an option with its value"),
        (["recipe", "digit"], "did you mean 'digits'?"),
    ],
)  # fmt: skip
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def run(arguments: list[str], cwd: Path, path: Path | None = None) -> str:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd, env=environment).stdout


@pytest.mark.processes
@pytest.mark.slow
def test_recipes_are_found_from_a_wheel(tmp_path: Path) -> None:
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    run(build, tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mlpreduce/recipes/digits.toml" in names
    assert "mlpreduce/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mlpreduce").rglob("*.py")}
    modules |= {f"mlpreduce/search_spaces/{path.name}" for path in (ROOT / "search_spaces").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in names} == {
        "mlpreduce",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from mlpreduce.recipe import list_recipes; print(*list_recipes().values())"
    text = run(["-c", code], tmp_path, tmp_path / "site")
    assert str(tmp_path / "site" / "mlpreduce" / "recipes" / "digits.toml") in text
    assert "joint" in run(["-m", "mlpreduce.search", "--list"], tmp_path, tmp_path / "site")


@pytest.mark.processes
def test_recipes_are_found_from_a_checkout(tmp_path: Path) -> None:
    """Without an install: a copy of the checkout on the path, and nothing else of it."""
    import shutil

    for folder in ("mlpreduce", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
    code += "from mlpreduce.recipe import list_recipes; print(*list_recipes().values())"
    assert str(tmp_path / "recipes" / "digits.toml") in run(["-c", code], tmp_path)
