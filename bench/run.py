"""Time this code against reference implementations, side by side in one run, and write a table.

python bench/run.py                   (or `make bench`: CPU, under 10 minutes)
python bench/run.py --device cuda
python bench/run.py --only ranking moe
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import torch

from cases import CASES
from isolated import A_DAY, attempt
from report import HEAD, line, machine
from timing import Setting


def timed_on(device: torch.device) -> list[str]:
    """Return the names of the cases that are timed on a kind of device."""
    return [name for name, case in CASES.items() if device.type in case.on and not case.checks]


def main(argv: list[str] | None = None) -> None:
    """Run the cases and write bench/results/{device}.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", metavar="CASE", help="(default: all but slow ones)")
    parser.add_argument("--output", type=Path, help="(default: bench/results/{cpu,cuda}.json)")
    args = parser.parse_args(argv)
    known = timed_on(args.device)
    names = args.only or [name for name in known if CASES[name].unasked]
    if unknown := set(names) - set(known):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose from {' '.join(known)}")
    output = args.output or Path(__file__).parent / "results" / f"{args.device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.device)
    about = attempt(machine, setting, A_DAY, lambda row: None)
    content = {"machine": about.rows[0], "date": time.strftime("%Y-%m-%d"), "figures": []}
    print(HEAD, flush=True)
    for name in names:
        made = attempt(CASES[name].run, setting, A_DAY, lambda row: print(line(row), flush=True))
        content["figures"] += made.rows
        if made.error:
            content["figures"].append({"figure": name, "note": made.error.splitlines()[0]})
            print(line(content["figures"][-1]), made.error, sep="\n", flush=True)
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
