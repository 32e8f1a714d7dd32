"""What one step computes: how many rows of how many tokens, and what is useful of them."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from easyrm.config import RunConfig
from easyrm.data.packing import RowBatch, RowShape
from easyrm.data.tokenizer import load_tokenizer
from easyrm.models.config import LlamaConfig
from easyrm.training.inputs import Inputs

# Mean tokens of a pair, a shared prompt counted once, of sets whose name contains the word.
TYPICAL_TOKENS = {"hh": 236, "ultrafeedback": 796}
TYPICAL_PAIRS = 60_908  # of ultrafeedback_mean_aspects and of hh_rlhf_60k in allenai/tulu-2.5-preference-data
PACKED = 1.05  # computed over unique tokens that packing reaches when rows are plenty
SHORTEST_ROW = 1024


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a batch asks for on any mesh: unique tokens and keys that they see, a step; `pairs` in an epoch.

    `fixed`: the row shape where it is given. `assumed`: how these figures came about, one sentence each. `width`: the
    most units of a group of ranked responses, which is then what is meant by a pair; 0 of pairs.
    """

    batch_size: int
    tokens: float
    visible_keys: float
    pairs: int
    fixed: RowShape | None
    assumed: tuple[str, ...]
    width: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """The rows of one step on one mesh: shape, micro-batches, groups of devices with rows of their own, rows needed.

    `width` as in Demand.
    """

    shape: RowShape
    micro_batches: int
    groups: int
    needed: int
    width: int = 0

    @property
    def tokens(self) -> float:
        """Tokens that a group of devices computes in one micro-batch."""
        return self.shape.capacity / self.micro_batches / self.groups

    @property
    def idle(self) -> int:
        """Groups of devices whose rows hold nothing but padding."""
        return max(0, self.groups - -(-self.needed // self.micro_batches))

    def rows(self, batch_size: int) -> RowBatch:
        """The arrays of a step, abstract."""
        by_token = (self.micro_batches, self.shape.rows // self.micro_batches, self.shape.length)
        by_record, by_slot = ((self.micro_batches, batch_size * units) for units in (1, self.width or 1))
        kinds = [(by_token, np.int32)] * 4 + [(by_slot, np.int32)] * 4
        kinds += [(by_record, np.float32)] * 3 + [(by_record, np.int32)]
        kinds += [(by_slot, np.int32)] * 2 if self.width else []
        return RowBatch(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))


def demand_of_rows(config: RunConfig, rows: int, length: int, pairs: int) -> Demand:
    """The worst case of a row shape: every row is one conversation, of which all tokens count."""
    assumed = (f"worst case: each of {rows} rows is one conversation of {length} tokens, nothing shared or padded",)
    keys = rows * length * (length + 1) / 2
    return Demand(
        config.data.batch_size, rows * length, keys, pairs, RowShape(rows, length), assumed, int(config.loss.ranked)
    )


def typical_demand(config: RunConfig, pair_tokens: int, pairs: int) -> Demand:
    """The demand of pairs of typical length, where the data is not at hand.

    `pair_tokens` 0 takes the mean that is known of the named data, else that of UltraFeedback.
    """
    name = next((word for word in TYPICAL_TOKENS if word in config.data.train.lower()), "ultrafeedback")
    tokens = pair_tokens or TYPICAL_TOKENS[name]
    source = "--pair_tokens" if pair_tokens else f"the mean of {name}"
    # Of a conversation's tokens, two thirds of a pair's, each sees half of them; the prompt counts once.
    side = 2 * tokens / 3
    keys = 2 * side * side / 2 - (tokens / 3) ** 2 / 2
    assumed = (
        f"{tokens} unique tokens a pair ({source}; --data.train=FILE takes real ones), a third of them shared",
        f"{pairs} pairs an epoch (--pairs gives another number)",
    )
    batch = config.data.batch_size
    return Demand(batch, batch * tokens, batch * keys, pairs, None, assumed, int(config.loss.ranked))


def read_demand(config: RunConfig, llama: LlamaConfig, groups: int, say: Callable[[str], None]) -> Demand:
    """The demand of the run's own pairs, on so many groups. Raises InputError for data that no run could use."""
    tokenizer = load_tokenizer(config.tokenizer or config.model.init_from, config.data.pad_token)
    return demand_of_inputs(config, Inputs(config, tokenizer, llama, row_groups=groups, say=say))


def demand_of_inputs(config: RunConfig, inputs: Inputs) -> Demand:
    """The demand of pairs that were read, in the largest of their row shapes."""
    store = inputs.train.store
    chosen, prompt, rejected = store.lengths(np.arange(len(store))).reshape(-1, 3).T
    keys = sum(side * prompt + side * (side + 1) // 2 for side in (chosen, rejected)) + prompt * (prompt + 1) // 2
    batch = config.data.batch_size
    mean = float((chosen + prompt + rejected).sum()) / len(store)
    shape = max(inputs.train.shapes, key=lambda shape: shape.capacity)
    kind = "groups" if store.width else "pairs"
    assumed = (
        f"{len(store)} {kind} of {mean:.0f} unique tokens, read from {config.data.train}",
        f"compiled: the largest of the run's {len(inputs.train.shapes)} row shapes",
    )
    keys_a_record = float(keys.sum()) / len(store)
    return Demand(batch, batch * mean, batch * keys_a_record, len(store), shape, assumed, store.width)


def work_on(demand: Demand, config: RunConfig, groups: int, micro_batches: int) -> Work:
    """The rows of a step on a mesh with `groups` groups of devices: as many rows as there are groups, if need be.

    Of shapes of equal capacity (16 x 4096, 32 x 2048, 64 x 1024) the one with the longest rows that has a row for
    every group in each micro-batch; a given shape is only filled up with rows of padding.
    """
    multiple = groups * micro_batches
    if demand.fixed:
        rows, length = demand.fixed
        needed = min(rows, math.ceil(demand.tokens * PACKED / length)) if config.data.packing else rows
    elif not config.data.packing:
        rows = needed = 2 * max(1, demand.width) * demand.batch_size
        length = config.data.max_length
    else:
        rows = 0
        capacity = demand.tokens * PACKED
        length = config.data.row_length or config.data.max_length
        while not config.data.row_length and length // 2 >= SHORTEST_ROW and capacity / length < multiple:
            length //= 2
        needed = -(-int(capacity) // length)
    shape = RowShape(-(-max(rows, needed) // multiple) * multiple, length)
    return Work(shape, micro_batches, groups, needed, demand.width)
