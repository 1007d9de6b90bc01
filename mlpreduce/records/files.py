"""Records on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.files import replacing
from mlpreduce.records.record import Record, typed

__all__ = ["as_json", "finished", "read", "store"]


def store(directory: Path, name: str, document: Any) -> None:
    """Write a JSON document into `directory`: whole, or not at all."""
    with replacing(directory, name) as (draft,):
        draft.write_text(as_json(document), encoding="utf-8")


def as_json(document: Any) -> str:
    """The text of a document as it is kept; numbers are finite."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def read(directory: str | Path) -> list[Record]:
    """All records under an output directory, in the order in which the recipe names variants and seeds.

    Raises:
        ReductionError: a file is no record, or one of another schema.
    """
    found = []
    for path in Path(directory).glob("*/seed*/record.json"):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ReductionError(
                f"{path}: no JSON: {error}; put it back from a copy, or move its folder away"
            ) from error
        try:
            found.append(typed(Record, document, "record"))
        except ReductionError as error:
            raise ReductionError(f"{path}: {error}; put it back from a copy, or move its folder away") from error
    return sorted(found, key=lambda record: record.order)


def finished(directory: str | Path) -> list[Record]:
    """The records of the finished runs under an output directory.

    Raises:
        ReductionError: there is none.
    """
    found = [record for record in read(directory) if record.status == "finished"]
    if not found:
        raise ReductionError(f"{str(directory)!r}: no finished run lies there; `--resume` goes on with a run")
    return found
