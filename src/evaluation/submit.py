"""Rank a split for a test server, write its files, check them, and score them where the answers are known."""

import logging
from pathlib import Path
from typing import Any

import torch

from benchmarks import Benchmark
from benchmarks.server_files import Form, parse_submission
from evaluation.retrieval import rank
from models.pair import load_and_freeze
from runtime import distributed
from runtime.files import write_text
from utils import UserError

logger = logging.getLogger(__name__)


def submit(
    form: type[Form],
    benchmark: Benchmark,
    split: str,
    name: str,
    folder: Path,
    device: torch.device,
    block: int | None,
    choice: dict[str, Any],
) -> bool:
    """Write a submission; returns whether it keeps all rules. What it breaks is logged, metrics are printed.

    Args:
        benchmark: without what is excluded.
        split: as the benchmark calls it.
        name: of the submission.
        folder: receives the files; those of a split with answers go to a folder of its name below.
        block: see `rank`.
        choice: see `load_pair`.

    Raises:
        UserError: exclusions take queries away, of which a server wants an answer to each.
    """
    whole = form(type(benchmark)(benchmark.data_root), split)
    splits = benchmark.read(split)
    lost = sum(s.excluded_triplets for s in splits)
    if lost:
        raise UserError(f"--exclusions leaves out {lost} queries, and a server wants all: get the images they ask with")
    pair, frozen = load_and_freeze(benchmark, splits, device, **choice)
    protocols = benchmark.protocols[:1]
    rankings = {}
    for own in frozen:
        (ranking,) = rank(own, pair.compose, protocols, form.k, form.group_k, block).values()
        rankings[own.split.name] = own.split, ranking
    if not distributed.is_main():
        return True
    answered = split != benchmark.splits[2]
    return _write(whole, name, folder / split if answered else folder, rankings, answered)


def _write(form: Form, name: str, folder: Path, rankings: dict, answered: bool) -> bool:
    """Write, read again, check, score."""
    contents = {}
    for file, text in form.files(name, rankings).items():
        write_text(folder / file, text)
        contents[file] = parse_submission(folder / file)
    clean = True
    for file, content in contents.items():
        path = folder / file
        violations = form.violations(file, content, path.stat().st_size)
        for violation in violations:
            logger.warning("%s: %s", path, violation)
        if violations:
            logger.warning("%s: breaks rules of the server", path)
        else:
            logger.info("%s: keeps all rules of the server", path)
        clean &= not violations
    if answered and clean:
        for metric, value in form.metrics(contents).items():
            print(f"{metric} = {value}")
    return clean
