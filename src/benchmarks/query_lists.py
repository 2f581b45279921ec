"""Lists of queries that restrict a validation, such as queries that image or text alone cannot solve."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.base import Benchmark
from benchmarks.entries import Entry, Name
from benchmarks.splits import Split
from runtime.files import write_text
from runtime.schema import read_checked
from runtime.spelling import Spellings
from utils import UserError

logger = logging.getLogger(__name__)

AUDIT = "audit.py --write-queries"


class QueryNames(Entry):
    """A file of `audit.py --write-queries`: names of queries; pairids may be numbers."""

    dataset: str
    split: str
    queries: list[Name]


@dataclass(frozen=True)
class QueryList:
    """Some validation queries of a benchmark, by their names (see `Split.query_names`).

    Attributes:
        file: file that the list was read from.
    """

    file: Path
    names: frozenset[str]

    def describe(self) -> dict[str, Any]:
        """Return the record of the list in a result. Its digest depends only on the names, not on order or file."""
        digest = hashlib.sha256("\n".join(sorted(self.names)).encode()).hexdigest()
        return {"file": str(self.file.absolute()), "sha256": digest}


def write_query_list(
    file: Path, benchmark: Benchmark, names: Iterable[str], *, chosen_by: str
) -> None:
    """Write names of validation queries.

    Args:
        chosen_by: description of how the queries were chosen.
    """
    content = {
        "dataset": benchmark.name,
        "split": benchmark.val_split,
        "chosen_by": chosen_by,
        "queries": list(names),
    }
    write_text(file, json.dumps(content, indent=1) + "\n")


def read_query_list(file: Path | None, dataset: str, split: str) -> QueryList | None:
    """Read a list of queries, whose pairids may be numbers; return None if there is no file.

    Raises:
        UserError: the file is not a list of queries, is empty, or is for another dataset or split.
    """
    if file is None:
        return None
    try:
        listed = read_checked(QueryNames, file, remedy=f"write it with {AUDIT}", writer=AUDIT)
    except UserError as error:
        raise UserError(f"--queries: {error}") from None
    if not listed.queries:
        raise UserError(
            f"--queries {file} is empty, so no query would be evaluated: remove --queries"
        )
    if (listed.dataset, listed.split) != (dataset, split):
        raise UserError(
            f"--queries {file} is for {listed.dataset} {listed.split}, not {dataset} {split}: choose the right file"
        )
    return QueryList(file, frozenset(listed.queries))


def restricted(benchmark: Benchmark, splits: Sequence[Split], wanted: QueryList) -> list[Split]:
    """Restrict validation splits to the queries of a list; their galleries stay complete.

    Args:
        splits: the benchmark's splits, without excluded images.

    Raises:
        UserError: a name is not the name of a query, or a split has no query in the list.
    """
    whole = type(benchmark)(benchmark.data_root).val() if benchmark.excluded else splits
    known: set[str] = set()
    for split in whole:
        known.update(split.query_names)
    unknown = sorted(wanted.names - known)
    if unknown:
        raise UserError(
            f"--queries {wanted.file}: {len(unknown)} of {len(wanted.names)} are not queries of {benchmark.name} "
            f"{benchmark.val_split}, such as {unknown[0]}{Spellings(known).hint(unknown[0])}: remove them from the "
            "list"
        )
    kept = [split.only(wanted.names) for split in splits]
    for split in kept:
        if not split.triplets:
            raise UserError(
                f"--queries {wanted.file} has no query of {split.name}, which {benchmark.name}'s metrics need: add "
                "some queries"
            )
    asked = sum(len(split.triplets) for split in kept)
    logger.info("--queries %s: %d queries are evaluated", wanted.file, asked)
    return kept
