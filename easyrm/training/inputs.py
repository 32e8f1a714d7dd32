"""What a run reads: its pairs, checked against the model and the loss, their order and their rows."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from easyrm.config import RunConfig
from easyrm.data import sources
from easyrm.data.batches import Batches
from easyrm.data.store import PairStore, build_store
from easyrm.data.stream import PairStream
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError, Resumable
from easyrm.models.config import LlamaConfig
from easyrm.training.progress import START, Progress

MAX_SHAPES, STEPS_A_SHAPE = 4, 250


class Inputs:
    """The tokenized pairs of a run, or groups of ranked responses, and the batches they make.

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
        start: Progress = START,
    ):
        """The run goes on from `start`.

        Raises InputError for unusable data, token ids that the model lacks, and too few pairs for one step.
        """
        self._config, self._batch_size = config, config.data.batch_size
        layout = {"row_groups": row_groups, "pad_id": tokenizer.pad_id}
        if config.data.eval:
            sources.resolve(config.data.eval, say)  # a wrong name is told before all pairs are read
        pairs = _read(config.data.train, "--data.train", config, tokenizer, llama, say)
        self.steps = _count_steps(config, len(pairs), start)
        _say_steps(config, len(pairs), start.after(self.steps, self._batch_size), say)
        self._stream = PairStream(len(pairs), self._batch_size, config.seed, config.data.shuffle)
        # One more shape must save more computing, over the run, than its compilation takes.
        max_shapes = min(MAX_SHAPES, 1 + self.steps // STEPS_A_SHAPE)
        # A run that goes on has the shapes that it began with, unless its batches have come to begin elsewhere.
        self._began = START if start.position == start.step * self._batch_size else start
        orders = self._stream.batches(self._began.position, max(1, self.steps - self._began.step))
        self.train = Batches(pairs, config.data, orders, max_shapes=max_shapes, **layout)
        self.eval = None
        if config.data.eval:
            pairs = _read(config.data.eval, "--data.eval", config, tokenizer, llama, say)
            self.eval = Batches(pairs, config.data, self._in_order(pairs), **layout)

    def order(self, start: Progress) -> Iterator[np.ndarray]:
        """Pair indices of each batch from `start` to the end of the run.

        Raises Resumable where a run that goes on from there has another number of steps than this one was made for.
        """
        other_steps = _count_steps(self._config, self._stream.n, start) != self.steps
        if other_steps or start.position < self._began.position:  # rows were planned from there on
            raise Resumable(f"the run goes on from step {start.step} instead; run the same command again")
        return self._stream.batches(start.position, self.steps - start.step)

    def fingerprints(self) -> dict[str, str]:
        """What names the tokenized pairs of --data.train and --data.eval."""
        stores = {"train": self.train.store, "eval": self.eval.store if self.eval else None}
        return {f"data.{name}": store.fingerprint for name, store in stores.items() if store}

    def account(self, position: int) -> str:
        """Where every pair that was read went, `position` pairs into the stream: the parts add up to what was read."""
        report = self.train.store.report
        trained = min(position, report["kept"])
        parts = {"trained on": trained, **report["dropped"], "not reached": report["kept"] - trained}
        counts = " + ".join(f"{count} {part}" for part, count in parts.items() if count)
        return f"{report['read']} {_items(self._config)} read = {counts or 0}"

    def eval_order(self) -> Iterator[np.ndarray]:
        """Pair indices of each evaluation batch; the last may be short."""
        return self._in_order(self.eval.store)

    def _in_order(self, pairs: PairStore) -> Iterator[np.ndarray]:
        return (np.arange(at, min(at + self._batch_size, len(pairs))) for at in range(0, len(pairs), self._batch_size))


def _read(spec: str, flag: str, config: RunConfig, tokenizer: Tokenizer, llama: LlamaConfig, say) -> PairStore:
    pairs = build_store(spec, tokenizer, config.data, ranked=config.loss.ranked, log=say)
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
    without = pairs.report["without_probability"]
    if config.loss.soft_labels and without == len(pairs):
        raise InputError(
            f"{flag}={spec}: --loss.soft_labels uses probabilities and no pair has one; add them or change --loss"
        )
    if config.loss.soft_labels and without:
        say(f"note: {without} of {len(pairs)} pairs have no probability and get 1")
    return pairs


def _count_steps(config: RunConfig, pairs: int, start: Progress) -> int:
    left = (math.floor(config.num_epochs * pairs) - start.position) // config.data.batch_size
    return max(config.total_steps or start.step + left, start.step)


def _say_steps(config: RunConfig, pairs: int, end: Progress, say: Callable[[str], None]) -> None:
    items = _items(config)
    if end.step == 0:
        raise InputError(
            f"--num_epochs={config.num_epochs} of {pairs} {items} is less than one batch of "
            f"--data.batch_size={config.data.batch_size}; use a smaller batch or more data"
        )
    rest = math.floor(config.num_epochs * pairs) - end.position
    left = "" if config.total_steps else f", {rest} left over at the end"
    epochs = f"{end.position / pairs:.2f} epochs"
    say(f"{end.step} steps of {config.data.batch_size} {items}: {end.position} {items}, {epochs}{left}")


def _items(config: RunConfig) -> str:
    return "groups" if config.loss.ranked else "pairs"
