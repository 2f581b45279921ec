"""Display the progress of long work: a bar in a terminal, a line per minute if the output goes to a file."""

import logging
import time
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY = 60.0  # seconds between two lines in a file


class Clock:
    """Timer that determines when the next line is due."""

    def __init__(self) -> None:
        self.said_at = time.monotonic()

    def is_due(self) -> bool:
        """Check whether a minute has passed since the last line."""
        return time.monotonic() - self.said_at >= LINE_EVERY

    def restart(self) -> None:
        """Restart the interval, after a line has been written."""
        self.said_at = time.monotonic()


class Counter:
    """A context that counts images while they are processed, and displays the progress.

    Args:
        total: number of images.
        doing: description of the work, such as "decoding images".
        shown: False for a process that leaves the output to another process.
    """

    def __init__(self, total: int, doing: str, *, shown: bool = True) -> None:
        self.total = total
        self.doing = doing
        # With None, tqdm hides the bar if the output is not a terminal.
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
        """Count more images as done."""
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
    """Format a number of seconds: "45 s", "12 min", "3 h 05 min"."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def rate(per_second: float) -> str:
    """Format a number per second, with one decimal if it is small."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"
