"""Summarise training runs that differ only in their seed: their best validations as a table and a page."""

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.metrics import mean_and_deviation, shown
from reports.curves import Panel
from reports.run_page import seeds_page
from reports.tables import text_table
from runtime.files import write_text
from training.data import TrainingData
from training.run_folder import (
    BEST_METRICS,
    Place,
    about_run,
    best_validation,
    read_rows,
    seed_places,
)
from utils import format_metric


def report_seeds(whole: Place, data: TrainingData) -> None:
    """Print and save the best validation of each seed and, for several seeds, their mean and standard deviation."""
    benchmark = data.benchmark
    chosen_by = next(iter(benchmark.selection))
    best: dict[int, dict[str, Any]] = {}
    for place in seed_places(whole):
        best[place.seed] = best_validation(place.folder, chosen_by)
    mean = {}
    deviation = {}
    for metric in next(iter(best.values())):
        if metric != "epoch":
            mean[metric], deviation[metric] = mean_and_deviation(
                [row[metric] for row in best.values()]
            )
    rows = {f"seed {seed}": row for seed, row in best.items()}
    summary = {"chosen_by": chosen_by, "seeds": best, "mean": mean}
    if len(best) > 1:
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
    write_text(whole.folder / "index.html", page_of_seeds(whole, best, data))
    write_text(whole.folder / BEST_METRICS, json.dumps(summary, indent=2) + "\n")


def page_of_seeds(whole: Place, best: Mapping[int, Mapping[str, Any]], data: TrainingData) -> str:
    """Return the page of a run with several seeds.

    Args:
        best: seed -> metrics of its best validation.
    """
    about = about_run(whole, data, None)
    chosen_by = about.chosen_by[0]
    epochs: dict[float, dict[str, float]] = {}
    lines = {}
    addresses = {}
    for place in seed_places(whole):
        name = f"seed {place.seed}"
        lines[name] = [format_metric(best[place.seed][metric]) for metric in about.titles]
        addresses[name] = f"{place.folder.name}/index.html"
        for validation in read_rows(place.folder, "validation"):
            of_seeds = epochs.setdefault(validation["epoch"], {"epoch": validation["epoch"]})
            of_seeds[name] = validation[chosen_by]
    titles = {name: name for name in lines}
    if len(best) > 1:
        together = []
        for metric in about.titles:
            together.append(shown([row[metric] for row in best.values()]))
        lines["mean ± standard deviation"] = together
    return seeds_page(
        about,
        whole.folder,
        lines,
        validations=Panel(label=about.called(chosen_by), rows=list(epochs.values()), titles=titles),
        addresses=addresses,
    )
