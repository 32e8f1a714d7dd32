"""What a run reads: its pairs, checked against the model and the loss, their order and their rows."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from easyrm.config import RunConfig
from easyrm.data.batches import Batches
from easyrm.data.store import PairStore, build_store
from easyrm.data.stream import PairStream
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError
from easyrm.models.config import LlamaConfig

MAX_SHAPES, STEPS_A_SHAPE = 4, 250


class Inputs:
    """The tokenized pairs of a run and the batches they make.

    `train` and `eval` (None without --data.eval) are Batches, `steps` the optimizer updates of the whole run. Pairs are
    tokenized once, before anything is compiled, so that counts, steps and row shapes are known.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        llama: LlamaConfig,
        *,
        row_groups: int,
        say: Callable[[str], None],
    ):
        """Raises InputError for unusable data, token ids that the model lacks, and too few pairs for one step."""
        self._batch_size = config.data.batch_size
        layout = {"row_groups": row_groups, "pad_id": tokenizer.pad_id}
        pairs = _read(config.data.train, "--data.train", config, tokenizer, llama, say)
        self.steps = _count_steps(config, len(pairs), say)
        self._stream = PairStream(len(pairs), self._batch_size, config.seed, config.data.shuffle)
        # One more shape must save more computing, over the run, than its compilation takes.
        max_shapes = min(MAX_SHAPES, 1 + self.steps // STEPS_A_SHAPE)
        self.train = Batches(pairs, config.data, self.order(0), max_shapes=max_shapes, **layout)
        self.eval = None
        if config.data.eval:
            pairs = _read(config.data.eval, "--data.eval", config, tokenizer, llama, say)
            self.eval = Batches(pairs, config.data, self._in_order(pairs), **layout)

    def order(self, position: int) -> Iterator[np.ndarray]:
        """Pair indices of each batch from `position`, in pairs consumed, to the end of the run."""
        return self._stream.batches(position, self.steps - position // self._batch_size)

    def eval_order(self) -> Iterator[np.ndarray]:
        """Pair indices of each evaluation batch; the last may be short."""
        return self._in_order(self.eval.store)

    def _in_order(self, pairs: PairStore) -> Iterator[np.ndarray]:
        return (np.arange(at, min(at + self._batch_size, len(pairs))) for at in range(0, len(pairs), self._batch_size))


def _read(spec: str, flag: str, config: RunConfig, tokenizer: Tokenizer, llama: LlamaConfig, say) -> PairStore:
    pairs = build_store(spec, tokenizer, config.data, log=say)
    largest, longest = max(pairs.max_token_id, tokenizer.pad_id), pairs.report["longest"]
    if largest >= llama.vocab_size:
        raise InputError(
            f"{flag}={spec}: token id {largest} is beyond the model's vocab_size={llama.vocab_size}; "
            "give the tokenizer that the model was made with, or a larger model vocabulary"
        )
    if longest > llama.max_position_embeddings:
        say(f"note: conversations of up to {longest} tokens, max_position_embeddings={llama.max_position_embeddings}")
    without = pairs.report["without_margin"]
    if config.loss.needs_margin and without == len(pairs):
        raise InputError(f"{flag}={spec}: --loss uses margins and no pair has one; add margins or change --loss")
    if config.loss.type == "scaled_bradley_terry" and without:
        raise InputError(f"{flag}={spec}: {without} pairs lack the margin that weighs them; add it or change --loss")
    if config.loss.needs_margin and without:
        say(f"note: {without} of {len(pairs)} pairs have no margin and get 0")
    return pairs


def _count_steps(config: RunConfig, pairs: int, say: Callable[[str], None]) -> int:
    batch_size = config.data.batch_size
    steps = config.total_steps or math.floor(config.num_epochs * pairs / batch_size)
    if steps == 0:
        raise InputError(
            f"--num_epochs={config.num_epochs} of {pairs} pairs is less than one batch of "
            f"--data.batch_size={batch_size}; use a smaller batch or more data"
        )
    used = steps * batch_size
    left = "" if config.total_steps else f", {math.floor(config.num_epochs * pairs) - used} left over at the end"
    say(f"{steps} steps of {batch_size} pairs: {used} pairs, {used / pairs:.2f} epochs{left}")
    return steps
