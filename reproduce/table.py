"""Print results of validate.py next to published numbers.

python reproduce/table.py reproduced/CIRR/sum.json reproduced/CIRR/moe/*/seed_0.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks import BENCHMARKS
from evaluation.comparison import read_columns
from reports.tables import text_table
from utils import command, format_metric

PUBLISHED = Path(__file__).with_name("published.json")


def rows(files: list[Path]) -> tuple[str, dict[str, dict[str, str]]]:
    """Return what the published numbers were measured on, and all results: method -> metric -> its value."""
    columns = read_columns(files)
    result = columns[0].results[0]
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))[result["dataset"]]
    about = f"published: {published['source']}, {published['measured on']}"
    values = {f"published: {name}": metrics for name, metrics in published["results"].items()}
    titles = BENCHMARKS[result["dataset"]](Path()).titled(next(iter(values.values())))
    protocol = next(iter(columns[0].protocols))
    for column in columns:
        measured = {metric: column.mean(protocol, metric) for metric in titles}
        own = column.results[0]
        trained = own["training"].get("combiner", {"flags": {"combiner_type": ""}})
        label = f"{own['combining_function']} {trained['flags']['combiner_type']}".strip()
        values[f"here, {own['split']}: {label}"] = measured
    table = {}
    for name, metrics in values.items():
        table[name] = {titles[metric]: format_metric(metrics[metric]) for metric in titles}
    return about, table


@command
def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    about, table = rows([Path(file) for file in argv or sys.argv[1:]])
    print(f"{about}\n{text_table(table)}")


if __name__ == "__main__":
    main()
