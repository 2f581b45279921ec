"""Trainings that are killed again and again, resumed, and held against one that never was. For tests and the soak."""

import gc
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from forks import forked, redirect
from runtime.image_files import decoded
from runtime.tensors import load_tensors


@dataclass
class Tally:
    """What a series of kills came to."""

    kills: int = 0
    rounds: int = 0  # trainings
    files_read: int = 0
    unreadable: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def work(door: str, argv: list[str], log: Path, kill_at_sync: int | None) -> None:
    """One process: a script's main, its output in a file; it may kill itself where a file is about to be synced."""
    with open(log, "ab", buffering=0) as file:
        redirect(file, file)
    gc.freeze()  # what the fork was born with is never garbage: collecting it would copy its memory
    if kill_at_sync is not None:
        left, real = [kill_at_sync], os.fsync

        def sync(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = sync
    __import__(door).main(argv)


def run_to_the_end(door: str, argv: list[str], log: Path) -> None:
    """Run a script in a process of its own, which must end well."""
    process = forked(work, door, argv, log, None)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]


def the_run(output: Path) -> Path | None:
    """The run folder in an output folder, if there is one yet."""
    runs = [folder for folder in output.glob("*") if not folder.name.startswith(".")]
    assert len(runs) <= 1, runs
    return runs[0] if runs else None


def read_everything(output: Path, tally: Tally) -> None:
    """Read all that a killed process left, but for what it was just writing beside."""
    for file in sorted(output.rglob("*")):
        if file.is_dir() or file.name.endswith(".tmp"):
            continue
        tally.files_read += 1
        try:
            readers: dict[str, Callable] = {
                ".csv": pd.read_csv,
                ".pt": load_tensors,
                ".json": read_json,
            }
            readers |= {".png": lambda file: decoded(file), ".html": whole_page}
            readers[file.suffix](file)
        except BaseException as error:
            tally.unreadable.append(f"{file}: {error!r}")


def read_json(file: Path) -> object:
    return json.loads(file.read_text())


def whole_page(file: Path) -> None:
    assert file.read_text().endswith("</html>\n")


def survive(
    door: str,
    argv: list[str],
    whole: Path,
    folder: Path,
    kills: int,
    longest: float,
    syncs: int,
    seed: int,
) -> Tally:
    """Start a training, kill it at random moments and resume it, over and over; each must end like the whole one.

    In turns a kill comes where a random file is about to be synced, and after a random time.

    Args:
        whole: the run that was never killed.
        longest: seconds that a process may live.
        syncs: how many files it may sync at most, where it is killed at one.
    """
    rng, tally = random.Random(seed), Tally()
    while tally.kills < kills:
        output = folder / f"round{tally.rounds}"
        tally.rounds += 1
        while tally.kills < kills and not attempt(
            door, argv, output, longest, syncs if tally.kills % 2 == 0 else None, rng
        ):
            tally.kills += 1
            read_everything(output, tally)
        run = the_run(output)
        run_to_the_end(
            door,
            ["--resume", str(run)] if run else [*argv, "--output-dir", str(output)],
            log_of(output),
        )
        tally.differences += differences(whole, the_run(output))
    return tally


def attempt(
    door: str, argv: list[str], output: Path, longest: float, syncs: int | None, rng: random.Random
) -> bool:
    """One process that is killed, at a sync or after a time; whether it came to its end before."""
    run = the_run(output)
    often = ["--checkpoint-every-minutes", str(rng.choice([1e-9, 1e-3, 10]))]
    words = [*(["--resume", str(run)] if run else [*argv, "--output-dir", str(output)]), *often]
    process = forked(work, door, words, log_of(output), rng.randrange(syncs) if syncs else None)
    process.join(None if syncs else rng.uniform(0, longest))
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode in (-signal.SIGKILL, 0), log_of(output).read_text()[-3000:]
    return process.exitcode == 0


def log_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.log")


def differences(one: Path, other: Path) -> list[str]:
    """What tells two runs apart: names of files, bytes of CSV and JSON files, tensors of checkpoints."""
    names = [
        sorted(str(f.relative_to(run)) for f in run.rglob("*") if f.is_file())
        for run in (one, other)
    ]
    if names[0] != names[1]:
        return [f"files {names[0]} and {names[1]}"]
    return [name for name in names[0] if not same_file(one / name, other / name)]


def same_file(one: Path, other: Path) -> bool:
    if one.suffix == ".pt":
        return same(load_tensors(one), load_tensors(other))
    if one.suffix == ".json":
        return same(read_json(one), read_json(other))
    return (
        one.name == "index.html" or one.read_bytes() == other.read_bytes()
    )  # a page names its folder


def same(one: object, other: object) -> bool:
    """Whether two checkpoints hold the same bits; where the runs lie may differ."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        free = {"output_dir", "checkpoint_every_minutes", "command", "started_in"}
        free |= {"date", "checkpoints"}  # of a seed's metrics
        keys = one.keys() - free
        return keys == other.keys() - free and all(same(one[k], other[k]) for k in keys)
    return one == other


def scenarios(data_root: Path, long: bool) -> list[tuple[str, str, list[str]]]:
    """Name, script and flags of what is killed: all that a state holds is in use."""
    clip = ["--clip-model-name", str(data_root / "tiny_clip_vit.pt"), "--data-root", str(data_root)]
    both = [*clip, "--device", "cpu", "--num-workers", "0", "--save-training", "--cosine"]
    both += ["--batch-size", "4" if long else "8", "--warmup-steps", "5", "--ema-decay", "0.9"]
    both += ["--validation-frequency", "2", "--validate-last", "--save-every", "3"]
    stage_1 = [*both, "--num-epochs", "8" if long else "4", "--learning-rate", "1e-4"]
    stage_2 = [*both, "--num-epochs", "30" if long else "4", "--combiner-lr", "1e-3"]
    stage_2 += ["--projection-dim", "16", "--hidden-dim", "24"]
    stage_2 += ["--no-feature-cache"]
    return [
        ("stage 1, FashionIQ", "clip_fine_tune", [*stage_1, "--dataset", "FashionIQ"]),
        ("stage 1, CIRR", "clip_fine_tune", [*stage_1, "--dataset", "CIRR", "--save-best"]),
        (
            "stage 2, FashionIQ",
            "combiner_train",
            [*stage_2, "--dataset", "FashionIQ", "--save-best"],
        ),
        ("stage 2, CIRR", "combiner_train", [*stage_2, "--dataset", "CIRR", "--seeds", "0", "1"]),
    ]
