from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# One thread a process, here and in what tests start: models are tiny, and two threads that wait for each other on busy
# cores take ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # what Ray writes down for all of a machine, the clusters of each worker for themselves
    os.environ["RAY_TMPDIR"] = f"{tempfile.gettempdir()}/ray-{os.environ['PYTEST_XDIST_WORKER']}-{os.getppid()}"

import pytest
import torch
from helpers import guard
from helpers.runs import digits_run
from helpers.two_processes import Together, pair
from torch import nn

from mlpreduce.testing import tiny_vit
from mlpreduce.train import fit

guard.install()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All tests run in two processes; files and tests that are named run in this one."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share Ray come last: while it runs, what would start another takes it."""
    items.sort(key=lambda item: "local_ray" in getattr(item, "fixturenames", ()))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What imports and collection made stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


PROGRAMS = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with guard.started() as programs:
        item.stash[PROGRAMS] = programs
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test fails that starts a program, itself or by a fixture, and has no marker that says so."""
    yield
    if programs := guard.unmarked(item, item.stash[PROGRAMS]):
        pytest.fail(f"it starts programs; mark it with one of {', '.join(guard.MARKERS)}: {programs}", pytrace=False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is as wide as in a file, also in workers of pytest-xdist, which are told a width."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loading_processes_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After an error in a loading process torch waits for it: here, not within a later test, and not for five seconds."""
    yield
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    gc.collect()


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


@pytest.fixture(scope="session")
def together() -> Iterator[Together]:
    """`together(function, *args)` calls `function(rank, *args)` in two processes that stay for all tests."""
    with pair() as call:
        yield call


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine, for all tests that kill nothing: what would start it takes what is there."""
    from mlpreduce.launch import LaunchSettings
    from mlpreduce.launch.cluster import connection

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connection(LaunchSettings(workers=2)):
            yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned the digits, and beside its `model/` a file of its weights; only to be read."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "digits" / "baseline" / "seed42"
    train = {"epochs": 6, "mixup": 0.0, "lr": 5e-3}
    history = fit(digits_run(folder, **train).model_copy(update={"steps": (), "variant": "baseline"}))
    assert max(entry["top1"] for entry in history) > 60
    shutil.copy(folder / "model" / "model.safetensors", folder / "weights.safetensors")
    return folder
