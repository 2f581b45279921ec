"""Values that flags take: text that is checked and converted, or rejected with what would be right."""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.choices import AUTO
from runtime.hub import HUB
from runtime.spelling import as_stored
from utils import printable

MILLION = 10**6  # more of anything that a flag counts is a slip of the finger
LONGEST_SHOWN = 60  # characters of a value that a message repeats


def refused(text: str, reason: str) -> argparse.ArgumentTypeError:
    """Return what to raise for a value that is no good; the parser names its flag."""
    shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
    return argparse.ArgumentTypeError(f"{printable(shown) or 'an empty text'} {reason}")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A type for flags: whole numbers between two, both included."""

    def number(text: str) -> int:
        digits = re.fullmatch(r"0*([0-9]{1,18})", text)
        if not digits or not least <= int(digits[1]) <= most:
            raise refused(text, f"is not a whole number from {least} to {most}")
        return int(digits[1])

    return number


def number(least: float, most: float) -> Callable[[str], float]:
    """A type for flags: numbers between two, both included."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise refused(text, f"is not a number from {least:g} to {most:g}")
        return value

    return number


positive_int = whole_number(1, MILLION)
seed_int = whole_number(0, 2**32 - 1)
rows = whole_number(1, 10**9)  # of a table in memory: as many as there are, if fewer
port = whole_number(1, 65_535)
positive_float = number(1e-9, 1e9)
fraction = number(1e-9, 1 - 1e-9)


def usable_path(text: str) -> Path:
    """A path that a file may have, whether or not one is there; ~ is the home folder.

    It is looked up once, so that a name that no file can have is refused here, and not where it is used.
    """
    try:
        found = Path(text).expanduser()
        if text:
            os.fsencode(found.absolute()).decode()
            found.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = as_stored(found)
    except UnicodeError:
        raise refused(text, "is not UTF-8: rename it") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise refused(
            text, f"cannot be used as a path ({getattr(error, 'strerror', error)})"
        ) from None
    if not text:
        raise refused(text, "is not a path: pass one, . for the current folder")
    return found


def path_or_auto(text: str) -> Path | str:
    """A path, or the word that leaves the choice."""
    return text if text == AUTO else usable_path(text)


def model_name(text: str) -> str:
    """A name, or a path as text; ~ is the home folder."""
    found = usable_path(text)
    return str(found) if text.startswith("~") else text


def repository(text: str) -> str:
    """The name of a repository on the Hugging Face Hub."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    if len(text) > 96 or not re.fullmatch(f"{part}/{part}", text) or "--" in text or ".." in text:
        raise refused(text, "is not the name of a repository: pass ORG/REPO")
    return text


def pair_place(text: str) -> Path | str:
    """The folder of an exported pair, or a repository of the Hugging Face Hub after "hf-hub:"."""
    if text.startswith(HUB):
        return HUB + repository(text.removeprefix(HUB))
    return usable_path(text)


def file_name(text: str) -> str:
    """Part of a file's name, which cannot lead out of its folder."""
    if not re.fullmatch(r"[\w.@+-]{1,100}", text) or text in (".", ".."):
        raise refused(text, "is not a valid name: use up to 100 letters, digits and . _ @ + -")
    return text


def in_any_case(names: Iterable[str]) -> Callable[[str], str]:
    """A type for flags: one of some names in any case, as it is spelled among them."""
    spelled = {name.lower(): name for name in names}

    def name(text: str) -> str:
        return spelled.get(text.lower(), text)

    return name


def concept_template(text: str) -> str:
    """A type for flags: a text with {shared_concept} and {relative_caption} in it, and nothing else in braces."""
    fields = re.findall(r"\{[^{}]*\}|[{}]", text)
    if sorted(fields) != ["{relative_caption}", "{shared_concept}"]:
        raise refused(text, "is not a text with one {shared_concept} and one {relative_caption}")
    return text


class Several(argparse.Action):
    """Values of a flag that may be given more than once: all of them, in place of the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        so_far = getattr(namespace, self.dest)
        typed = [] if so_far is self.default else so_far
        setattr(namespace, self.dest, [*typed, *(values or ())])
