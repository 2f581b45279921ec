"""Types of flags for argparse: functions that check and convert a text, or reject it with a hint."""

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

MILLION = 10**6  # largest count that a flag accepts; anything larger is a typing error
LONGEST_SHOWN = 60  # number of characters of a value that an error message quotes


def refused(text: str, reason: str) -> argparse.ArgumentTypeError:
    """Return the error to raise for an invalid value; the parser adds the name of the flag."""
    shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
    return argparse.ArgumentTypeError(f"{printable(shown) or 'an empty text'} {reason}")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a flag type for whole numbers from `least` to `most`, both included."""

    def number(text: str) -> int:
        digits = re.fullmatch(r"0*([0-9]{1,18})", text)
        if not digits or not least <= int(digits[1]) <= most:
            raise refused(text, f"is not a whole number from {least} to {most}")
        return int(digits[1])

    return number


def number(least: float, most: float) -> Callable[[str], float]:
    """Return a flag type for numbers from `least` to `most`, both included."""

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
rows = whole_number(1, 10**9)  # number of triplets or images of a dataset
port = whole_number(1, 65_535)
positive_float = number(1e-9, 1e9)
fraction = number(1e-9, 1 - 1e-9)


def usable_path(text: str) -> Path:
    """Return a path that is possible on this machine, whether or not it exists; ~ is the home folder.

    The path is looked up here, so that an impossible name is rejected at once and not when it is used.
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
        raise refused(text, "is not a path: pass a path, such as . for the current folder")
    return found


def path_or_auto(text: str) -> Path | str:
    """Return a path, or the word "auto" unchanged."""
    return text if text == AUTO else usable_path(text)


def model_name(text: str) -> str:
    """Return the name of a CLIP model or the path of a checkpoint as text; ~ is the home folder."""
    found = usable_path(text)
    return str(found) if text.startswith("~") else text


def repository(text: str) -> str:
    """Return the name of a Hugging Face Hub repository, ORG/REPO."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    if len(text) > 96 or not re.fullmatch(f"{part}/{part}", text) or "--" in text or ".." in text:
        raise refused(text, "is not the name of a repository: pass ORG/REPO")
    return text


def pair_place(text: str) -> Path | str:
    """Return the folder of an exported pair, or "hf-hub:" followed by the name of a Hub repository."""
    if text.startswith(HUB):
        return HUB + repository(text.removeprefix(HUB))
    return usable_path(text)


def file_name(text: str) -> str:
    """Return a text that can be part of a file name and cannot lead out of its folder."""
    if not re.fullmatch(r"[\w.@+-]{1,100}", text) or text in (".", ".."):
        raise refused(text, "is not a valid name: use up to 100 letters, digits and . _ @ + -")
    return text


def in_any_case(names: Iterable[str]) -> Callable[[str], str]:
    """Return a flag type that ignores case: a known name gets its proper spelling, other texts stay as they are."""
    spelled = {name.lower(): name for name in names}

    def name(text: str) -> str:
        return spelled.get(text.lower(), text)

    return name


def concept_template(text: str) -> str:
    """Return a template that contains {shared_concept} and {relative_caption} once each, and no other braces."""
    fields = re.findall(r"\{[^{}]*\}|[{}]", text)
    if sorted(fields) != ["{relative_caption}", "{shared_concept}"]:
        raise refused(text, "is not a text with one {shared_concept} and one {relative_caption}")
    return text


class Several(argparse.Action):
    """Action of a flag that may be given more than once: all its values together replace the default."""

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
