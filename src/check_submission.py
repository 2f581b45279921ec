"""Check submission files against every rule of the servers: CIRR's two files, FashionIQ's predictions, CIRCO's file.

    python src/check_submission.py submission/CIRR/*.json
    python src/check_submission.py submission/FashionIQ/val/mine/*.json --split val --metrics-json mine.json

Files of a validation split are also scored, no matter which code wrote them, with the same metrics as in validate.py.
Files of validate.py --rankings can be scored too. Exit code 0: all files follow all rules; 1: a file breaks a rule, and
every violation is printed with its query; 2: a file cannot be read.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS
from benchmarks.server_files import FORMS, ServerForm, form_of, parse_submission
from cli.parsers import ScriptParser
from evaluation.rankings_file import is_rankings, read_rankings, unlike_annotations
from runtime.files import check_file_writable, write_text
from settings import groups
from settings.declaring import parent
from settings.flag_types import in_any_case, usable_path
from utils import UserError, command, printable

Contents = dict[Path, Any]  # file -> its parsed content


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the check."""
    datasets = list(dict.fromkeys(form.kind.name for form in FORMS))
    parser = ScriptParser(__doc__, parents=[parent(groups.Data)])
    parser.add_argument(
        "files", type=usable_path, nargs="+", metavar="FILE", help="submission file to check"
    )
    parser.add_argument(
        "--split",
        choices=("val", "test"),
        default="test",
        help="split of the queries in the files",
    )
    parser.add_argument(
        "--dataset",
        type=in_any_case(datasets),
        choices=datasets,
        help="benchmark of the files (default: detected from their content, which is not possible for Triplets)",
    )
    parser.add_argument(
        "--metrics-json",
        type=usable_path,
        metavar="FILE",
        help="output file for the metrics of --split val (JSON)",
    )
    args = parser.parse_args(argv)
    if args.metrics_json and args.split != "val":
        parser.error("--metrics-json needs a split with known targets: pass --split val")
    return args


def open_form(kind: type[ServerForm[Any]], data_root: Path, wanted: str) -> ServerForm[Any]:
    """Return the form against which files are checked; print a note if its annotations are not official.

    Args:
        wanted: split, "val" or "test".
    """
    benchmark = kind.kind(data_root)
    split = benchmark.split_called(wanted)
    form = kind(benchmark, split)
    for part, records in zip(benchmark.parts, form.parts.values(), strict=True):
        here = len(records.triplets)
        official, _ = benchmark.official.get(f"{part}.{split}", (here, None))
        if here != official:
            print(
                f"note: {records.name} has {here} queries here, but {official} in the official annotations, so the "
                "server may still reject files that pass this check"
            )
    return form


def print_violations(file: Path, violations: list[str]) -> bool:
    """Print the violations in a file, and return whether there are none."""
    for violation in violations:
        print(printable(f"{file}: {violation}"))
    verdict = f"{len(violations)} violations" if violations else "obeys all rules"
    print(f"{printable(file)}: {verdict}")
    return not violations


def check_files(
    contents: Contents, args: argparse.Namespace
) -> tuple[bool, dict[ServerForm[Any], Contents]]:
    """Print the violations in each submission file; return whether there are none, and the files of each form."""
    forms: dict[type[ServerForm[Any]], ServerForm[Any]] = {}
    files: dict[ServerForm[Any], Contents] = {}
    keep_rules = True
    for file, content in contents.items():
        kind = form_of(file, content, args.dataset)
        if kind not in forms:
            forms[kind] = open_form(kind, args.data_root, args.split)
        violations = forms[kind].violations(file.name, content, file.stat().st_size)
        keep_rules = print_violations(file, violations) and keep_rules
        files.setdefault(forms[kind], {})[file] = content
    return keep_rules, files


def check_rankings(file: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """Print how a file of validate.py --rankings differs from the annotations; return its metrics if it does not.

    Raises:
        UserError: the file is for another split than --split, or `read_rankings` rejects it.
    """
    content = read_rankings(file)
    kind = BENCHMARKS[content["dataset"]]
    excluded: set[str] = set()
    for names in content["excluded_images"].values():
        excluded.update(names)
    benchmark = kind(args.data_root, excluded)
    if content["split"] != benchmark.split_called(args.split):
        raise UserError(f"{file} contains rankings for split {content['split']}: pass --split val")
    if not print_violations(file, unlike_annotations(content, benchmark)):
        return None
    protocols = {name: found["metrics"] for name, found in content["protocols"].items()}
    first = protocols[next(iter(protocols))]
    about = {"dataset": benchmark.name, "split": content["split"]}
    return {**about, "metrics": first, "protocols": protocols, "files": [str(file)]}


def scores_of(files: Mapping[ServerForm[Any], Contents], *, must: bool) -> list[dict[str, Any]]:
    """Return the metrics of each complete submission, and print a note on each incomplete submission.

    Args:
        must: raise UserError for an incomplete submission instead of printing a note.
    """
    scores = []
    for form, contents in files.items():
        slots = [form.slot(file.name, content) for file, content in contents.items()]
        if sorted(slots) != sorted(form.slots):
            several = f"one file for each of {' and '.join(form.slots)}"
            wanted = several if len(form.slots) > 1 else "one file"
            problem = (
                f"{next(iter(contents))} is not scored, because a submission consists of {wanted}: pass the files of "
                "one submission"
            )
            if must:
                raise UserError(problem)
            print(printable(f"note: {problem}"))
            continue
        metrics = form.metrics({file.name: content for file, content in contents.items()})
        about = {"dataset": form.benchmark.name, "split": form.split}
        scores.append({**about, "metrics": metrics, "files": list(map(str, contents))})
    return scores


def print_scores(scores: list[dict[str, Any]], metrics_json: Path | None) -> None:
    """Print metrics as lines of the form `name = value`, and write them to the file if there is one.

    Raises:
        UserError: a file is requested, but the number of submissions is not 1.
    """
    for scored in scores:
        if len(scores) > 1:
            print(f"{scored['dataset']} {scored['split']}: {printable(scored['files'][0])}")
        for name, value in scored["metrics"].items():
            print(f"{name} = {value}")
    if metrics_json:
        if len(scores) != 1:
            raise UserError(
                f"--metrics-json {metrics_json}: the files belong to {len(scores)} submissions: pass the files of "
                "one submission"
            )
        write_text(metrics_json, json.dumps(scores[0], indent=2) + "\n")


@command
def main(argv: list[str] | None = None) -> None:
    """Print the violations in each file and, for a validation split, the metrics."""
    args = parse(argv)
    check_file_writable({"--metrics-json": args.metrics_json})
    contents = {file: parse_submission(file) for file in args.files}
    rankings = [file for file, content in contents.items() if is_rankings(content)]
    scores = []
    keep_rules = True
    for file in rankings:
        del contents[file]
        scored = check_rankings(file, args)
        keep_rules = keep_rules and scored is not None
        scores += [scored] if scored else []
    files_keep_rules, files = check_files(contents, args)
    if not (keep_rules and files_keep_rules):
        raise SystemExit(1)
    if args.split == "val":
        scores += scores_of(files, must=args.metrics_json is not None)
        print_scores(scores, args.metrics_json)


if __name__ == "__main__":
    main()
