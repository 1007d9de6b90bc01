"""A proof that fails is reported as failed, whatever it raises."""

from __future__ import annotations

from typing import Any

import pytest

import mlpreduce
from mlpreduce.coverage import proofs
from mlpreduce.testing import tiny_vit


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    monkeypatch.setattr(proofs, "_real", lambda _: (model.eval(), vars(model)["mlpreduce_build"]["kwargs"]))


def test_an_error_of_the_library_in_a_proof_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise mlpreduce.ReductionError("apply: a tie was lost")

    monkeypatch.setattr(proofs, "tied_is_copied", broken)
    proof = proofs.prove("vit_tiny_patch16_224")
    assert proof.failure == "ReductionError: apply: a tie was lost"


def test_a_model_in_which_nothing_can_be_tied_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mlpreduce.plan

    def plan(model: Any, transform: str, **config: Any) -> Any:
        if transform == "grouped":
            raise mlpreduce.ReductionError("grouped: no two MLPs are alike")
        return real(model, transform, **config)

    monkeypatch.setattr(mlpreduce, "plan", plan)
    proof = proofs.prove("vit_tiny_patch16_224")
    assert (proof.grouped, proof.failure) == (None, "")
