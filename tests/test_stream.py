"""The order of pairs is one integer's function; work ahead keeps order, errors and threads in hand."""

import itertools
import threading
import time

import numpy as np
import pytest

from easyrm.data.stream import PairStream, prefetch


def test_every_epoch_is_another_permutation():
    stream = PairStream(10, 4, seed=3, shuffle=True)
    epochs = stream.indices(0, 40).reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert (PairStream(10, 4, seed=4, shuffle=True).indices(0, 10) != epochs[0]).any()


def test_a_position_is_enough():
    whole = PairStream(7, 3, seed=0, shuffle=True).indices(0, 60)
    for position, count in [(0, 7), (5, 4), (6, 1), (13, 30), (20, 0)]:
        alone = PairStream(7, 5, seed=0, shuffle=True).indices(position, count)
        np.testing.assert_array_equal(alone, whole[position : position + count])
    batches = PairStream(7, 3, seed=0, shuffle=True).batches(6, 4)
    np.testing.assert_array_equal(np.concatenate(list(batches)), whole[6:18])


def test_file_order_and_a_recorded_shuffle():
    assert PairStream(4, 2, seed=1, shuffle=False).indices(2, 6).tolist() == [2, 3, 0, 1, 2, 3]
    # Recorded once: a change of this order would change every published run.
    assert PairStream(8, 2, seed=0, shuffle=True).indices(0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_prefetch_keeps_order_and_runs_ahead():
    drawn = []
    items = prefetch((drawn.append(i) or i for i in range(20)), 3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(drawn) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 4 <= len(drawn) <= 6
    assert list(items) == list(range(1, 20))


def test_prefetch_raises_what_the_thread_raised_in_its_place():
    def broken():
        yield 1
        raise OSError("disk")

    items = prefetch(broken(), 2)
    assert next(items) == 1
    with pytest.raises(OSError, match="disk"):
        next(items)


def test_prefetch_ends_its_thread_when_the_consumer_stops():
    items = prefetch(itertools.count(), 2)
    assert next(items) == 0
    assert any(thread.name == "prefetch" for thread in threading.enumerate())
    items.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
