"""Several trainings that differ in their seed: their best validations beside each other, as a summary and a page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.metrics import mean_and_deviation, shown
from models.configuration import Settings
from reports.curves import Panel
from reports.run_page import seeds_page
from reports.tables import text_table
from runtime.files import write_text
from training.data import TrainingData
from training.run_folder import BEST_METRICS, about_run, best_validation, read_rows, seed_folder
from utils import format_metric


def report_seeds(folder: Path, seeds: list[int], data: TrainingData, settings: Settings) -> None:
    """Print the best validation of each seed, and mean and standard deviation of several; write them down."""
    benchmark = data.benchmark
    chosen_by = next(iter(benchmark.selection))
    best: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        best[seed] = best_validation(seed_folder(folder, seed), chosen_by)
    mean = {}
    deviation = {}
    for metric in best[seeds[0]]:
        if metric != "epoch":
            mean[metric], deviation[metric] = mean_and_deviation(
                [row[metric] for row in best.values()]
            )
    rows = {f"seed {seed}": row for seed, row in best.items()}
    summary = {"chosen_by": chosen_by, "seeds": best, "mean": mean}
    if len(seeds) > 1:
        rows["mean"] = mean
        rows["standard deviation"] = deviation
        summary["standard_deviation"] = deviation
    table = {}
    for name, row in rows.items():
        table[name] = {
            title: format_metric(row[metric]) for metric, title in benchmark.titled(row).items()
        }
    about = f"validations with the best {chosen_by} of each seed"
    print(f"{about}\n{text_table(table)}")
    write_text(folder / "index.html", page_of_seeds(folder, best, data, settings))
    write_text(folder / BEST_METRICS, json.dumps(summary, indent=2) + "\n")


def page_of_seeds(
    folder: Path, best: Mapping[int, dict[str, Any]], data: TrainingData, settings: Settings
) -> str:
    """The page of a run with several seeds.

    Args:
        best: seed -> its best validation.
    """
    about = about_run(data, settings, folder, {"combiner-path": None})
    chosen_by = about.chosen_by[0]
    names = {seed: f"seed {seed}" for seed in best}
    epochs: dict[float, dict[str, float]] = {}
    lines = {}
    for seed, row in best.items():
        lines[names[seed]] = [format_metric(row[metric]) for metric in about.titles]
        for validation in read_rows(seed_folder(folder, seed), "validation"):
            of_seeds = epochs.setdefault(validation["epoch"], {"epoch": validation["epoch"]})
            of_seeds[names[seed]] = validation[chosen_by]
    if len(best) > 1:
        together = []
        for metric in about.titles:
            together.append(shown([row[metric] for row in best.values()]))
        lines["mean ± standard deviation"] = together
    titles = {name: name for name in names.values()}
    return seeds_page(
        about,
        folder,
        lines,
        validations=Panel(label=chosen_by, rows=list(epochs.values()), titles=titles),
        addresses={names[seed]: f"{seed_folder(folder, seed).name}/index.html" for seed in best},
    )
