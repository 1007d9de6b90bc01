from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import slow_but
from helpers.stores import put_store

from mlpreduce import recipe as recipes
from mlpreduce.data.settings import AugmentSettings
from mlpreduce.errors import ReductionError
from mlpreduce.recipe.describe import describe
from mlpreduce.recipe.shelf import find, header

# SQLAlchemy about mlflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "recipes").rglob("*.toml"))
IN_PROCESS = (
    "launch.workers=0",
    "train.epochs=2",
    "train.batch_size=64",
    "model.kwargs.depth=2",
    "model.kwargs.embed_dim=16",
)


def test_names_come_from_the_folder() -> None:
    assert sorted(recipes.list_recipes()) == NAMES
    assert {"digits", "digits_tiny", "paper_vitb16", "paper_vitb16_tiny"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_tells_source_command_cost_and_numbers(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert "baseline" in recipe.variants
    lines = header(find(name))
    assert f"python -m mlpreduce.recipe {name}" in "\n".join(lines)
    assert any(line.startswith("Cost:") for line in lines)
    assert any(line.startswith("Expected:") for line in lines)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["digits", *(name for name in NAMES if name.endswith("_tiny"))],
        *("digits", "digits_tiny", "finetune_tiny", "fashion_tiny"),
    ),
)
def test_every_small_recipe_can_be_planned(name: str) -> None:
    text = describe(recipes.load(name))
    assert "effective batch" in text
    assert "unique MLPs" in text


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_tiny")])
def test_a_tiny_twin_has_the_same_keys(name: str) -> None:
    large, tiny = recipes.load(name), recipes.load(f"{name}_tiny")
    assert set(tiny.variants) <= set(large.variants)
    assert set(tiny.sweep) <= set(large.sweep)
    assert bool(tiny.sweep) == bool(large.sweep)
    missing = set(large.train.model_fields_set) - set(tiny.train.model_fields_set)
    assert set(tiny.train.model_fields_set) <= set(large.train.model_fields_set)
    # the digits are tensors already, and refuse what changes pictures
    assert missing <= (set(AugmentSettings.model_fields) if tiny.data.name == "digits" != large.data.name else set())


def test_published_run_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["paper_vitb16", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for number in (
        "parameters 86,567,656",
        "parameters 58,233,064",
        "parameters 58,237,672",
        "MLP parameters 28,334,592, unique MLPs 6",
        "16,867,412,736 in Linear, Conv and LayerNorm",
        "11,290,036,992",
        "1,024 = 2 worker(s) x 256 images x 2 accumulation step(s)",
        "1,251 an epoch x 300 epochs = 375,300",
        "1.000e-05, 2.080e-04, 4.060e-04, 6.040e-04, 8.020e-04, 9.993e-04",
        "last 2.7e-08",
    ):
        assert number in text


def test_published_settings_stand_in_the_recipe() -> None:
    recipe = recipes.load("paper_vitb16")
    train, data = recipe.train, recipe.data
    assert (train.random_erasing, train.label_smoothing, train.auto_augment) == (0.25, 0.1, "rand-m9-mstd0.5-inc1")
    assert (train.mixup, train.cutmix, train.mixup_prob, train.mixup_switch_prob, train.aug_repeats) == (
        0.8,
        1,
        1,
        0.5,
        3,
    )
    assert (train.crop_scale, train.hflip, train.train_interpolation) == ((0.08, 1.0), 0.5, "random")
    assert (train.amp, train.tf32, train.channels_last, train.clip_grad) == ("float16", True, True, 0)
    assert (data.mean, data.std, data.crop_pct, data.interpolation) == ((0.5,) * 3, (0.5,) * 3, 0.9, "bicubic")
    assert int(data.image_size / data.crop_pct) == 248
    assert recipe.variants["grouped"][0]["scale"] == "paper"


def test_overrides_are_toml_or_strings() -> None:
    changes = ["train.epochs=2", "train.warmup_epochs=0", "seeds=[1]", "data.root=/some/where", "launch.device=cpu"]
    changes += ['variants.mine=[{transform="grouped", group=3}]', "model.kwargs.depth=6"]
    recipe = recipes.load("digits", changes)
    assert (recipe.train.epochs, recipe.seeds, recipe.data.root, recipe.launch.device) == (
        2,
        (1,),
        "/some/where",
        "cpu",
    )
    assert recipe.variants["mine"] == ({"transform": "grouped", "group": 3},)
    assert recipe.model.kwargs["depth"] == 6
    with pytest.raises(ReductionError, match="write key=value"):
        recipes.load("digits", ["train.epochs"])
    with pytest.raises(ReductionError, match=r"train.epochs is no table"):
        recipes.load("digits", ["train.epochs.x=1"])


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(ReductionError) as caught:
        recipes.load("digits", ["train.epoch=3", "train.lr=-1", "launch.worker=2", "optim=1"])
    lines = str(caught.value).splitlines()
    assert "digits.train: unknown key 'epoch'; did you mean 'epochs'?" in lines
    assert "digits.launch: unknown key 'worker'; did you mean 'workers'?" in lines
    assert "digits.train.lr=-1: it must be at least 0" in lines
    assert any(line.startswith("digits: unknown key 'optim'") for line in lines)
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            'variants.x=[{transform="groupped"}]',
            r"digits.variants.x: unknown transform 'groupped'; did you mean 'grouped'",
        ),
        ('variants.x=[{transform="grouped", grup=2}]', r"unknown argument 'grup'; did you mean 'group'"),
        ("variants.x=[{group=2}]", "does not name its transform"),
        ('variants.x=[{transform="shallow"}, {transform="thin"}]', "must be the first step"),
        ('variants."a/b"=[]', "folder's too"),
        ("seeds=[1, 1]", "each once"),
        ("seeds=[1, -1]", "seeds are not negative"),
        ("train.warmup_epochs=99", "must be shorter"),
        ("train.batch_size=33", "32 or 34 would"),
    ],
)
def test_what_no_single_key_shows(change: str, message: str) -> None:
    if "a/b" in change:
        change = "variants.a/b=[]"
    with pytest.raises(ReductionError, match=message):
        recipes.load("digits", [change])


def test_seed_0_is_one() -> None:
    assert recipes.load("digits", ["seeds=[0, 1]"]).seeds == (0, 1)


def test_near_keys_of_the_recipe_itself_are_named() -> None:
    with pytest.raises(ReductionError, match=r"digits: unknown key 'seed'; did you mean 'seeds'\?"):
        recipes.load("digits", ["seed=[1]"])
    with pytest.raises(
        ReductionError, match=r"digits: unknown key 'nam'"
    ) as caught:  # the name is not the file's to give
        recipes.load("digits", ["nam=1"])
    assert "did you mean 'name'" not in str(caught.value)


def test_a_path_is_a_name_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((ROOT / "recipes" / "digits.toml").read_text() + "\n")
    assert recipes.load(str(path)).name == "mine"
    with pytest.raises(ReductionError, match="no such file"):
        recipes.load(str(tmp_path / "none.toml"))
    with pytest.raises(ReductionError, match="did you mean 'digits'"):
        recipes.load("digit")
    path.write_text("seeds = [")
    with pytest.raises(ReductionError, match="no valid TOML"):
        recipes.load(str(path))


@pytest.mark.processes
def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mlpreduce.recipe import main; main(['--list']);"
        "print(sorted({'torch','timm','ray','mlflow','matplotlib','sklearn','scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "paper_vitb16_tiny" in done.stdout


def test_errors_end_with_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["paper_vitb16"]) == 2
    assert capsys.readouterr().err.startswith("error: data.root='' is not set; it must hold train/ and val/")
    assert recipes.main(["digits", "train.epoch=1"]) == 2
    assert recipes.main([]) == 2


def test_resume_may_differ_only_in_what_changes_nothing() -> None:
    before = recipes.load("digits").model_dump(mode="json")
    free = ["launch.threads=2", "launch.workers=4", "launch.min_workers=1"]
    free += ["data.on_bad_image=skip", "train.accum_steps=4", "train.grad_checkpointing=true"]  # what errors recommend
    assert recipes.differences(before, recipes.load("digits", free).model_dump(mode="json")) == []
    now = recipes.load("digits", ["train.lr=0.1", "launch.workers=4", "launch.device=cpu"]).model_dump(mode="json")
    assert recipes.differences(before, now) == [
        "launch.device: was 'auto', is 'cpu'",
        f"train.lr: was {before['train']['lr']}, is 0.1",
    ]


@pytest.mark.slow
def test_a_recipe_from_start_to_report_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["digits_tiny", *IN_PROCESS, "--output", str(tmp_path / "out")]
    assert recipes.main([*arguments, "--resume"]) == 0  # nothing to resume: starts
    text = capsys.readouterr().out
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/out/mlflow.db" in text
    assert "run 4 of 4: grouped, seed 123, epoch 2/2" in text
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(document["variants"]) == ["baseline", "grouped"]
    assert [run["seed"] for run in document["variants"]["grouped"]["runs"]] == [42, 123]
    assert document["variants"]["grouped"]["unique_mlps"] == 1
    assert (tmp_path / "out" / "curves.png").is_file()
    assert (tmp_path / "out" / "grouped" / "seed42" / "model" / "model.safetensors").is_file()

    assert recipes.main(arguments) == 2
    assert "holds 4 finished or interrupted run(s); go on with --resume" in capsys.readouterr().err
    assert recipes.main([*arguments, "train.lr=0.1", "--resume"]) == 2
    assert "train.lr: was 0.005, is 0.1" in capsys.readouterr().err
    kept = (tmp_path / "out" / "recipe.json").read_bytes()
    for damaged in (kept[:100], b"\xff"):
        (tmp_path / "out" / "recipe.json").write_bytes(damaged)
        assert recipes.main([*arguments, "--resume"]) == 2
        assert "recipe.json is damaged" in capsys.readouterr().err
    (tmp_path / "out" / "recipe.json").write_bytes(kept)
    assert recipes.main([*arguments, "--resume"]) == 0  # all is finished: only the report is made again
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document


@pytest.mark.slow
def test_a_diverged_run_is_told_and_the_others_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["seeds=[1]", "train.lr=1e30", "train.warmup_epochs=0", "train.warmup_lr=1e30", "train.optimizer=sgd"]
    assert recipes.main(["digits_tiny", *IN_PROCESS, *changes, "--output", str(put_store(tmp_path))]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("A lower train.lr") == 2
    assert "no run finished" in text
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/seed1/record.json")]
    assert [record["status"] for record in records] == ["failed", "failed"]
