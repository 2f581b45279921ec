"""Rank a split for a test server, write and check its files, and score them if the targets are public."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import Benchmark, Protocol, Split
from benchmarks.ranking import Ranking
from benchmarks.server_files import Answered, ServerForm, parse_submission
from evaluation.retrieval import rank_all
from models.pair import load_and_freeze
from runtime import distributed
from runtime.files import write_text
from settings.groups import PairChoice
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Settings of a submission and of its files.

    Attributes:
        name: part of the files' names.
        split: the benchmark's name for the split.
        folder: output folder; a split with public targets gets a subfolder with its name.
        protocol: protocol to rank under; None for the benchmark's first.
        block: see `rank`.
    """

    name: str
    split: str
    folder: Path
    protocol: Protocol | None = None
    block: int | None = None


def submit(
    form: type[ServerForm[Any]],
    benchmark: Benchmark,
    wanted: Submission,
    *,
    choice: PairChoice,
    device: torch.device,
) -> bool:
    """Write a submission, log broken rules, and print any metrics; return whether the files keep all rules.

    Args:
        benchmark: the benchmark without the excluded images.
        choice: the pair that composes and ranks.

    Raises:
        UserError: exclusions remove queries, but a server needs results for each query.
    """
    whole = form(type(benchmark)(benchmark.data_root), wanted.split)
    splits = benchmark.read(wanted.split)
    lost = sum(split.excluded_triplets for split in splits)
    if lost:
        raise UserError(
            f"--exclusions excludes {lost} queries, but the server needs all queries: restore their images"
        )
    pair, frozen = load_and_freeze(benchmark, splits, device, choice)
    protocol = wanted.protocol or benchmark.protocols[0]
    rankings = rank_all(frozen, pair.compose, [protocol], k=form.k, block=wanted.block)[protocol]
    answered = [_answers(split, rankings[split.name], form.group_k) for split in splits]
    if not distributed.is_main():
        return True
    is_scored = wanted.split != benchmark.test_split
    folder = wanted.folder / wanted.split if is_scored else wanted.folder
    return _write(whole, wanted.name, folder, answered=answered, is_scored=is_scored)


def _answers(split: Split, ranking: Ranking, group_k: int) -> Answered:
    """Return the image ids that each query of a split retrieved, and the first few within its group."""
    nearest = ranking.results(split.names)
    in_group = ranking.answers_in_group(split.names) or []
    return Answered(
        split=split,
        nearest=[[image for image, _ in row] for row in nearest],
        in_group=[[image for image, _ in row[:group_k]] for row in in_group],
    )


def _write(
    form: ServerForm[Any], name: str, folder: Path, *, answered: Sequence[Answered], is_scored: bool
) -> bool:
    """Write the files, read them again, check and score them."""
    contents = {}
    for file, text in form.files(name, answered).items():
        write_text(folder / file, text)
        contents[file] = parse_submission(folder / file)
    keeps_rules = True
    for file, content in contents.items():
        path = folder / file
        violations = form.violations(file, content, path.stat().st_size)
        for violation in violations:
            logger.warning("%s: %s", path, violation)
        if violations:
            keeps_rules = False
            logger.warning("%s: breaks rules%s", path, form.whose)
        else:
            logger.info("%s: obeys all rules%s", path, form.whose)
    if is_scored and keeps_rules:
        for metric, value in form.metrics(contents).items():
            print(f"{metric} = {value}")
    return keeps_rules
