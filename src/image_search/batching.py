"""Questions of many users, answered by one model: those that come together are answered together."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")

MOST_TOGETHER = 32  # questions of a batch
WAIT = 0.01  # seconds that a question waits for others, where there are any
GRACE = 2  # seconds that answers may take when the page ends


class Batcher(Generic[Input, Output]):
    """A thread that answers questions in the order in which they come, several of them in one batch.

    While it answers a batch, the next one gathers. After a batch of several there is a crowd, whose next questions are
    on their way, so they are waited for. A user who asks alone never waits.

    Args:
        answer: answers several questions; what it raises is for all of them.
        most: questions of a batch.
        wait: seconds that a batch is waited for in a crowd.
        grace: seconds that `close` waits for answers.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Input]], Sequence[Output]],
        most: int = MOST_TOGETHER,
        wait: float = WAIT,
        grace: float = GRACE,
    ) -> None:
        self._answer = answer
        self._most = most
        self._wait = wait
        self._grace = grace
        self._asked: queue.Queue[tuple[Input, Future[Output]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def ask(self, question: Input) -> "Future[Output]":
        """The answer, when it is there."""
        future: Future[Output] = Future()
        self._asked.put((question, future))
        return future

    def close(self) -> None:
        """Answer what was asked until now, as far as the time goes, and end."""
        self._asked.put(None)
        self._thread.join(self._grace)

    def _work(self) -> None:
        is_crowd = False
        while (first := self._asked.get()) is not None:
            batch = [first]
            until = time.monotonic() + (self._wait if is_crowd else 0)
            ends = False
            while len(batch) < self._most and not ends:
                try:
                    following = self._asked.get(timeout=max(0, until - time.monotonic()))
                except queue.Empty:
                    break
                ends = following is None
                if following is not None:
                    batch.append(following)
            is_crowd = len(batch) > 1
            # A question that nobody waits for any more is left out.
            self._settle([asked for asked in batch if asked[1].set_running_or_notify_cancel()])
            if ends:
                return

    def _settle(self, batch: list[tuple[Input, "Future[Output]"]]) -> None:
        """Answer a batch. Where that fails, each question is asked alone, so that it fails for its own faults only."""
        try:
            answers = self._answer([question for question, _ in batch])
        except BaseException as error:  # it is raised where the question was asked
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for asked in batch:
                self._settle([asked])
            return
        for (_, future), answered in zip(batch, answers, strict=True):
            future.set_result(answered)
