"""What a run leaves on disk beside weights and settings: its records, and how far it is."""

from typing import Annotated, Any

from pydantic import AllowInfNan, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from models.schemas import ABSENT, Metrics, Number
from runtime.schema import Schema

AnyFloat = Annotated[float, AllowInfNan(True)]  # of an epoch of skipped steps, which has no loss


class Row(Schema):
    """A row of a CSV file."""

    __pydantic_extra__: dict[str, AnyFloat]
    epoch: Number


class BestRow(Schema):
    """A validation."""

    __pydantic_extra__: Metrics
    epoch: Number


class BestMetrics(Schema):
    """best_metrics.json of a run: the best validation by each of some metrics."""

    __pydantic_extra__: dict[str, BestRow]


class Summary(Schema):
    """best_metrics.json of a run of several seeds: the best validation of each, their mean and deviation."""

    chosen_by: str
    seeds: dict[str, BestRow]
    mean: Metrics
    standard_deviation: Metrics = ABSENT


class Validated(Schema):
    """A checkpoint with the metrics of its validation, or the settings of an earlier version's."""

    metrics: Metrics


class Progress(Schema):
    """How far a training is, see `training.autosave.Progress`."""

    epoch: Number
    losses: list[AnyFloat] = ABSENT
    skipped: list[Annotated[int, Field(ge=0)]] = ABSENT
    skipped_in_a_row: Number = ABSENT
    rows: dict[str, list[Row]] = ABSENT
    best: Metrics = ABSENT

    @field_validator("rows")
    @classmethod
    def to_the_epoch(cls, rows: dict[str, list[Row]], info: ValidationInfo) -> dict[str, list[Row]]:
        """Each epoch that was trained has a row, and the one that is trained may have one already."""
        trained = {row.epoch for row in rows.get("train", [])}
        epoch = info.data.get("epoch", 0)
        if not set(range(epoch)) <= trained <= set(range(epoch + 1)):
            raise PydanticCustomError("rows", f"they should be those of the epochs before {epoch}")
        return rows


class RandomStates(Schema):
    """States of random numbers; those of torch are tensors, which torch looks at."""

    python: tuple[int, tuple[int, ...], float | None]
    cpu: Any


class State(Schema):
    """state.pt; its parts are compared with the training's own."""

    parts: dict[str, dict[str, Any]]
    random: RandomStates
    progress: Progress
