"""Display the progress of long work: a bar in a terminal, a line per minute if the output goes to a file."""

import logging
import time
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY = 60.0  # seconds from line to line in a file


class Clock:
    """Says when the next line is due."""

    def __init__(self) -> None:
        self.said_at = time.monotonic()

    def is_due(self) -> bool:
        """Tell whether a minute has passed since the last line."""
        return time.monotonic() - self.said_at >= LINE_EVERY

    def restart(self) -> None:
        """A line was written."""
        self.said_at = time.monotonic()


class Counter:
    """A context that counts the images that some work is done with, and shows it.

    Args:
        total: how many there are.
        doing: what is done, as "decoding images".
        shown: False for a process that leaves the output to another.
    """

    def __init__(self, total: int, doing: str, *, shown: bool = True) -> None:
        self.total = total
        self.doing = doing
        # None: hidden where the output is no terminal.
        hidden = None if shown else True
        self.bar = tqdm(total=total, desc=doing, unit=" images", leave=False, disable=hidden)
        self.writes_lines = shown and self.bar.disable
        self.clock = Clock()
        self.start = time.monotonic()
        self.done = 0

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *of_an_error: Any) -> None:
        self.bar.close()

    def update(self, count: int = 1) -> None:
        """Some more is done."""
        self.done += count
        self.bar.update(count)
        if self.writes_lines and self.clock.is_due():
            each = (time.monotonic() - self.start) / self.done
            left = duration(each * (self.total - self.done))
            logger.info(
                "%s: %s",
                self.doing,
                f"{self.done:,} of {self.total:,}, {rate(1 / each)} images/s, {left} left",
            )
            self.clock.restart()


def duration(seconds: float) -> str:
    """Seconds in words: "45 s", "12 min", "3 h 05 min"."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def rate(per_second: float) -> str:
    """A number per second, with a decimal where it is small."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"
