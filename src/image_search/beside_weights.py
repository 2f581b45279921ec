"""Read the files next to the weights of a pair: measured results, and the names of experts."""

import csv
import logging
import re
from pathlib import Path

from benchmarks import BENCHMARKS
from models.configuration import Checkpoint
from models.encoder import weights_digest
from models.exported import CARD
from models.pair import Pair
from models.schemas import EXPERTS, Expert, ExpertReport
from runtime.schema import read_checked
from utils import format_metric

logger = logging.getLogger(__name__)

IN_HEADER = ("R@10", "R@50", "mean R@10", "mean R@50")  # metrics to show
VALIDATIONS = "validation_metrics.csv"  # file in a run folder
# A result on a card of `evaluation.model_card`: heading, titles of the metrics, and values under the first protocol.
TABLE = re.compile(r"^### (.+)\n\n\|(.+)\|\n\|[-:| ]+\|\n\|(.+)\|$", re.MULTILINE)


def measured(pair: Pair) -> str:
    """Return the benchmark and recall of a pair, from the weights' run folder or model card; "" without either."""
    known = {"combiner": pair.trained, "sum": pair.tuned}.get(pair.compose.combining_function)
    if known is None:
        return ""
    what, values = _of_run(known)
    if not values:
        what, values = _of_card(known.path.parent / CARD)
    shown = [f"{title} {values[title]}" for title in IN_HEADER if title in values]
    return f"{what}: {', '.join(shown)}" if shown else ""


def _of_run(known: Checkpoint) -> tuple[str, dict[str, str]]:
    """Return the split on which a run validated these weights, and title -> value; empty without such a validation."""
    benchmark = BENCHMARKS.get(known.table.get("dataset", ""))
    for row in csv.DictReader(_lines(known.path.resolve().parents[1] / VALIDATIONS)):
        if benchmark and row.get("epoch") == str(known.epoch):
            values = {
                title: format_metric(float(row[metric]))
                for metric, title in benchmark.titles.items()
                if row.get(metric)
            }
            return f"{benchmark.name} {benchmark.val_split}", values
    return "", {}


def _of_card(card: Path) -> tuple[str, dict[str, str]]:
    """Return the heading of the first result on a model card, and title -> value; empty without a result."""
    table = TABLE.search("\n".join(_lines(card)))
    if table is None:
        return "", {}
    what, titles, values = table.groups()
    # Each value is followed by its interval.
    cells = [value.strip().partition(" ")[0] for value in values.split("|")]
    named = dict(zip(map(str.strip, titles.split("|")), cells, strict=False))
    return re.sub(r"\\(.)", r"\1", what), named


def _lines(file: Path) -> list[str]:
    """Return the lines of a file; [] if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []


def experts_of(pair: Pair) -> list[Expert]:
    """Return the report of the experts next to the weights or in their run folder; [] if there is none.

    Raises:
        UserError: the report is damaged.
    """
    if pair.trained is None or not pair.compose.has_router:
        return []
    beside, run, *_ = pair.trained.path.resolve().parents
    for file in (beside / EXPERTS, run / EXPERTS):
        if file.is_file():
            remedy = "write it again with visualize.py, or delete it"
            report = read_checked(ExpertReport, file, remedy=remedy, writer="visualize.py")
            if report.of_weights == weights_digest(pair.compose.state_dict()):
                return report.experts
            logger.warning(
                "note: %s was made with different weights, so experts are not named", file
            )
    return []
