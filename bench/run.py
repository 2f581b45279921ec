"""Time this code against plain twins, side by side in one run, and write a table.

python bench/run.py                   (or `make bench`: CPU, under 10 minutes)
python bench/run.py --device cuda
python bench/run.py --only ranking moe
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import torch

import moe
import processes
import ranking
import stage1
import stage2
import vector_search
from models.encoder import versions

CASES = {
    "moe": moe.figures,
    "ranking": ranking.figures,
    "stage1": stage1.figures,
    "stage1-resnet": stage1.figures_of_resnet,
    "stage2": stage2.figures,
    "processes": processes.figures,
    "search": vector_search.figures,
    "search-hnsw": vector_search.figures_of_graph,
}


SLOW = {"search-hnsw"}  # only where it is asked for


def line(row: dict) -> str:
    """A row of the table, in Markdown."""
    cells = [
        row["figure"],
        f"{row['ours']:.4g} s" if "ours" in row else "",
        f"{row['twin']:.4g} s" if "twin" in row else "",
    ]
    ratio = f"{row['twin'] / row['ours']:.1f} x" if "twin" in row else ""
    if "ours / twin" in row:
        ratio = f"{row['ours / twin']:.2f} of it"
    return "| " + " | ".join([*cells, ratio, row.get("must", ""), row.get("note", "")]) + " |"


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the cases and write bench/results/{device}.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=[case for case in CASES if case not in SLOW]
    )
    parser.add_argument("--output", type=Path, help="(default: bench/results/{cpu,cuda}.json)")
    args = parser.parse_args(argv)
    print("| figure | ours | twin | ratio | must reach | |\n|---|---|---|---|---|---|", flush=True)
    output = args.output or Path(__file__).parent / "results" / f"{args.device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(args.device), "date": time.strftime("%Y-%m-%d"), "figures": []}
    for name in args.only:
        for row in measured(name, args.device):
            print(line(row), flush=True)
            content["figures"].append(row)
        output.write_text(json.dumps(content, indent=1) + "\n")


def measured(name: str, device: torch.device) -> list[dict]:
    """The rows of a case; one that does not fit the GPU says so and lets the others be measured."""
    try:
        return CASES[name](device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return [{"figure": name, "note": "out of memory"}]


if __name__ == "__main__":
    main()
