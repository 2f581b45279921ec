"""Values that flags take: text that is checked and converted, or refused with what would be right."""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.choices import AUTO


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def natural_int(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive_int(text)


def seed_int(text: str) -> int:
    """A whole number that fits 32 bits."""
    if natural_int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2**32")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def weight(text: str) -> float:
    """A finite number of at least 0."""
    return 0.0 if text in ("0", "0.0") else positive_float(text)


def fraction(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    if positive_float(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return float(text)


def file_name(text: str) -> str:
    """Part of a file's name, which cannot lead out of its folder."""
    if not re.fullmatch(r"[\w.@+-]+", text) or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text}: use letters, digits and . _ @ + - only")
    return text


def path_or_auto(text: str) -> Path | str:
    """A path, or the word that leaves the choice."""
    return text if text == AUTO else Path(text)


def in_any_case(names: Iterable[str]) -> Callable[[str], str]:
    """A type for flags: one of some names in any case, as it is spelled among them."""
    spelled = {name.lower(): name for name in names}

    def name(text: str) -> str:
        return spelled.get(text.lower(), text)

    return name


def port(text: str) -> int:
    """A port that a server may listen on."""
    if not text.isdecimal() or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text} is no port: choose one from 1 to 65535")
    return int(text)
