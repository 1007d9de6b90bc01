"""Trained weights before the reduction, and distillation from the unreduced model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow_but
from helpers.records import a_record
from helpers.runs import SMALL_VIT, digits_run, finetune, interrupt_after, last, same, state, tensors, without_drop_path
from safetensors.torch import load_file, save_file
from torch import nn

import mlpreduce
from mlpreduce import recipe as recipes
from mlpreduce.building.checkpoint import read_tensors
from mlpreduce.errors import ReductionError
from mlpreduce.recipe.describe import describe
from mlpreduce.records import Record
from mlpreduce.report.gathering import differing
from mlpreduce.testing import tiny_vit
from mlpreduce.train import Runtime, build_model, fit
from mlpreduce.train.distillation import as_teacher, blend
from mlpreduce.train.settings import TrainSettings
from mlpreduce.train.setup import prepare
from mlpreduce.train.weights import locate, start_digest

pytestmark = pytest.mark.usefixtures("one_thread")

ALIGNED = {"transform": "grouped", "group": 2, "scale": "none", "keep": "align_mean"}
SLICED = {"transform": "shallow", "ratio": 0.5, "criterion": "l2"}
SOFT = {"distillation": "soft", "distill_tau": 2.0}


# --- weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".", "model", "weights.safetensors", "model/model.safetensors"])
def test_weights_are_loaded_exactly(trained: Path, tmp_path: Path, kind: str) -> None:
    known = load_file(trained / "weights.safetensors")
    found = tensors(build_model(finetune(tmp_path, trained / kind)))
    assert found.keys() == known.keys()
    assert all(torch.equal(found[name], known[name]) for name in known)


def test_what_timm_calls_pretrained_is_loaded(trained: Path, tmp_path: Path) -> None:
    overlay = {"file": str(trained / "weights.safetensors"), "num_classes": 10, "input_size": [1, 8, 8]}
    run = finetune(tmp_path, "pretrained", ALIGNED)
    run = run.model_copy(
        update={"model": run.model.model_copy(update={"kwargs": {**SMALL_VIT, "pretrained_cfg_overlay": overlay}})}
    )
    same(tensors(build_model(run)), tensors(build_model(finetune(tmp_path, trained, ALIGNED))))


def test_pretrained_weights_that_cannot_be_had_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def refuse(*_: Any, pretrained: bool, **__: Any) -> nn.Module:
        raise RuntimeError("size mismatch\nfor many tensors") if pretrained else AssertionError

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ReductionError, match=r"cannot load any into vit_tiny.*embed_dim=16.*: size mismatch; choose"):
        build_model(finetune(tmp_path, "pretrained"))


@pytest.mark.parametrize("step", [ALIGNED, SLICED], ids=["grouped", "shallow"])
def test_the_reduction_acts_on_the_loaded_weights(trained: Path, tmp_path: Path, step: dict[str, Any]) -> None:
    by_hand = mlpreduce.load(trained / "model")
    mlpreduce.apply(by_hand, **step)
    found = build_model(finetune(tmp_path, trained, step))
    same(tensors(found), tensors(by_hand))
    assert [plan.to_json() for plan in mlpreduce.history(found)] == [p.to_json() for p in mlpreduce.history(by_hand)]
    mlpreduce.save(found, tmp_path / "saved")
    same(tensors(mlpreduce.load(tmp_path / "saved")), tensors(found))


def test_loading_draws_nothing_and_keeps_the_models_dtypes(trained: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(trained / "weights.safetensors").items()}
    save_file(half, tmp_path / "half.safetensors")
    build_model(finetune(tmp_path, ""))
    before = torch.get_rng_state()
    model = build_model(finetune(tmp_path, tmp_path / "half.safetensors"))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float()), name


def test_a_model_without_memory_reads_no_weights(tmp_path: Path) -> None:
    for weights in ("pretrained", tmp_path / "none", tmp_path / "none.pth"):
        model = build_model(finetune(tmp_path, weights, SLICED | {"criterion": "first"}), device="meta")
        assert model.blocks[0].mlp.fc1.weight.is_meta


def altered(trained: Path, folder: Path, change: str) -> Path:
    """A file of the trained weights in which something is wrong."""
    content = load_file(trained / "weights.safetensors")
    if change == "shape":
        content["head.weight"] = torch.zeros(3, 16)
    elif change == "missing":
        del content["head.weight"], content["fc_norm.weight"]
    elif change == "unknown":
        content |= {f"extra.{number}": torch.zeros(1) for number in range(5)}
    save_file(content, folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"1 of \d+ tensors of another shape \(head.weight is \(3, 16\) there and \(10, 16\) here\)"),
        ("missing", r"2 of \d+ tensors missing \(fc_norm.weight, head.weight\)"),
        ("unknown", r"5 of \d+ tensors unknown \(extra.0, extra.1, extra.2, ...\)"),
    ],
)
def test_weights_of_another_model_are_refused(trained: Path, tmp_path: Path, change: str, message: str) -> None:
    run = finetune(tmp_path, altered(trained, tmp_path, change))
    with pytest.raises(ReductionError, match=rf"not the weights of vit_tiny.*{message}.*num_classes, img_size"):
        build_model(run)


def test_a_reduced_model_is_refused(trained: Path, tmp_path: Path) -> None:
    mlpreduce.save(build_model(finetune(tmp_path, trained, ALIGNED, SLICED)), tmp_path / "run" / "model")
    for place in ("run", "run/model", "run/model/model.safetensors"):
        with pytest.raises(
            ReductionError, match=r"reduced already, by grouped\(group=2, .*then shallow\(.*baseline/seedN"
        ):
            build_model(finetune(tmp_path, tmp_path / place))


def test_a_tensor_that_the_unreduced_model_ties_is_read_under_each_name(tmp_path: Path) -> None:
    """Some models are built with ties; a saved file names them once, and aliases."""
    model = tiny_vit()
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1
    mlpreduce.save(model, tmp_path, build=False)
    found = read_tensors(tmp_path / "model.safetensors", "any")
    same(dict(sorted(found.items())), dict(sorted(tensors(model).items())))


def test_damaged_files_are_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes((trained / "weights.safetensors").read_bytes()[:-9])
    with pytest.raises(ReductionError, match=r"cut.safetensors cannot be read as safetensors"):
        build_model(finetune(tmp_path, tmp_path / "cut.safetensors"))
    shutil.copytree(trained / "model", tmp_path / "model")
    shutil.copy(altered(trained, tmp_path, "shape"), tmp_path / "model" / "model.safetensors")
    with pytest.raises(ReductionError, match=r"damaged or from another save"):
        build_model(finetune(tmp_path, tmp_path / "model"))


def test_paths_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    give = r'give "pretrained".*runs/NAME/VARIANT/seedN.*mlpreduce.save.*safetensors'
    with pytest.raises(ReductionError, match=rf"no such file or folder; {give}[^`]*$"):
        locate(tmp_path / "nowhere")
    with pytest.raises(ReductionError, match=r"no such.*`python -m mlpreduce.recipe digits_tiny` trains"):
        locate(tmp_path / "runs" / "digits_tiny" / "baseline" / "seed42")
    with pytest.raises(ReductionError, match=rf"neither mlpreduce.json nor model/mlpreduce.json.*{give}"):
        locate(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ReductionError, match=rf"it is no .safetensors file; {give}"):
        locate(tmp_path / "notes.txt")
    for name in ("a.pth", "a.pt", "a.bin", "A.PTH"):
        torch.save({}, tmp_path / name)
        with pytest.raises(ReductionError, match=r"pickle.*safetensors.torch.save_file.*[aA].safetensors"):
            locate(tmp_path / name)


def test_thin_is_refused_without_a_recipe_too(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ReductionError, match=r"narrower MLPs that thin builds; slice them with shallow"):
        build_model(finetune(tmp_path, trained, {"transform": "thin", "mlp_ratio": 2.0}))


def test_workers_that_read_other_weights_stop(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def gather(every: list[Any], mine: Any) -> None:
        every[:] = [mine, "another"]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    run = finetune(tmp_path, trained)
    with pytest.raises(ReductionError, match=r"not the same on all 2 workers \(digests \w+, another\)"):
        start_digest(build_model(run), run, Runtime(world=2))


# --- recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.distillation=soft", "model.weights="], r"train.distillation='soft': there is no trained teacher"),
        (
            ['variants.x=[{transform="thin"}]'],
            r"variants.x: model.weights='runs/.*thin builds; slice them with shallow",
        ),
        (["model.weights=a/b.pth"], r"model.weights='a/b.pth': .*pickle.*'b.safetensors'.*model.weights that file"),
        (["model.kwargs.checkpoint_path=b.bin"], r"checkpoint_path='b.bin': .*pickle.*model.weights that file"),
        (["model.kwargs.checkpoint_path=b"], r"checkpoint_path='b': .*pickle"),
        (["train.distill_alpha=1.5"], r"distill_alpha=1.5: it must be at most 1"),
        (["train.distill_tau=0"], r"distill_tau=0: it must be above 0"),
        (["train.distill_tau=inf"], r"distill_tau=inf: it must be a finite number"),
    ],
)
def test_recipes_are_refused_when_they_are_read(changes: list[str], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        recipes.load("finetune_tiny", changes)
    recipes.load("finetune_tiny", ["model.kwargs.checkpoint_path=b.npz", "train.distillation=hard"])


def test_the_missing_baseline_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert recipes.main(["finetune_tiny"]) == 2
    assert "`python -m mlpreduce.recipe digits_tiny` trains what lies in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (run, *_) = recipes.runs(recipes.load("finetune_tiny"), "out")
    assert run.model.weights == str(tmp_path / "runs/digits_tiny/baseline/seed42")


def cost(text: str, variant: str) -> float:
    lines = text[text.index("cost:") :].splitlines()
    return float(next(line for line in lines if line.split()[0] == variant).split()[1])


@pytest.mark.slow
def test_the_dry_run_tells_weights_distillation_and_the_teachers_cost() -> None:
    plain = describe(recipes.load("finetune_tiny"))
    assert "initial weights  runs/digits_tiny/baseline/seed42 (not read here)" in plain
    assert "distillation     none" in plain
    text = describe(recipes.load("finetune_tiny", ["train.distillation=soft", "train.distill_tau=3"]))
    assert "distillation     soft, alpha 0.5, temperature 3; teacher: the unreduced model" in text
    assert "829,920 MACs an image more" in text
    images = 3 * (1437 // 32) * 32
    for variant, macs in (("baseline", 829_920), ("shallow", 567_776)):
        assert cost(plain, variant) == pytest.approx(3 * macs * images, rel=1e-3)
        assert cost(text, variant) == pytest.approx((3 * macs + 829_920) * images, rel=1e-3)
    assert "random, from the seed" in describe(recipes.load("digits_tiny"))
    pretrained = recipes.load("finetune_tiny", ["model.weights=pretrained"])
    assert "timm's pretrained ones of vit_tiny_patch16_224" in describe(pretrained)


def test_outputs_from_before_these_keys_go_on(tmp_path: Path) -> None:
    now = recipes.load("digits_tiny").model_dump(mode="json")
    before = {**now, "model": dict(now["model"]), "train": dict(now["train"])}
    del before["model"]["weights"]
    for key in ("distillation", "distill_alpha", "distill_tau"):
        del before["train"][key]
    assert recipes.differences(before, now) == []
    other = recipes.load("digits_tiny", ["model.weights=pretrained"]).model_dump(mode="json")
    assert recipes.differences(before, other) == ["model.weights: was '', is 'pretrained'"]
    # the hash that the version before these keys gave this run
    assert digits_run(tmp_path).config_hash == "69e7700faaa1ba0f"
    soft = finetune(tmp_path, "a", **SOFT)
    for changed in ({"distill_alpha": 0.1}, {"distill_tau": 1.5}, {"distillation": "hard"}):
        train = soft.train.model_copy(update=changed)
        assert soft.model_copy(update={"train": train}).config_hash != soft.config_hash
    assert finetune(tmp_path, "a").config_hash == finetune(tmp_path, "b").config_hash  # their digest decides
    assert len({finetune(tmp_path, weights).config_hash for weights in ("", "pretrained", "a")}) == 3


def test_reports_take_records_from_before_these_keys_as_random() -> None:
    def record(output: str, **model: str) -> Record:
        return a_record(recipe={"name": "any", "model": {"name": "a", "kwargs": {}, **model}}, output=output)

    assert differing([record("old"), record("new", weights="")]) == []
    assert len(differing([record("old"), record("new", weights="pretrained")])) == 1


# --- distillation ---------------------------------------------------------------------------------------------------------


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return student.requires_grad_(), 3 * teacher


def softmax(row: list[float], tau: float) -> list[float]:
    powers = [math.exp(value / tau) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(("kind", "alpha", "tau"), [("soft", 0.3, 1.0), ("soft", 0.7, 4.0), ("hard", 0.4, 4.0)])
def test_the_loss_is_that_of_the_formula(kind: str, alpha: float, tau: float) -> None:
    student, teacher = logits()
    task = torch.tensor(1.25, dtype=torch.float64)
    train = TrainSettings(distillation=kind, distill_alpha=alpha, distill_tau=tau)  # type: ignore[arg-type]
    terms = []
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        if kind == "hard":
            terms.append(-math.log(softmax(ours, 1.0)[theirs.index(max(theirs))]))
        else:
            pairs = zip(softmax(theirs, tau), softmax(ours, tau), strict=True)
            terms.append(tau**2 * sum(p * (math.log(p) - math.log(q)) for p, q in pairs))
    expected = (1 - alpha) * 1.25 + alpha * sum(terms) / len(terms)
    loss = blend(task, student, teacher, train)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    hot = nn.functional.one_hot(teacher.argmax(1), 4).double()
    aim, scale = (hot, 1.0) if kind == "hard" else ((teacher / tau).softmax(1), tau)
    grad = alpha * scale * ((student / scale).softmax(1) - aim) / 5  # t^2 / t for the soft form
    assert student.grad is not None
    assert torch.allclose(student.grad, grad.detach(), rtol=0, atol=1e-12)


def test_low_precision_logits_are_widened() -> None:
    student, teacher = logits()
    train = TrainSettings(distillation="soft", distill_alpha=1.0)
    half = [part.detach().bfloat16() for part in (student, teacher)]
    loss = blend(torch.tensor(0.0), *half, train)  # type: ignore[misc]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, blend(torch.tensor(0.0), *(part.float() for part in half), train))  # type: ignore[misc]


def test_an_unreduced_student_starts_where_its_teacher_is(trained: Path, tmp_path: Path) -> None:
    run = finetune(tmp_path, trained, distillation="soft", distill_alpha=1.0, distill_tau=2.0)
    run = without_drop_path(run)
    parts = prepare(run, Runtime(), None)
    parts.model.train()
    images, targets = next(iter(parts.loaders.train))
    loss = parts.training_loss(images, targets)
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert max(p.grad.abs().max().item() for p in parts.core.parameters() if p.grad is not None) < 1e-6
    with torch.no_grad():
        parts.core.head.weight.add_(torch.randn(10, 16))
    assert parts.training_loss(images, targets).item() > 1e-3


@pytest.mark.parametrize("amp", slow_but(["none", "bfloat16"], "none"))
@pytest.mark.slow
def test_alpha_0_trains_the_same_weights_as_no_teacher(trained: Path, tmp_path: Path, amp: str) -> None:
    settings: dict[str, Any] = {"mixup": 0.5, "accum_steps": 2, "amp": amp}
    for kind in ("none", "soft", "hard"):
        fit(finetune(tmp_path / kind, trained, ALIGNED, distillation=kind, distill_alpha=0.0, **settings))
    same(state(tmp_path / "none"), state(tmp_path / "soft"))
    same(state(tmp_path / "none"), state(tmp_path / "hard"))
    fit(finetune(tmp_path / "taught", trained, ALIGNED, distillation="soft", distill_alpha=0.5, **settings))
    weights = [state(tmp_path / kind)["state.pt"]["model"]["head.weight"] for kind in ("none", "taught")]
    assert not torch.equal(*weights)


def test_the_teacher_stays_as_it_is_and_sees_what_the_student_sees(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlpreduce.train import loop

    made: list[Any] = []
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}  # by whether the model is in training mode

    def watch(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen[module.training].append(given[0])
        assert module.training or not torch.is_grad_enabled()

    def watched(*arguments: Any) -> Any:
        parts = prepare(*arguments)
        made.append(parts)
        assert parts.teacher is not None
        for model in (parts.teacher, parts.core):
            model.register_forward_pre_hook(watch)
        return parts

    monkeypatch.setattr(loop, "prepare", watched)
    run = finetune(tmp_path, trained, ALIGNED, **SOFT, mixup=0.5, channels_last=True, amp="bfloat16", ema_decay=0.0)
    fit(run.model_copy(update={"train": run.train.model_copy(update={"epochs": 1})}))
    (parts,) = made
    known = load_file(trained / "weights.safetensors")
    assert not parts.teacher.training
    assert not any(parameter.requires_grad for parameter in parts.teacher.parameters())
    assert all(torch.equal(tensor, known[name]) for name, tensor in parts.teacher.state_dict().items())
    assert len(seen[True]) == 22
    for students, teachers in zip(seen[True], seen[False][:22], strict=True):  # then the student is validated
        assert teachers is students
        assert teachers.is_contiguous(memory_format=torch.channels_last)
    held = {id(parameter) for group in parts.optimizer.param_groups for parameter in group["params"]}
    assert not held & {id(parameter) for parameter in parts.teacher.parameters()}
    saved = state(tmp_path)["state.pt"]
    assert sorted(saved) == ["ema", "facts", "history", "model", "optimizer", "scaler", "scheduler", "updates"]
    assert list(saved["model"]) == list(parts.core.state_dict())


def test_the_teacher_has_the_students_memory_format(tmp_path: Path) -> None:
    for last_channels in (False, True):
        teacher = as_teacher(tiny_vit(), finetune(tmp_path, "a", channels_last=last_channels, **SOFT))
        weight = teacher.patch_embed.proj.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last_channels


@pytest.mark.parametrize("kind", slow_but(["soft", "hard"], "soft"))
def test_resumed_distillation_is_exact(trained: Path, tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"distillation": kind, "mixup": 0.5, "epochs": 3, "accum_steps": 2}
    whole, parted = (finetune(tmp_path / name, trained, ALIGNED, **settings) for name in ("whole", "parted"))
    history = fit(whole)
    interrupt_after(parted, 1)
    torch.rand(7)
    resumed = fit(parted)
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))
    same(history, resumed)


@pytest.mark.parametrize("kind", ["none", "soft"])
def test_other_weights_under_the_same_path_are_not_resumed_from(trained: Path, tmp_path: Path, kind: str) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(trained / "weights.safetensors", weights)
    run = finetune(tmp_path / "run", weights, ALIGNED, distillation=kind)
    interrupt_after(run, 1)
    content = load_file(weights)
    content["blocks.3.mlp.fc2.bias"][0] += 1e-6  # inside an MLP, where no other digest looks
    save_file(content, weights)
    before = (last(tmp_path / "run") / "state.pt").read_bytes()
    with pytest.raises(
        ReductionError, match=r"resume\(.*no longer the weights.*\(digest \w+, now \w+\); put those back"
    ):
        fit(run)
    assert (last(tmp_path / "run") / "state.pt").read_bytes() == before
    shutil.copy(trained / "weights.safetensors", weights)
    assert len(fit(run)) == 2


def test_a_teacher_with_a_random_head_is_refused(trained: Path, tmp_path: Path) -> None:
    overlay = {"file": str(trained / "weights.safetensors"), "num_classes": 10, "input_size": [1, 8, 8]}
    kwargs = {**SMALL_VIT, "pretrained_cfg_overlay": overlay}
    run = finetune(tmp_path, "pretrained", epochs=1, **SOFT)
    good = run.model_copy(update={"model": run.model.model_copy(update={"kwargs": kwargs})})
    assert prepare(good, Runtime(), None).teacher is not None
    kwargs["num_classes"] = 7
    with pytest.raises(
        ReductionError, match=r"have 10 classes, the model has 7, so the teacher's head would be random"
    ):
        fit(good.model_copy(update={"model": run.model.model_copy(update={"kwargs": kwargs})}))


# --- a run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
@pytest.mark.parametrize("step", [ALIGNED, SLICED], ids=["grouped", "shallow"])
def test_a_reduced_trained_model_is_good_from_the_first_epoch(
    trained: Path, tmp_path: Path, step: dict[str, Any], kind: str
) -> None:
    events: list[Any] = []
    (entry,) = fit(
        finetune(tmp_path / "run", trained, step, epochs=1, lr=1e-3, distillation=kind),
        Runtime(report=events.append),
    )
    assert entry["top1"] > 50
    assert len(events[0].what.facts["start_digest"]) == 16
    (scratch,) = fit(finetune(tmp_path / "scratch", "", step, epochs=1, lr=1e-3))
    assert scratch["top1"] < 40


def test_two_seeds_start_from_the_same_weights(trained: Path, tmp_path: Path) -> None:
    digests = set()
    for seed in (1, 2):
        run = finetune(tmp_path / str(seed), trained, ALIGNED, seed=seed)
        same(tensors(build_model(run)), tensors(build_model(finetune(tmp_path, trained, ALIGNED))))
        digests.add(prepare(run, Runtime(), None).facts["start_digest"])
    assert len(digests) == 1
    assert "start_digest" not in prepare(digits_run(tmp_path / "random"), Runtime(), None).facts
