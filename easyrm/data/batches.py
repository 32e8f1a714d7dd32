"""From the order of pairs, or of groups of ranked responses, to the batches of rows that a step takes."""

import functools
from collections.abc import Iterable, Iterator

import numpy as np

from easyrm.data.config import DataConfig
from easyrm.data.packing import RowBatch, RowShape, pack
from easyrm.data.row_plan import choose_shape, plan_shapes
from easyrm.data.store import PairStore


class Batches:
    """Packed batches of a store's pairs, each in one of a few `shapes` that are known before anything is compiled."""

    def __init__(
        self,
        store: PairStore,
        config: DataConfig,
        orders: Iterable[np.ndarray],
        *,
        row_groups: int,
        pad_id: int,
        max_shapes: int = 1,
    ):
        """Plan the shapes for all of `orders`, the pair indices of each batch.

        Rows are dealt to `row_groups` groups of devices in each of the config's micro-batches.
        """
        self.store = store
        layout = {"micro_batches": config.micro_batches, "packing": config.packing}
        self._choose = functools.partial(choose_shape, **layout)
        self._pack = functools.partial(
            pack,
            **layout,
            batch_size=config.batch_size,
            row_groups=row_groups,
            pad_id=pad_id,
            width=store.width,
        )
        self.shapes = plan_shapes(
            store,
            orders,
            row_length=config.row_length,
            max_length=config.max_length,
            batch_size=config.batch_size,
            row_groups=row_groups,
            width=store.width or 1,
            max_shapes=max_shapes,
            **layout,
        )

    def pack(self, indices: np.ndarray) -> RowBatch:
        """The rows of one batch of pairs."""
        shape = self._choose(self.shapes, self.store.lengths(indices))
        items = self.store.group if self.store.width else self.store.__getitem__
        return self._pack([items(index) for index in indices], shape)

    def empty(self, shape: RowShape) -> RowBatch:
        """A batch of a shape without pairs, for compiling."""
        return self._pack([], shape)

    def __call__(self, orders: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, RowBatch]]:
        """(pair indices, batch) in the order given."""
        for indices in orders:
            yield indices, self.pack(indices)
