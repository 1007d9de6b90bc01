"""What is kept of one run: the types of `record.json`. What another version has written besides is kept as it is."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mlpreduce.errors import ReductionError

__all__ = ["SCHEMA", "Document", "Epoch", "Hardware", "Measured", "Record", "typed"]

SCHEMA = 1  # of every document
Kept = TypeVar("Kept", bound="Document")


class Document(BaseModel):
    """JSON that is kept, whose keys have types."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """The document as JSON values: what is known, and no defaults of what is not; of other libraries' numbers the value."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, fallback=_plain)


class Measured(Document):
    """Counts of the model and, where they were measured, its speed and memory in inference."""

    params: int
    mlp_params: int
    unique_mlps: int
    macs_linear: int
    macs: int
    macs_with_attention: int
    throughput: float | None = None  # images/s
    latency: float | None = None  # ms
    peak_memory_mib: float | None = None
    batch_size: int | None = None
    device: str | None = None  # with dtype and threads


class Hardware(Document):
    """What it ran on."""

    device: str | None = None
    machine: str | None = None
    cpu_cores: int | None = None
    workers: int | None = None


class Epoch(Document):
    """One epoch: losses in nats, accuracies in percent. `raw_` is of the trained weights beside their moving average."""

    epoch: int
    top1: float
    top5: float
    val_loss: float
    raw_top1: float | None = None
    probes: dict[str, Any] = {}


class Record(Document):
    """One run.

    Attributes:
        version: of the schema.
        recipe: as it was resolved, JSON values.
        variant: its name.
        steps: its reductions.
        seed: of the run.
        order: its place among the runs of the recipe.
        status: "running", "finished", "failed", "interrupted" or "stopped".
        message: why.
        notes: what happened that the user did not ask for.
        warnings: those that it began with.
        started: when, local time.
        epochs_planned: how many it is to have.
        epochs: those it has.
        plans: what the reductions did, without values.
        profile: of the model.
        train_samples: images of an epoch.
        start_digest: of the weights that it began with, if some were given.
        output: the directory that it was read from, where several are put together; it is in no file.
    """

    version: int = Field(SCHEMA, alias="schema")
    recipe: dict[str, Any]
    variant: str
    steps: tuple[dict[str, Any], ...]
    seed: int
    order: int
    config_hash: str = ""
    status: str
    message: str = ""
    notes: tuple[str, ...] = ()
    started: str = ""
    epochs_planned: int
    versions: dict[str, str] = {}
    hardware: Hardware = Hardware()
    plans: tuple[dict[str, Any], ...] = ()
    profile: Measured
    train_samples: int
    warnings: tuple[str, ...] = ()
    start_digest: str | None = None
    mlflow_tracking_uri: str = ""
    mlflow_run_id: str | None = None
    epochs: tuple[Epoch, ...]
    output: str = Field("", exclude=True)

    @field_validator("recipe")
    @classmethod
    def _named(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(recipe.get("name"), str):
            raise ValueError("the recipe has no name")
        return recipe

    @property
    def name(self) -> str:
        """That of the recipe."""
        return str(self.recipe["name"])

    @property
    def key(self) -> tuple[str, int]:
        """Variant and seed."""
        return self.variant, self.seed


def typed(kind: type[Kept], document: Any, name: str) -> Kept:
    """The document whose JSON values these are.

    Args:
        kind: its type.
        document: the values.
        name: what it is called in messages.

    Raises:
        ReductionError: it has another schema, or is none.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ReductionError(f"the {name} has schema {schema!r}, this version reads {SCHEMA}")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReductionError(f"no {name}: {where}: {first['msg']}") from error


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
