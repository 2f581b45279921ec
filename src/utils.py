"""Ground floor: errors for the user, what wraps a script, seed, and how flags and numbers are spelled."""

import functools
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """Something the user can put right: one line that names the file or the flag, and the remedy.

    It stays one line whatever is in the names that it quotes.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).splitlines()))


class DiskError(UserError):
    """A file could not be written; the earlier one is as it was."""


class Stopped(BaseException):
    """A signal asked a training to stop, and everything needed to go on with it is on disk.

    Attributes:
        signal: its name.
        remedy: how to go on.
    """

    def __init__(
        self,
        signal: str,
        remedy: str = "nothing was trained yet: start it again with the same command",
    ):
        super().__init__(signal, remedy)
        self.signal = signal
        self.remedy = remedy


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: a UserError becomes one line on stderr and exit code 2, Ctrl-C 130, a stop signal 0."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        script = Path(main.__code__.co_filename).name
        try:
            main(argv)
        except UserError as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except out_of_memory_errors() as error:
            remedy = "lower --batch-size, --micro-batch-size or --similarity-block, or use --gradient-checkpointing"
            print(
                f"{script}: error: the GPU's memory is full ({first_line(error)[:80]}): {remedy}",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        except Stopped as stop:
            print(f"{script}: stopped by {stop.signal}; {stop.remedy}", file=sys.stderr)
            raise SystemExit(0) from None
        except KeyboardInterrupt:
            print(f"{script}: interrupted; the files written so far are whole", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def out_of_memory_errors() -> tuple[type[BaseException], ...]:
    """What a full GPU raises; nothing where torch was not needed so far, and is not loaded just to ask."""
    error = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    return (error,) if error else ()


def seed_everything(seed: int) -> None:
    """Seed python and torch (all devices)."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def flag(name: str) -> str:
    """A flag as it is typed, from the name that its value has: "clip_bs" -> "--clip-bs"."""
    return "--" + name.replace("_", "-")


def two_decimals(value: float, sign: str = "") -> str:
    """A metric as every table, log and page shows it; a difference of metrics with the sign "+"."""
    return f"{value:{sign}.2f}"
