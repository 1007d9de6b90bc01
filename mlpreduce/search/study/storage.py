"""Where studies are kept, that one process at a time owns one, and what Optuna's storage tells of trials."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from mlpreduce.errors import ReductionError, missing
from mlpreduce.search.spaces.points import Point
from mlpreduce.words.addresses import hidden, quoted

__all__ = ["claim_problem", "counts", "finished", "folder_of", "hidden", "key_of", "opened", "point_of", "read_only"]

_PATIENCE = 60  # seconds that SQLite waits for another process, such as a reader


def folder_of(url: str) -> Path | None:
    """The folder of a SQLite file; None for a server.

    Raises:
        ReductionError: it is no such URL.
    """
    place = _parse(url)
    if place.get_backend_name() != "sqlite":
        return None
    if not place.database or place.database == ":memory:":
        raise ReductionError(f"storage {hidden(url)}: a study in memory is lost with its process; name a file")
    return Path(place.database).resolve().parent


@contextmanager
def opened(url: str, study: str) -> Iterator[optuna.storages.BaseStorage]:
    """The storage, held for this study: another process that asks for the same one is refused.

    A file is held by the lock of its folder, which is the caller's part; a server by a lock of its own, which it lets go
    when the connection ends, however it ends.

    An empty URL is a storage in memory.

    Raises:
        ReductionError: another process has the study, or the storage cannot be reached.
    """
    if not url:
        yield optuna.storages.InMemoryStorage()
        return
    place = _parse(url)
    with _held(place, url, study):
        yield _storage(url, place)


def read_only(url: str) -> optuna.storages.RDBStorage:
    """The storage, to look at what it has.

    Raises:
        ReductionError: there is none, or it cannot be reached.
    """
    place = _parse(url)
    if place.get_backend_name() == "sqlite" and not Path(str(place.database)).is_file():
        raise ReductionError(f"storage {hidden(url)}: there is no such file")
    return _storage(url, place)


def claim_problem(storage: optuna.storages.BaseStorage, study: str, resume: bool) -> str | None:
    """Why a study of this name cannot be begun, or gone on with; None where it can."""
    if study not in {summary.study_name for summary in optuna.get_all_study_summaries(storage)}:
        return None
    if not resume:
        return f"study {study}: the storage has a study of this name; go on with resume, or give another name"
    known = optuna.load_study(study_name=study, storage=storage)
    if known.trials and "settings" not in known.user_attrs:
        return f"study {study}: the study of this name was not made by mlpreduce search; give another name"
    return None


def _parse(url: str) -> sqlalchemy.URL:
    try:
        return sqlalchemy.engine.make_url(quoted(url))
    except (ArgumentError, ValueError):
        raise ReductionError(
            f"storage {hidden(url)!r}: no URL of a database; for instance sqlite:////home/me/optuna.db or "
            f"postgresql+psycopg://user@host/database"
        ) from None  # the error of the reader has the URL as it is


def _storage(url: str, place: sqlalchemy.URL) -> optuna.storages.RDBStorage:
    options: dict[str, Any] = {}
    if place.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": _PATIENCE}}
    try:
        return optuna.storages.RDBStorage(quoted(url), engine_kwargs=options)
    except (SQLAlchemyError, ImportError, RuntimeError) as error:
        raise _unreachable(url, error) from _shown(error, url)


def _shown(error: Exception, url: str) -> Exception | None:
    """The error, to be shown below ours, unless it holds a password."""
    return error if hidden(str(error), url) == str(error) else None


def _unreachable(url: str, error: Exception) -> ReductionError:
    lines = hidden(str(error), url).strip().splitlines() or [type(error).__name__]
    driver = isinstance(error, (ImportError, NoSuchModuleError))
    if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
        return missing(f"storage {hidden(url)}", "psycopg")
    remedy = "; install the driver that the URL names, for instance pip install pymysql" if driver else ""
    return ReductionError(f"storage {hidden(url)}: {lines[0]}{remedy}")


@contextmanager
def _held(place: sqlalchemy.URL, url: str, study: str) -> Iterator[None]:
    kind = place.get_backend_name()
    if kind == "sqlite":
        yield
        return
    name = f"mlpreduce-{hashlib.sha256(study.encode()).hexdigest()[:16]}"
    number = int(name[-15:], 16)
    asks = {
        "postgresql": ("SELECT pg_try_advisory_lock(:number)", "SELECT pg_advisory_lock(:number)"),
        "mysql": ("SELECT GET_LOCK(:name, 0)", "SELECT GET_LOCK(:name, -1)"),
    }
    if kind not in asks:
        raise ReductionError(f"storage {hidden(url)}: {kind} is not supported; use sqlite, postgresql or mysql")
    attempt, wait = asks[kind]
    try:
        engine = sqlalchemy.create_engine(
            quoted(url), poolclass=sqlalchemy.NullPool
        )  # a closed connection lets its locks go
        connection = engine.connect()
    except (SQLAlchemyError, ImportError) as error:
        raise _unreachable(url, error) from _shown(error, url)
    try:
        held = {"number": number, "name": name}
        if not connection.execute(
            sqlalchemy.text(attempt), {k: v for k, v in held.items() if f":{k}" in attempt}
        ).scalar():
            raise ReductionError(
                f"storage {hidden(url)}: another process has the study {study!r}; wait for "
                f"it or end it, or give another storage or name"
            )
        # tables are made once: whoever comes second waits for them
        with engine.connect() as making:
            making.execute(sqlalchemy.text(wait), {"number": 1} if ":number" in wait else {"name": "mlpreduce-tables"})
            _storage(url, place)
        connection.commit()
        yield
    finally:
        connection.close()
        engine.dispose()


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained, to their end or until they were ended early; none that is a reference."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in trials if not {"reference", "screened"} & trial.user_attrs.keys()]


def counts(study: optuna.Study) -> dict[str, int]:
    """How many trials ended how."""
    trained = finished(study)
    trials = study.get_trials(deepcopy=False)
    failed = [trial.user_attrs.get("why") for trial in trials if trial.state is TrialState.FAIL]
    complete = sum(trial.state is TrialState.COMPLETE for trial in trained)
    return {
        "trained": len(trained),
        "complete": complete,
        "pruned": len(trained) - complete,
        "screened": sum("screened" in trial.user_attrs for trial in trials),
        **{why: failed.count(why) for why in ("infeasible", "duplicate", "failed", "lost")},
    }


def key_of(trial: FrozenTrial) -> str:
    """The key of a trial's point; empty where it has none yet."""
    return str(trial.user_attrs.get("key", ""))


def point_of(trial: FrozenTrial) -> Point:
    """The point of a trial."""
    return Point.from_json(trial.user_attrs["point"])
