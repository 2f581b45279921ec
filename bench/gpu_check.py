"""Run all checks and benchmarks that need a GPU, in eight minutes.

python bench/gpu_check.py                      (or `make gpu-check`)
python bench/gpu_check.py --rehearse           (a dry run on a CPU, at the smallest size)
python bench/gpu_check.py --only golden moe

Each case runs in a process of its own with a time limit, so a case that fails, crashes or hangs does not affect others.
Missing packages are reported before anything starts. If the folder bench/wheels has their wheels, they are installed
from there for this run only, since a machine with a GPU often has no network. Results are written after every case. The
exit code is 0 if all checks passed and no case failed; cases that no longer fit in the time are left out.
"""

# ruff: noqa: E402  (missing packages are reported before they are imported)
import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))
import needed

needed.install_or_leave()

import torch

from cases import CASES, Case
from isolated import OUT_OF_TIME, Attempt, attempt
from report import HEAD, line, machine
from timing import Row, Setting

RESULTS = Path(__file__).parent / "results"
FOR_THE_MACHINE = 60  # seconds to describe the machine


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    wanted = [name for name, case in CASES.items() if "cuda" in case.on]
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on a CPU and as small as it goes; nothing is measured",
    )
    parser.add_argument("--only", nargs="+", choices=wanted, default=wanted, metavar="CASE")
    parser.add_argument("--device", type=torch.device, help="(default: cuda; rehearsing, cpu)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="(default: 460; rehearsing, an hour)"
    )
    parser.add_argument(
        "--output", type=Path, help="(default: bench/results/gpu_check.json, or rehearsal.json)"
    )
    args = parser.parse_args(argv)
    args.device = args.device or torch.device("cpu" if args.rehearse else "cuda")
    args.budget = args.budget or (3600 if args.rehearse else 460)
    name = "rehearsal.json" if args.rehearse else "gpu_check.json"
    args.output = args.output or RESULTS / name
    return args


class Check:
    """Runs the cases of one check, and records their results.

    Args:
        budget: seconds for all cases together.
    """

    def __init__(self, setting: Setting, budget: float, output: Path) -> None:
        self.setting = setting
        self.budget = budget
        self.start = time.monotonic()
        self.output = output
        self.content: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M"), "cases": []}

    @property
    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.budget - (time.monotonic() - self.start)

    def run(self, cases: dict[str, Case]) -> bool:
        """Run cases one after the other; return whether all checks passed and no case failed."""
        about = attempt(machine, self.setting, FOR_THE_MACHINE, lambda row: None)
        self.content["machine"] = about.rows[0] if about.rows else about.error
        print(json.dumps(self.content["machine"]), HEAD, sep="\n\n", flush=True)
        well = True
        for name, case in cases.items():
            state = self.run_case(name, case)
            well = well and (state == "passed" if case.checks else state != "failed")
            self.content["seconds"] = round(self.budget - self.left)
            self.output.write_text(json.dumps(self.content, indent=1) + "\n")
        return well

    def run_case(self, name: str, case: Case) -> str:
        """Run a case, if its time limit fits in the budget; return its state."""
        left = self.left
        share = left if self.setting.rehearses else case.seconds
        if share > left:
            made = Attempt(error=f"its {share:.0f} s no longer fit")
            state = "not run"
        else:
            made = attempt(case.run, self.setting, share, show)
            state = state_of(case, made)
        record = {"case": name, "state": state, "seconds": made.seconds, "rows": made.rows}
        if made.error:
            record["error"] = made.error
        self.content["cases"].append(record)
        print(f"| **{name}: {state}**, {made.seconds:.0f} s | | | | | |", flush=True)
        if made.error:
            print(made.error, flush=True)
        return state


def show(row: Row) -> None:
    """Print a finished row."""
    print(line(row), "FAILED" if row.get("passed") is False else "", flush=True)


def state_of(case: Case, made: Attempt) -> str:
    """Return the state of a case that was run."""
    if made.error.startswith(OUT_OF_TIME):
        return OUT_OF_TIME
    if made.error or not made.rows or not all(row.get("passed", True) for row in made.rows):
        return "failed"
    return "passed" if case.checks else "measured"


def main(argv: list[str] | None = None) -> None:
    """Run the cases and write the results; the exit code is 0 if all passed."""
    args = parse(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    check = Check(Setting(args.device, args.rehearse), args.budget, args.output)
    passed = check.run({name: CASES[name] for name in args.only})
    print(f"\n{args.output}: {'all passed' if passed else 'not all passed'}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
