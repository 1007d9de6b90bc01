"""Files of one's own code: in recipes, searches, commands and saved models."""

from __future__ import annotations

import hashlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from helpers.fresh import python

import mlpreduce
from mlpreduce import plugins, recipe, registry
from mlpreduce.__main__ import main as command
from mlpreduce.criteria import register_criterion
from mlpreduce.errors import ReductionError
from mlpreduce.plugins import Plugin, load_plugins, read_plugin, run_plugins
from mlpreduce.recipe import running
from mlpreduce.recipe.schema import differences
from mlpreduce.records import StudyDocument
from mlpreduce.search import export
from mlpreduce.testing import check_transform, tiny_vit
from mlpreduce.train.events import Ended

# SQLAlchemy about mlflow's own tables
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.use_\\w+. is deprecated:DeprecationWarning"
    ),  # Ray, when it copies its own settings
    pytest.mark.usefixtures("one_thread"),
]

ROOT = Path(__file__).resolve().parents[1]

CODE = '''"""Code of one's own."""
import timm

import mlpreduce
from mlpreduce.criteria import register_criterion
from mlpreduce.edits import Share


@mlpreduce.register("own_ends", scope="chains")
def own_ends(parts, *, count=1):
    """Share the MLPs of the first and the last blocks."""
    for chain in parts.chains:
        for first, last in zip(chain[:count], chain[-count:], strict=True):
            for source, target in zip(first.leaves, last.leaves, strict=True):
                yield Share(source.path, target.path)


@register_criterion("own_norm")
def own_norm(units):
    """The norm of the unit's fc2 column."""
    return units.weights("fc2.weight").norm(dim=1)


@timm.models.register_model
def own_vit(pretrained=False, **kwargs):
    """A small ViT."""
    small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    build = timm.models.vision_transformer._create_vision_transformer
    return build("own_vit", pretrained=pretrained, **{**small, **kwargs})


mlpreduce.register_model("own_half", "vit_tiny_patch16_224", [("shallow", {"ratio": 0.5})])
'''

LAYER = '''
import torch
from torch import nn

import mlpreduce
from mlpreduce.edits import Replace
from mlpreduce.layers import StandIn, register_layer


@register_layer("own_doubled")
class Doubled(StandIn):
    """y = (W + W) x / 2 + b."""

    def __init__(self, like):
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().clone())
        self.bias = nn.Parameter(like.bias.detach().clone())
        self.out_features, self.in_features = like.weight.shape

    outputs = (("weight", 0), ("bias", 0))
    inputs = (("weight", 1),)

    @property
    def macs(self):
        return self.weight.numel(), 0

    @classmethod
    def in_place_of(cls, module):
        return cls(module)

    def forward(self, x):
        return nn.functional.linear(x, (self.weight + self.weight) / 2, self.bias)


@mlpreduce.register("own_layer")
def own_layer(parts, *, count=1):
    """Put a layer of one's own in the place of fc2."""
    for mlp in list(parts)[:count]:
        for leaf in mlp.leaves:
            if leaf.role == "fc2":
                tensors = parts.module(leaf.path)._parameters
                yield Replace(leaf.path, "own_doubled", {}, {name: t.detach() for name, t in tensors.items()})
'''

RECIPE = """
seeds = [1]
plugins = ["mine.py"]

[model]
name = "own_vit"
kwargs = { num_classes = 10 }

[data]
name = "digits"
image_size = 8
train_samples = 1437
val_samples = 360
workers = 0

[train]
epochs = 1
batch_size = 64
warmup_epochs = 0
ema_decay = 0.0

[launch]
workers = 0
threads = 1

[variants]
baseline = []
ends = [{ transform = "own_ends", count = 1 }]
narrow = [{ transform = "shallow", ratio = 0.5, criterion = "own_norm" }]
"""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for plugin in list(plugins._ran.values()):
        plugins._undo(plugin)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    return file


@pytest.fixture
def toml(mine: Path) -> Path:
    file = mine.with_name("mine.toml")
    file.write_text(RECIPE)
    return file


def names() -> tuple[bool, bool, bool, bool]:
    """Whether each name of CODE is there."""
    known = mlpreduce.list_transforms(), mlpreduce.list_criteria(), timm.list_models(), timm.list_models()
    wanted = ("own_ends", "own_norm", "own_vit", "own_half")
    return tuple(name in there for name, there in zip(wanted, known, strict=True))  # type: ignore[return-value]


# the file


def test_a_file_registers_what_it_has(mine: Path) -> None:
    assert names() == (False,) * 4
    (plugin,) = load_plugins([mine])
    assert names() == (True,) * 4
    assert plugin.digest == hashlib.sha256(mine.read_bytes()).hexdigest()
    assert str(plugin) == f"{mine} (sha256 {plugin.digest[:12]})"
    assert check_transform("own_ends", count=2).edits
    assert mlpreduce.plan(tiny_vit(), "shallow", criterion="own_norm").rows
    assert {registry.origin(kind, name) for kind, name in (("transform", "own_ends"), ("model", "own_half"))} == {
        plugin.origin
    }


def test_a_text_is_run_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    file = tmp_path / "mine.py"
    file.write_text(f"with open({str(count)!r}, 'a') as file:\n    file.write('x')\n")
    other = tmp_path / "other.py"
    other.write_text(file.read_text())
    assert len(load_plugins([file, file, other])) == 1
    load_plugins([other])
    assert count.read_text() == "x"


def test_it_needs_no_file_once_it_is_read(mine: Path) -> None:
    plugin = read_plugin(mine)
    mine.unlink()
    run_plugins([plugin])
    assert names() == (True,) * 4


def test_a_changed_file_replaces_what_it_had_registered(mine: Path) -> None:
    load_plugins([mine])
    mine.write_text(CODE.replace("own_ends", "own_two"))
    load_plugins([mine])
    assert "own_two" in mlpreduce.list_transforms()
    assert names() == (False, True, True, True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x = (", "SyntaxError: '(' was never closed"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("mlpreduce.register('grouped')(own_ends)", "register('grouped'): there is a transform of this name already"),
        ("register_criterion('l2')(own_norm)", "register_criterion('l2'): there is a criterion of this name already"),
        (
            "own_vit.__name__ = 'vit_tiny_patch16_224'; timm.models.register_model(own_vit)",
            "timm has a model of the name",
        ),
        ("mlpreduce.register_model('own_vit', 'vit_tiny_patch16_224', [('shallow', {})])", "choose another name"),
        ("mlpreduce.register('one')(lambda parts, ratio: ())", "its parameters are (parts, ratio); write (parts, *,"),
    ],
)
def test_a_broken_file_is_refused_with_its_line_and_leaves_nothing(line: str, reason: str, mine: Path) -> None:
    mine.write_text(f"{CODE}{line}\n")
    entry = timm.model_entrypoint("vit_tiny_patch16_224")
    for _ in range(2):
        with pytest.raises(ReductionError) as caught:
            load_plugins([mine])
        assert str(caught.value).startswith(f"plug-in {mine}, line {len(CODE.splitlines()) + 1}: ")
        assert reason in str(caught.value)
    assert names() == (False,) * 4
    assert timm.model_entrypoint("vit_tiny_patch16_224") is entry
    mine.write_text(CODE)  # repaired
    load_plugins([mine])
    assert names() == (True,) * 4


def test_a_change_that_fails_leaves_what_there_was(mine: Path) -> None:
    load_plugins([mine])
    mine.write_text(f"{CODE}1 / 0\n")
    with pytest.raises(ReductionError, match="ZeroDivisionError"):
        load_plugins([mine])
    assert names() == (True,) * 4


def test_a_change_that_fails_does_not_run_the_old_text_again(tmp_path: Path) -> None:
    """What ran once may fail now; and names that were deprecated, exported or given weights are as they were."""
    file, once = tmp_path / "mine.py", tmp_path / "once"
    once.touch()
    code = CODE + WEIGHTS + f"import pathlib\npathlib.Path({str(once)!r}).unlink()\n"
    file.write_text(code)
    load_plugins([file])
    before, ran = registered(), dict(plugins._ran)
    assert timm.models.is_model_pretrained("own_vit")
    assert timm.models.is_model("own_old_vit")
    for line, reason in (("1 / 0", "ZeroDivisionError"), ("mlpreduce.register('own_ends')(own_ends)", "own_ends")):
        file.write_text(f"{CODE.replace('own_norm', 'own_other')}{line}\n")
        with pytest.raises(ReductionError, match=reason):
            load_plugins([file])
        assert registered() == before
        assert plugins._ran == ran
    assert mlpreduce.plan(tiny_vit(), "shallow", criterion="own_norm").rows
    file.write_text(CODE)  # and it can still be replaced
    load_plugins([file])
    assert names() == (True,) * 4
    assert not timm.models.is_model("own_old_vit")


WEIGHTS = """
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from timm.models import vision_transformer

default_cfgs = generate_default_cfgs({"own_vit.mine": {"url": "https://example.org/own.pt"}})
timm.models._registry._model_entrypoints.pop("own_vit")
register_model(own_vit)
register_model_deprecations(__name__, {"own_old_vit": "own_vit"})
register_model_deprecations(vision_transformer.__name__, {"own_old_tiny": "vit_tiny_patch16_224"})
"""


def registered() -> dict[str, Any]:
    """All that knows a name, copied."""
    from timm.models import _registry, vision_transformer

    from mlpreduce import criteria, layers, transforms
    from mlpreduce.building import registration

    tables = {name: value for name, value in vars(_registry).items() if name.startswith("_model") or "deprec" in name}
    tables |= {
        "transforms": transforms.registry._TRANSFORMS,
        "criteria": criteria.registry._CRITERIA,
        "layers": layers.LAYERS,
    }
    tables |= {"origins": registry._origins, "cfgs": registration.default_cfgs, "modules": sys.modules}
    kept = {key: dict(value) for key, value in tables.items() if isinstance(value, dict)}
    nested = ("_module_to_models", "_module_to_deprecated_models")
    return {
        **{key: value for key, value in kept.items() if key not in nested},
        **{key: {name: sorted(inner) for name, inner in vars(_registry)[key].items() if inner} for key in nested},
        "pretrained": set(_registry._model_has_pretrained),
        "exports": [sorted(module.__all__) for module in (registration, vision_transformer)],
        "names": set(vars(registration)),
    }


def test_nothing_that_a_plugin_registered_is_left(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE + WEIGHTS)
    import mlpreduce.building.registration  # noqa: F401  (what is compared must be imported)

    before = registered()
    (plugin,) = load_plugins([file])
    assert timm.models.is_model("own_old_vit")  # which timm.list_models() leaves out
    plugins._undo(plugin)
    after = registered()
    assert {key: after[key] for key in after if after[key] != before[key]} == {}


def test_an_edit_of_a_file_that_has_the_text_of_another_replaces_it(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    for file in (one, other):
        file.write_text(CODE)
        load_plugins([file])
    other.write_text(f"{CODE}# edited\n")
    load_plugins([other])
    assert names() == (True,) * 4
    assert registry.origin("transform", "own_ends") == read_plugin(other).origin
    with pytest.raises(ReductionError, match=r"there is a .* of this name already, of .*other\.py \(sha256 "):
        load_plugins([one])  # two texts with the same names
    one.write_text(other.read_text())
    load_plugins([one, other])
    assert names() == (True,) * 4


def test_a_file_that_takes_the_text_of_another_loses_its_own(tmp_path: Path) -> None:
    one, two, three = tmp_path / "one.py", tmp_path / "two.py", tmp_path / "three.py"
    own = CODE.replace("own_ends", "own_two").partition("@register_criterion")[0]
    one.write_text(own)
    three.write_text(own)
    two.write_text(CODE)
    load_plugins([one, two, three])
    one.write_text(CODE)
    load_plugins([one])
    assert "own_two" in mlpreduce.list_transforms()  # of three.py
    three.write_text(CODE)
    load_plugins([three])
    assert "own_two" not in mlpreduce.list_transforms()
    assert names() == (True,) * 4


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("none.py", "there is no such file"),
        ("folder", "it is a folder"),
        ("a.toml", "a plug-in must be a .py file"),
        ("a\0.py", "no file can be opened by this name"),
        (f"{'m' * 300}.py", "no file can be opened by this name"),
        ("a.toml/b.py", "there is no such file"),
        ("binary.py", "UTF-8"),
    ],
)
def test_what_is_no_python_file_is_refused(name: str, fact: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.toml").touch()
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ReductionError, match=fact) as caught:
        load_plugins([name], tmp_path)
    assert repr(name)[1:-1] in str(caught.value)


def test_a_text_that_is_not_that_of_its_digest_is_refused() -> None:
    with pytest.raises(ReductionError, match="it was changed"):
        Plugin("/mine.py", "x = 1\n", "0" * 64)


def test_what_a_plugin_imports_is_not_taken_back(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module stays imported, so its names would never come again."""
    (tmp_path / "own_library.py").write_text(CODE.partition("@register_criterion")[0])
    monkeypatch.syspath_prepend(tmp_path)
    mine.write_text("import own_library\n1 / 0\n")
    with pytest.raises(ReductionError, match="line 2"):
        load_plugins([mine])
    assert names() == (True, False, False, False)
    del sys.modules["own_library"], mlpreduce.transforms.registry._TRANSFORMS["own_ends"]


# recipes


def test_paths_are_relative_to_the_recipe(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = recipe.load(str(toml))
    assert [plugin.path for plugin in found.plugins] == [str(toml.with_name("mine.py"))]
    (elsewhere / "other.py").write_text("x = 1\n")
    overridden = ["plugins=['other.py']", "model.name=vit_tiny_patch16_224", "variants={baseline=[]}"]
    assert [Path(plugin.path) for plugin in recipe.load(str(toml), overridden).plugins] == [elsewhere / "other.py"]
    more = recipe.load(str(toml), plugins=["other.py", toml.with_name("mine.py")]).plugins
    assert [Path(plugin.path).name for plugin in more] == ["mine.py", "other.py"]
    changed = recipe.changed(found, {"plugins": ["other.py", "../mine.py"], "train.lr": 0.1})
    assert [Path(plugin.path).name for plugin in changed.plugins] == ["other.py", "mine.py"]


@pytest.mark.parametrize("value", ['"mine.py"', "[1]", "{a=1}"])
def test_plugins_are_a_list_of_files(value: str, toml: Path) -> None:
    with pytest.raises(ReductionError, match="must be a list of files"):
        recipe.load(str(toml), [f"plugins={value}"])


def test_a_recipe_without_its_plugin_is_refused(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml.with_name("mine.py").unlink()
    assert recipe.main([str(toml), "--dry-run"]) == 2
    assert "plug-in 'mine.py': there is no such file" in capsys.readouterr().err


def test_a_criterion_that_does_not_exist_is_refused_when_the_recipe_is_read(toml: Path) -> None:
    text = RECIPE.replace('"own_norm"', '"own_nrm"')
    toml.write_text(text)
    with pytest.raises(ReductionError, match="unknown criterion 'own_nrm'; did you mean 'own_norm'"):
        recipe.load(str(toml))


def test_dry_run_names_the_file(toml: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main([str(toml), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"plug-in {read_plugin(mine)}\n")
    assert "own_ends(count=1)" in text


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("yield Share(source.path, target.path)", "own_ends(count=1): the transform"),
        ('return build("own_vit", pretrained=pretrained, **{**small, **kwargs})', "variant baseline"),
    ],
)
def test_code_that_fails_when_it_is_used_is_found_before_the_first_epoch(
    line: str, fact: str, toml: Path, mine: Path, tmp_path: Path
) -> None:
    mine.write_text(CODE.replace(line, "undefined()"))
    found = recipe.load(str(toml))
    with pytest.raises(ReductionError, match="NameError: name 'undefined' is not defined") as caught:
        running.train(found, tmp_path / "out")
    assert fact in str(caught.value)
    assert str(found.plugins[0]) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_transform_of_this_process_does_not_reach_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce import criteria, transforms

    monkeypatch.setattr(transforms.registry, "_TRANSFORMS", dict(transforms.registry._TRANSFORMS))
    monkeypatch.setattr(criteria.registry, "_CRITERIA", dict(criteria.registry._CRITERIA))
    mlpreduce.register("here_only")(lambda parts, *, ratio=0.5: ())
    register_criterion("here_norm")(lambda units: units.weights().norm(dim=1))
    for variant in ('{transform="here_only"}', '{transform="shallow", criterion="here_norm"}'):
        found = recipe.load("digits_tiny", [f"variants={{baseline=[], own=[{variant}]}}"])
        with pytest.raises(ReductionError, match="so Ray's workers do not have it; put the code into a file") as caught:
            running.train(found, tmp_path / "out")
        assert "variant own" in str(caught.value)
        assert f"was registered by {__name__} in this process, " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_of_this_process_does_not_reach_ray(toml: Path, mine: Path, tmp_path: Path) -> None:
    load_plugins([mine])
    found = recipe.load(str(toml), ["plugins=[]", "launch.workers=2", "variants={baseline=[]}"])
    with pytest.raises(
        ReductionError, match=r"the model 'own_vit' was registered by the plug-in .*mine.py .*does not name, so"
    ):
        running.train(found, tmp_path / "out")


def test_a_changed_file_is_another_recipe_and_a_moved_one_is_not(toml: Path, mine: Path, tmp_path: Path) -> None:
    before = recipe.load(str(toml)).model_dump(mode="json")
    moved = tmp_path / "moved"
    moved.mkdir()
    mine.rename(moved / "own.py")
    again = recipe.load(str(toml), [f"plugins=['{moved}/own.py']"])
    assert differences(before, again.model_dump(mode="json")) == []
    (moved / "own.py").write_text(f"{CODE}# changed\n")
    for plugin in list(plugins._ran.values()):
        plugins._undo(plugin)
    now = recipe.load(str(toml), [f"plugins=['{moved}/own.py']"])
    (line,) = differences(before, now.model_dump(mode="json"))
    was, is_now = before["plugins"][0]["digest"][:12], now.plugins[0].digest[:12]
    assert line == f"plugins: was {mine} (sha256 {was}), is {moved}/own.py (sha256 {is_now})"
    assert differences({k: v for k, v in before.items() if k != "plugins"}, before) == [
        f"plugins: was none, is {mine} (sha256 {was})"
    ]
    run, other = (recipe.runs(found, ".")[0] for found in (again, now))
    assert run.config_hash != other.config_hash
    bare = run.model_copy(update={"plugins": ()})
    assert bare.config_hash == bare.model_copy(update={"directory": "/elsewhere"}).config_hash != run.config_hash


@pytest.mark.slow
def test_a_recipe_trains_records_and_resumes_with_its_plugin(
    toml: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert recipe.main([str(toml), "--output", str(out)]) == 0
    plugin = read_plugin(mine)
    assert f"plug-in {plugin}\n" in capsys.readouterr().out
    wanted = {"path": str(mine), "digest": plugin.digest, "source": CODE}
    assert json.loads((out / "recipe.json").read_text())["plugins"] == [wanted]
    records = [json.loads(path.read_text()) for path in out.glob("*/seed1/record.json")]
    assert len(records) == 3
    assert all(record["recipe"]["plugins"] == [wanted] and record["status"] == "finished" for record in records)
    variants = json.loads((out / "results.json").read_text())["variants"]
    assert variants["ends"]["unique_mlps"] == 1
    assert variants["narrow"]["mlp_params"] < variants["baseline"]["mlp_params"]
    mine.write_text(f"{CODE}# changed\n")
    assert recipe.main([str(toml), "--output", str(out), "--resume"]) == 2
    error = capsys.readouterr().err
    assert plugin.digest[:12] in error
    assert read_plugin(mine).digest[:12] in error
    mine.write_text(CODE)
    assert recipe.main([str(toml), "--output", str(out), "--resume"]) == 0


# commands


def test_commands_take_plugins(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["list", "--json", "--plugin", str(mine)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["transforms"]["own_ends"] == {"count": 1}
    assert "own_norm" in listed["criteria"]
    assert command(["plan", "own_vit", "own_ends", "--plugin", str(mine)]) == 0
    assert "own_ends()" in capsys.readouterr().out
    assert command(["profile", "own_vit", "own_ends", "--json", "--plugin", str(mine)]) == 0
    assert json.loads(capsys.readouterr().out)["unique_mlps"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["plan", "vit_tiny_patch16_224", "grouped"],
        ["profile", "vit_tiny_patch16_224"],
        ["recipe", "digits_tiny"],
        ["search", "width"],
        ["coverage"],
        ["bench", "apply"],
        ["bench", "criteria"],
        ["bench", "search"],
    ],
    ids=" ".join,
)
def test_a_missing_plugin_is_refused_by_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*words, "--plugin", "nowhere.py"]) == 2
    assert capsys.readouterr().err.startswith("error: plug-in 'nowhere.py': there is no such file")


# saved models


def saved(folder: Path, code: str, work: str) -> None:
    """Save a model in a process of its own, which runs `code` as the plug-in mine.py."""
    (folder / "mine.py").write_text(code)
    script = (
        f"import mlpreduce\nfrom mlpreduce.testing import tiny_vit\nmlpreduce.plugins.load_plugins(['mine.py'])\n{work}"
    )
    done = python("-c", script, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.processes
def test_structure_needs_no_plugin(tmp_path: Path) -> None:
    work = "model = tiny_vit()\nmlpreduce.apply(model, 'own_ends')\nmlpreduce.apply(model, 'shallow', criterion='own_norm')\n"
    saved(tmp_path, CODE, f"{work}mlpreduce.save(model, 'model')")
    assert names() == (False,) * 4
    model: Any = mlpreduce.load(tmp_path / "model")
    assert model.blocks[3].mlp.fc1 is model.blocks[0].mlp.fc1
    assert model.blocks[0].mlp.fc1.out_features == 64
    assert [made.transform for made in mlpreduce.history(model)] == ["own_ends", "shallow"]


def test_a_layer_names_the_plugin_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LAYER)
    (plugin,) = load_plugins(["mine.py"], tmp_path)
    check_transform("own_layer", count=2)
    model = mlpreduce.apply(tiny_vit(), "own_layer")
    mlpreduce.save(model, tmp_path / "model")
    plugins._undo(plugin)
    with pytest.raises(ReductionError) as caught:
        mlpreduce.load(tmp_path / "model")
    for fact in ("'own_doubled'", f"plug-in mine.py (sha256 {plugin.digest[:12]})", "load_plugins(['mine.py'])", "fc2"):
        assert fact in str(caught.value)
    load_plugins(["mine.py"], tmp_path)
    again: Any = mlpreduce.load(tmp_path / "model")
    assert type(again.blocks[0].mlp.fc2).__name__ == "Doubled"


def test_an_architecture_names_the_plugin_that_it_needs(mine: Path, tmp_path: Path) -> None:
    (plugin,) = load_plugins([mine])
    mlpreduce.save(mlpreduce.create_model("own_vit", "shallow"), tmp_path / "model")
    plugins._undo(plugin)
    with pytest.raises(ReductionError, match=r"no architecture 'own_vit': it is of the plug-in mine.py \(sha256"):
        mlpreduce.load(tmp_path / "model")
    load_plugins([mine])
    assert mlpreduce.load(tmp_path / "model").blocks[0].mlp.fc1.out_features == 32


@pytest.mark.parametrize("name", [3, "low_rank", "own"])
def test_a_layer_is_checked_when_it_is_registered(name: Any) -> None:
    from torch import nn

    from mlpreduce.layers import LAYERS, register_layer

    with pytest.raises(ReductionError, match=f"register_layer\\({name!r}\\)"):
        register_layer(name)(nn.Linear)
    assert name not in LAYERS or name == "low_rank"


# exported recipes


def test_an_exported_recipe_carries_its_plugins(toml: Path, mine: Path, tmp_path: Path) -> None:
    found = recipe.load(str(toml))
    folder = tmp_path / "best"
    folder.mkdir()
    (plugin,) = found.plugins
    name = f"mine-{plugin.digest[:8]}.py"
    (folder / name).write_text("# edited by hand\n")
    point = {
        "name": "trial 3",
        "kind": "trial",
        "front": True,
        "state": "complete",
        "settings": {"train.lr": 0.25},
        "steps": [{"transform": "own_ends", "count": 1}],
        "runs": [{"top1": 50.0, "seed": 1}],
        "cost": {"params": 1, "macs": 1},
    }
    settings = {"seeds": [1], "inherit": "none"}
    names_of_it = {"schema": 1, "study": "any", "space": "any", "recipe": "mine", "objectives": [{"name": "top1"}]}
    document = StudyDocument.model_validate({"points": [point], "settings": settings, **names_of_it})
    mine.unlink()
    plugins._undo(plugin)  # exporting runs no code
    (path,) = export.write_best(document, found, folder)
    (again,) = export.write_best(document, found, folder)
    assert again == path
    assert names() == (False,) * 4
    assert (folder / name).read_text() == "# edited by hand\n"
    assert tomllib.loads(path.read_text())["plugins"] == [name.replace(".py", "-2.py")]
    loaded = recipe.load(str(path))
    assert names() == (True,) * 4
    assert (loaded.train.lr, list(loaded.variants), loaded.plugins[0].digest) == (
        0.25,
        ["baseline", "trial-3"],
        plugin.digest,
    )
    with pytest.raises(ReductionError, match="add --output FILE"):
        export.originals(found)
    mine.write_text(CODE)
    assert export.originals(found) == [str(mine)]


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_needs_no_file_in_another_process(toml: Path, mine: Path, tmp_path: Path) -> None:
    runs = recipe.runs(recipe.load(str(toml)), tmp_path / "out")
    (tmp_path / "runs.json").write_text(json.dumps([run.model_dump(mode="json") for run in runs]))
    mine.unlink()
    script = (
        "import json\n"
        "from mlpreduce.launch.here import train_all\n"
        "from mlpreduce.plugins import run_plugins\n"
        "from mlpreduce.train import Runtime\n"
        "from mlpreduce.train.names import check_known, names_of\n"
        "from mlpreduce.train.settings import Run\n"
        "runs = [Run.model_validate(run) for run in json.load(open('runs.json'))]\n"
        "for run in runs:\n"
        "    run_plugins(run.plugins)\n"
        "check_known([name for run in runs for name in names_of(run)])\n"
        "train_all(runs, Runtime(report=lambda event: print(event.what, event.variant), threads=1))\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {f"{Ended('finished')} {variant}" for variant in ("baseline", "ends", "narrow")} <= set(
        done.stdout.splitlines()
    )


# on Ray

SPACE = """
def suggest(trial):
    return [("own_ends", {"count": trial.suggest_int("count", 1, 2)})]
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_recipe_trains_under_ray_with_two_workers(toml: Path, tmp_path: Path) -> None:
    both = "variants={both=[{transform='own_ends'}, {transform='shallow', ratio=0.5, criterion='own_norm'}]}"
    found = recipe.load(str(toml), ["launch.workers=2", "train.batch_size=32", both])
    toml.with_name("mine.py").unlink()  # workers are sent its text
    assert running.train(found, tmp_path / "out") == 0
    variants = json.loads((tmp_path / "out" / "results.json").read_text())["variants"]
    assert {name: variant["unique_mlps"] for name, variant in variants.items()} == {"both": 1}
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/seed1/record.json")]
    assert {entry["workers"] for entry in record["epochs"]} == {2}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_workers_cannot_run_is_refused_before_the_first_epoch(toml: Path, mine: Path, tmp_path: Path) -> None:
    """The file asks for what is in this process only, so only a worker can tell."""
    mine.write_text(f"import sys\n\nassert hasattr(sys, 'only_here')\n{CODE}")
    sys.only_here = True  # type: ignore[attr-defined]
    try:
        found = recipe.load(str(toml), ["launch.workers=2"])
        with pytest.raises(ReductionError, match=r"plug-in .*mine.py, line 3: AssertionError"):
            running.train(found, tmp_path / "out")
    finally:
        del sys.only_here  # type: ignore[attr-defined]
    assert not list((tmp_path / "out").glob("*/seed*/record.json"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.ray)])
def test_a_search_uses_a_plugin(
    workers: int, toml: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlpreduce.search import run

    (tmp_path / "space.py").write_text(SPACE)
    overrides = ["model.kwargs={num_classes=10, depth=4}", "variants={baseline=[]}"]
    settings: dict[str, Any] = {"trials": 2, "references": ("baseline",), "seeds": (1,)}
    output = tmp_path / "study"
    document = run(tmp_path / "space.py", str(toml), overrides=overrides, output=output, workers=workers, **settings)
    assert f"plug-in {read_plugin(mine)}" in capsys.readouterr().out
    trials = [point for point in document["points"] if point["kind"] == "trial"]
    assert {point["steps"][0]["transform"] for point in trials} == {"own_ends"}
    assert all(point["values"]["top1"] >= 0 for point in trials)
    exported = next((output / "best").glob("*.toml"))
    moved = tmp_path / "moved"
    (output / "best").rename(moved)
    assert recipe.load(str(moved / exported.name)).plugins[0].digest == read_plugin(mine).digest
    mine.write_text(f"{CODE}# changed\n")
    with pytest.raises(ReductionError, match=r"plugins: was .*mine.py .*, is .*mine.py"):
        run(tmp_path / "space.py", str(toml), overrides=overrides, output=output, workers=0, resume=True, **settings)


def test_a_space_with_a_transform_of_this_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce import transforms
    from mlpreduce.search import run

    monkeypatch.setattr(transforms.registry, "_TRANSFORMS", dict(transforms.registry._TRANSFORMS))
    (tmp_path / "space.py").write_text(CODE.partition("@register_criterion")[0] + SPACE)
    with pytest.raises(ReductionError, match="so Ray's workers do not have it; put the code into a file"):
        run(tmp_path / "space.py", "digits_tiny", output=tmp_path / "study", workers=1, references=("baseline",))
    assert not (tmp_path / "study").exists()
