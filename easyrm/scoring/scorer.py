"""One model that gives rewards: opened from an export, a hub name or a checkpoint."""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from easyrm import run, sharding
from easyrm.data.conversations import Conversation, check_vocabulary
from easyrm.data.packing import RowBatch
from easyrm.data.sharing import fill_rows, share
from easyrm.data.stream import prefetch
from easyrm.data.tokenizer import Tokenizer, load_tokenizer
from easyrm.errors import InputError
from easyrm.hf.config import is_classifier
from easyrm.hf.source import ModelSource
from easyrm.models.config import LlamaConfig
from easyrm.models.reward import RewardModel
from easyrm.scoring.statistics import Statistics, read_statistics
from easyrm.training.program import abstract_model, jit_rewards, make_forward
from easyrm.training.saved_step import restore_model

_PREFETCH = 2  # batches packed before the devices ask for them
BATCH_TOKENS = 32768


@dataclasses.dataclass
class Scorer:
    """Rewards of conversations of at most `max_length` tokens, about `batch_tokens` of them on the devices at once.

    `rewards_of` gives those of both sides of a batch's slots, float32[1, S] each. `step` is that of a checkpoint, None
    for an export. `counts`, which grow: `conversations` asked for, `distinct` ones computed, their real tokens as laid
    out (`tokens_unique`: a prompt once for each two of its responses) and those computed, padding included
    (`tokens_computed`).
    """

    name: str
    rewards_of: Callable[[RowBatch], tuple[jax.Array, jax.Array]]
    tokenizer: Tokenizer
    vocab_size: int
    max_length: int
    row_groups: int
    batch_tokens: int = BATCH_TOKENS
    step: int | None = None
    normalization: Statistics | None = None
    counts: Counter = dataclasses.field(default_factory=Counter)

    def score(
        self, conversations: Sequence[Conversation], stop: Callable[[], bool] = lambda: False
    ) -> list[float] | None:
        """The reward of each, in order. Blocks; None where `stop`, asked before each batch, ended it.

        Raises InputError for token ids that the model lacks.
        """
        if not conversations:
            return []
        check_vocabulary(conversations, self.vocab_size)
        segments, at = share(conversations)
        rewards = np.empty((len(segments), 2), np.float32)
        under_way: deque = deque()

        def fetch() -> None:
            indices, sides = under_way.popleft()
            for side, values in enumerate(jax.device_get(sides)):
                rewards[indices, side] = values[0, : len(indices)]

        batches = prefetch(
            fill_rows(
                segments,
                batch_tokens=self.batch_tokens,
                row_groups=self.row_groups,
                pad_id=self.tokenizer.pad_id,
            ),
            _PREFETCH,
        )
        try:
            for indices, batch in batches:
                if stop():
                    return None
                self.counts["tokens_computed"] += batch.tokens.size
                under_way.append((indices, self.rewards_of(batch)))
                if len(under_way) > 1:
                    fetch()
        finally:
            batches.close()
        fetch()
        self.counts["conversations"] += len(conversations)
        self.counts["distinct"] += len(np.unique(at))
        self.counts["tokens_unique"] += sum(len(s.chosen) + len(s.rejected) - s.prompt_length for s in segments)
        values = rewards.reshape(-1)[at].astype(np.float64)
        if self.normalization is not None:
            values = (values - self.normalization.mean) / self.normalization.std
        return values.tolist()


@dataclasses.dataclass
class FoundModel:
    """A reward model whose weights are not read yet; `max_length` is what it was trained with, or can take."""

    name: str
    llama: LlamaConfig
    tokenizer: Tokenizer
    max_length: int
    raw: dict[str, Any]
    load: Callable[[RewardModel], tuple[RewardModel, int | None]]  # of abstract parameters: parameters, step

    def open(
        self,
        *,
        mesh_dim: str,
        dtype: str,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int = 0,
        normalize: bool = False,
    ) -> Scorer:
        """Read the weights onto a mesh of this form. `max_length` 0: the model's own.

        `normalize`: by the reward_mean and reward_std of its config.json, InputError where they are missing.
        """
        statistics = read_statistics(self.raw, self.name) if normalize else None
        mesh = sharding.make_mesh(mesh_dim)
        model, step = self.load(abstract_model(self.llama, mesh))
        rewards_of = jit_rewards(make_forward(mesh, self.llama, dtype=dtype), mesh)
        return Scorer(
            name=self.name,
            rewards_of=lambda batch: rewards_of(model, sharding.place_batch(mesh, batch)),
            tokenizer=self.tokenizer,
            vocab_size=self.llama.vocab_size,
            max_length=max_length or self.max_length,
            row_groups=sharding.row_groups(mesh),
            batch_tokens=batch_tokens,
            step=step,
            normalization=statistics,
        )


def find_model(name: str) -> FoundModel:
    """A Hugging Face reward model (directory, hub name, gs://...), or the one of RUN_DIR[/checkpoints/STEP].

    Raises InputError where there is no such model, or it has no score head.
    """
    directory, step = run.split_checkpoint(name)
    if run.is_run(directory):
        record = run.read_record(directory)
        return FoundModel(
            name,
            LlamaConfig(**record["model"]),
            run.load_run_tokenizer(directory, record),
            record["config"]["data"]["max_length"],
            {},
            lambda abstract: restore_model(directory / "checkpoints", step, abstract),
        )
    source = ModelSource(name, "")
    if not is_classifier(source.raw):
        raise InputError(f"--model={name}: a causal model without a score head; give a reward model or train one")
    return FoundModel(
        name,
        source.config,
        load_tokenizer(name),
        source.config.max_position_embeddings,
        source.raw,
        lambda abstract: (source.load(abstract, score_std=0.0, seed=0), None),
    )


def open_scorer(model: str, **settings) -> Scorer:
    """`find_model(model).open(**settings)`."""
    return find_model(model).open(**settings)
