"""A thread that runs one model for many users: queries that arrive together are computed in one batch."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")

MOST_TOGETHER = 32  # maximum number of queries in a batch
WAIT = 0.01  # seconds to wait for more queries while several users are active
GRACE = 2  # maximum seconds for pending results when the server stops


class Batcher(Generic[Input, Output]):
    """A thread that computes queries in their order of arrival, several of them in one batch.

    The next batch collects queries while the current batch is computed. After a batch of several queries, the batcher
    waits a little for more, because the same users are likely to send their next queries. A single user never waits.

    Args:
        compute: function that maps several queries to their results.
        most: maximum number of queries in a batch.
        wait: seconds to wait for more queries after a batch of several.
        grace: maximum seconds that `close` waits for results.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Input]], Sequence[Output]],
        most: int = MOST_TOGETHER,
        wait: float = WAIT,
        grace: float = GRACE,
    ) -> None:
        self._compute = compute
        self._most = most
        self._wait = wait
        self._grace = grace
        self._pending: queue.Queue[tuple[Input, Future[Output]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="queries", daemon=True)
        self._thread.start()

    def submit(self, query: Input) -> "Future[Output]":
        """Add a query to the queue and return the future of its result."""
        future: Future[Output] = Future()
        self._pending.put((query, future))
        return future

    def close(self) -> None:
        """Compute the queries that were submitted so far, within the grace period, and end the thread."""
        self._pending.put(None)
        self._thread.join(self._grace)

    def _work(self) -> None:
        is_crowd = False
        while (first := self._pending.get()) is not None:
            batch = [first]
            until = time.monotonic() + (self._wait if is_crowd else 0)
            ends = False
            while len(batch) < self._most and not ends:
                try:
                    following = self._pending.get(timeout=max(0, until - time.monotonic()))
                except queue.Empty:
                    break
                ends = following is None
                if following is not None:
                    batch.append(following)
            is_crowd = len(batch) > 1
            # Cancelled queries are skipped.
            self._settle([item for item in batch if item[1].set_running_or_notify_cancel()])
            if ends:
                return

    def _settle(self, batch: list[tuple[Input, "Future[Output]"]]) -> None:
        """Compute a batch; if it fails, compute each query by itself, so that only the faulty queries fail."""
        try:
            results = self._compute([query for query, _ in batch])
        except BaseException as error:
            # The future raises it in the thread that submitted the query.
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for item in batch:
                self._settle([item])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
