from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch
from torch import nn

from mlpreduce.testing import tiny_vit


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def vit() -> nn.Module:
    return tiny_vit().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def unchanged() -> Callable[[nn.Module], Callable[[], None]]:
    """`check = unchanged(model)` remembers a model; `check()` asserts that every bit and tie is as it was."""

    def remember(model: nn.Module) -> Callable[[], None]:
        def tensors() -> dict[str, torch.Tensor]:
            buffers = model.named_buffers(remove_duplicate=False)
            return dict(model.named_parameters(remove_duplicate=False)) | dict(buffers)

        state = {name: (id(t), t.detach().clone()) for name, t in tensors().items()}
        text, attributes = repr(model), set(model.__dict__)

        def check() -> None:
            after = tensors()
            assert list(after) == list(state)
            for name, tensor in after.items():
                assert id(tensor) == state[name][0], name
                assert tensor.is_meta or torch.equal(tensor, state[name][1]), name
            assert repr(model) == text
            assert set(model.__dict__) == attributes

        return check

    return remember
