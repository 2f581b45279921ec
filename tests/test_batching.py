"""Questions that come together are answered together, and each gets its own answer or its own error."""

import threading
from concurrent.futures import CancelledError, wait

import pytest

from forks import HANG
from image_search.batching import Batcher


class Doubling:
    """Doubles numbers, and keeps the batches that they came in. It holds the first one until `go` is set."""

    def __init__(self):
        self.go = threading.Event()
        self.begun = threading.Event()
        self.batches = []

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        self.begun.set()
        assert self.go.wait(HANG)
        if any(number < 0 for number in numbers):
            raise ValueError(f"{min(numbers)} is negative")
        return [2 * number for number in numbers]


@pytest.fixture
def doubling():
    return Doubling()


@pytest.fixture
def batcher(doubling):
    batcher = Batcher(doubling, most=4, wait=0)
    yield batcher
    doubling.go.set()
    batcher.close()


def asked_while_busy(batcher, doubling, numbers):
    """The answers of questions that came while another was answered."""
    first = batcher.submit(0)
    assert doubling.begun.wait(HANG)
    futures = [batcher.submit(number) for number in numbers]
    return first, futures


def test_what_came_meanwhile_is_one_batch_of_at_most_so_many(batcher, doubling):
    first, futures = asked_while_busy(batcher, doubling, range(1, 7))
    doubling.go.set()
    assert first.result(HANG) == 0
    assert [future.result(HANG) for future in futures] == [2, 4, 6, 8, 10, 12]
    assert doubling.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_an_error_is_of_the_question_that_caused_it(batcher, doubling):
    _, futures = asked_while_busy(batcher, doubling, [1, -2, 3])
    doubling.go.set()
    assert futures[0].result(HANG) == 2
    assert futures[2].result(HANG) == 6
    with pytest.raises(ValueError, match="-2 is negative"):
        futures[1].result(HANG)


def test_a_question_that_nobody_waits_for_is_left_out(batcher, doubling):
    _, futures = asked_while_busy(batcher, doubling, [1, 2])
    futures[0].cancel()
    doubling.go.set()
    assert futures[1].result(HANG) == 4
    with pytest.raises(CancelledError):
        futures[0].result(HANG)
    assert doubling.batches == [[0], [2]]


def test_others_are_waited_for_in_a_crowd_alone(doubling):
    batcher = Batcher(doubling, most=3, wait=10 * HANG)
    first, futures = asked_while_busy(batcher, doubling, [1, 2])
    doubling.go.set()
    assert first.result(HANG) == 0  # who asks alone waits for nobody
    assert not wait(futures, HANG).not_done
    futures = [batcher.submit(number) for number in (3, 4, 5)]
    assert not wait(futures, HANG).not_done
    assert doubling.batches == [[0], [1, 2], [3, 4, 5]]
    batcher.close()


def test_what_was_asked_is_answered_before_the_end(doubling):
    batcher = Batcher(doubling, most=2, wait=HANG)
    _, futures = asked_while_busy(batcher, doubling, [1, 2, 3])
    doubling.go.set()
    batcher.close()  # in a crowd, it waits for no others any more
    assert [future.result(0) for future in futures] == [2, 4, 6]


def test_the_end_waits_for_no_answer_that_takes_long(doubling):
    """A store may be asked for a minute."""
    batcher = Batcher(doubling, wait=0, grace=0.1)
    answer = batcher.submit(1)
    assert doubling.begun.wait(HANG)
    batcher.close()
    assert not answer.done()
    doubling.go.set()
