"""Calibration data of any kind: images, token ids, what a tokenizer gives, several inputs, and functions that run the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.calibration import CHUNK, Samples
from mlpreduce.calibration.batches import Batch, chunked
from mlpreduce.testing import tiny_vit


@pytest.fixture
def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    model: nn.Module = BertModel(config).double().eval()
    return model


def texts(count: int = 24, length: int = 9, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a tokenizer gives for texts of one length, padded."""
    ids = torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(seed))
    nothing = torch.zeros(count, padding, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), nothing], 1)
    return {"input_ids": torch.cat([ids, nothing], 1), "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def kept(model: nn.Module, data: Any, **config: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Units that a plan keeps, and the values that it writes."""
    config = {"ratio": 0.5, "criterion": "energy", "repair": "least_squares"} | config
    made = mlpreduce.plan(model, "shallow", data=data, **config)
    return [edit.units for edit in made.edits if hasattr(edit, "units")], {
        edit.tensor: edit.value for edit in made.edits if hasattr(edit, "value")
    }


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-8, atol=1e-10)


def as_ids(data: dict[str, torch.Tensor]) -> Any:
    return [data["input_ids"]]


def as_dictionary(data: dict[str, torch.Tensor]) -> Any:
    return [data | {"labels": torch.zeros(24, dtype=torch.long), "text": ["a"] * 24}]


def as_one_dictionary(data: dict[str, torch.Tensor]) -> Any:
    return data


def as_tuple(data: dict[str, torch.Tensor]) -> Any:
    return [((data["input_ids"], data["attention_mask"]), torch.zeros(24))]


def as_function(data: dict[str, torch.Tensor]) -> Any:
    def run(model: nn.Module) -> None:
        for start in range(0, 24, 5):
            model(data["input_ids"][start : start + 5], attention_mask=data["attention_mask"][start : start + 5])

    return run


def as_generator(data: dict[str, torch.Tensor]) -> Any:
    return ({key: value[start : start + 7] for key, value in data.items()} for start in range(0, 24, 7))


FORMS = (as_ids, as_dictionary, as_one_dictionary, as_tuple, as_function, as_generator)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("repair", ["least_squares", "parallel"])
def test_all_forms_of_the_same_texts_give_the_same_plan(
    bert: nn.Module, form: Callable[[Any], Any], repair: str
) -> None:
    data = texts()
    assert_same(kept(bert, form(data), repair=repair), kept(bert, [data], repair=repair))


@pytest.mark.parametrize("criterion", ["energy", "reconstruction", "activation"])
def test_whole_numbers_are_no_error_for_any_way_to_look(bert: nn.Module, criterion: str) -> None:
    assert len(kept(bert, as_ids(texts()), criterion=criterion)[0]) == 3


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "hessian_diag", "gate", "nvit"])
def test_criteria_of_a_loss_take_texts(bert: nn.Module, criterion: str) -> None:
    def loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (output.last_hidden_state[:, 0, 0] - labels).square().mean()
        return found

    data = [texts() | {"labels": torch.randn(24, dtype=torch.float64)}]
    made = mlpreduce.plan(bert, "shallow", ratio=0.5, criterion=criterion, data=data, loss=loss)
    assert made.data is not None
    assert made.data["samples"] == 24


def test_similarity_moments_and_budgets_take_texts(bert: nn.Module) -> None:
    data = [texts()]
    assert mlpreduce.plan(bert, "grouped", group=2, pattern="similarity", data=data, remainder="own").edits
    assert mlpreduce.plan(bert, "low_rank", init="data", data=data).edits
    from mlpreduce.budget import Loss

    assert len(Loss(limit=0.1).widths(bert, data)) == 3


@pytest.mark.parametrize("repair", ["least_squares", "parallel", "none"])
@pytest.mark.parametrize("criterion", ["energy", "reconstruction"])
def test_padding_is_left_out(bert: nn.Module, criterion: str, repair: str) -> None:
    options = {"criterion": criterion, "repair": repair}
    short, padded = (kept(bert, [texts(padding=padding)], **options) for padding in (0, 4))
    assert short[0] == padded[0]
    for name, value in short[1].items():
        torch.testing.assert_close(value, padded[1][name], rtol=1e-6, atol=1e-9)
    bare = texts(padding=4)
    del bare["attention_mask"]
    assert kept(bert, [bare], **options)[0] != short[0]  # else nothing was tested


def test_padding_is_left_out_of_what_layers_are_given(bert: nn.Module) -> None:
    def factors(padding: int) -> list[torch.Tensor]:
        made = mlpreduce.plan(bert, "low_rank", init="data", ratio=0.5, data=[texts(padding=padding)])
        model = mlpreduce.apply(copy.deepcopy(bert), made)
        return [module.down.detach() for module in model.modules() if hasattr(module, "down")]

    for one, other in zip(factors(0), factors(5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_texts_of_several_lengths(bert: nn.Module) -> None:
    data = [texts(20, 9), texts(20, 6, seed=1), texts(3, 9, seed=2)]
    assert len(kept(bert, data)[0]) == 3
    lengths = [len(batch) for batch, _ in Samples(data, bert, labels=False).chunks()]
    assert lengths == [CHUNK, 4, CHUNK, 4, 3]


def test_a_graph_of_a_model_takes_what_the_model_took() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()

        def forward(self, images: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
            found: torch.Tensor = self.vit(images + shift)
            return found

    model = Two().double().eval()
    images = torch.randn(24, 3, 16, 16, dtype=torch.float64)
    data = [{"images": images, "shift": torch.ones(24, 1, 1, 1, dtype=torch.float64)}]
    traced = torch.fx.symbolic_trace(model, concrete_args=None)
    for owner in (model, traced):
        made = mlpreduce.plan(
            owner,
            "shallow",
            ratio=0.5,
            criterion="energy",
            repair="least_squares",
            data=data,
            example_inputs={"images": images[:1], "shift": torch.ones(1, 1, 1, 1, dtype=torch.float64)},
        )
        assert len(made.edits) > 4  # slices, and at least one repair


def test_batches_do_not_matter() -> None:
    def sizes(*counts: int) -> list[int]:
        batches = ((Batch(torch.zeros(count, 2)), torch.zeros(count)) for count in counts)
        return [len(batch) for batch, labels in chunked(batches, 16, 15) if labels is not None and len(labels)]

    assert sizes(40) == sizes(7, 33) == sizes(*[1] * 40) == [16, 16, 8]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda d: [(d["input_ids"], d["attention_mask"])], "if that is a mask, give a dictionary"),
        (lambda d: [tuple(d.values())], "a batch of 3 parts"),
        (lambda d: [{"text": ["a"], "idx": torch.zeros(24)}], "a dict with text, idx"),
        (lambda d: lambda model: None, "does not call the model"),
        (lambda d: [d["input_ids"][:, 0]], "its first dimension must be of examples"),
        (lambda d: [torch.zeros(4, 3, 8, 8, dtype=torch.uint8)], "as the model takes them, normalised"),
        (lambda d: [torch.full((4, 9), 99)], "does not run on token ids (4, 9)"),
        (lambda d: [("a", "b")], "a tuple for a batch"),
        (lambda d: 5, "data is a int"),
    ],
)
def test_what_cannot_be_read_is_refused(bert: nn.Module, data: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ReductionError) as caught:
        kept(bert, data(texts()))
    assert message in str(caught.value)


def test_a_model_that_mixes_texts_is_refused(bert: nn.Module) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor) -> Any:
            inner = self.bert.embeddings(input_ids)
            return self.bert(inputs_embeds=inner + inner.mean(0))

    with pytest.raises(ReductionError, match="one after the other along its first dimension"):
        mlpreduce.plan(
            Mixed().eval(), "shallow", criterion="energy", data=as_ids(texts()), example_inputs=texts(1)["input_ids"]
        )


def test_what_a_repair_is_judged_by_leaves_out_padding() -> None:
    from types import SimpleNamespace

    from mlpreduce.repair.outputs import output_of

    hidden = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = SimpleNamespace(last_hidden_state=hidden, pooler_output=torch.zeros(4, 3))
    data = texts(4, 3, padding=2)
    torch.testing.assert_close(output_of(given, Batch(data)), hidden[:, :3].mean(1))
    torch.testing.assert_close(output_of(given, Batch(data["input_ids"])), hidden.mean(1))
    other = {**data, "attention_mask": torch.ones(4, 9, dtype=torch.long)}  # of positions that are none of these
    torch.testing.assert_close(output_of(given, Batch(other)), hidden.mean(1))
    torch.testing.assert_close(output_of(given, Batch(torch.zeros(4, 3, 8, 8))), torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("criterion", ["energy", "taylor", "reconstruction"])
def test_nothing_is_measured_in_less_than_full_precision(criterion: str) -> None:
    data = [(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 5)]
    config: dict[str, Any] = {"criterion": criterion, "ratio": 0.5, "repair": "parallel", "data": data}
    plain = mlpreduce.plan(tiny_vit(), "shallow", **config)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = mlpreduce.plan(tiny_vit(), "shallow", **config)
    assert plain.edits == coarse.edits
    for one, other in zip(plain.edits, coarse.edits, strict=True):
        if hasattr(one, "value"):
            assert torch.equal(one.value, other.value)
