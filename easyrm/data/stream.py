"""The order of pairs, and work done ahead of its consumer."""

import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np


class PairStream:
    """The endless sequence of pair indices: epoch after epoch, each a permutation of its own.

    A position is one integer, pairs consumed. The order depends on (n, seed, shuffle) alone: it is drawn from a bit
    generator's raw stream, which NumPy keeps stable, unlike the methods of `Generator`.
    """

    def __init__(self, n: int, batch_size: int, seed: int, shuffle: bool):
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self._epoch, self._order = -1, np.arange(0)

    def indices(self, position: int, count: int) -> np.ndarray:
        """int64[count]: the pairs at `position` and after; crosses the ends of epochs."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, self.n)
            parts.append(self._permutation(epoch)[offset : offset + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.arange(0)

    def batches(self, position: int, steps: int) -> Iterator[np.ndarray]:
        """The next `steps` batches from `position`, int64[batch_size] each."""
        for step in range(steps):
            yield self.indices(position + step * self.batch_size, self.batch_size)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            raw = (
                np.random.Philox(key=[self.seed % 2**64, epoch]).random_raw(self.n)
                if self.shuffle
                else np.arange(self.n)
            )
            self._epoch, self._order = epoch, np.argsort(raw, kind="stable")
        return self._order


def prefetch(iterable: Iterable, depth: int) -> Iterator:
    """Yields the items of `iterable`, drawn in one background thread up to `depth` items ahead.

    An exception in the thread is raised here, in its place. Closing the generator ends the thread.
    """
    items: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in iterable:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed over: the consumer raises it
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
