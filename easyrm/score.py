"""Rewards of pairs or single conversations: `python -m easyrm.score --model=... --input=... --output=...`."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from absl import flags
from etils import epath

from easyrm import run, sharding
from easyrm.data.batches import Batches
from easyrm.data.config import DataConfig
from easyrm.data.outcomes import Outcome
from easyrm.data.store import build_store
from easyrm.data.stream import ahead
from easyrm.data.tokenizer import Tokenizer, load_tokenizer
from easyrm.errors import InputError
from easyrm.flags import run_command
from easyrm.hf.config import is_classifier
from easyrm.hf.source import ModelSource
from easyrm.models.config import LlamaConfig
from easyrm.models.reward import RewardModel
from easyrm.training.program import abstract_model, compiler_options, make_forward
from easyrm.training.saved_step import restore_model
from easyrm.training.step import make_reward_step

_MODEL = flags.DEFINE_string("model", "", "a Hugging Face directory or hub name, or RUN_DIR[/checkpoints/STEP]")
_INPUT = flags.DEFINE_string("input", "", "pairs (chosen, rejected) or conversations (messages), one a line")
_OUTPUT = flags.DEFINE_string("output", "", "JSON Lines to write, one line for each line of the input, in order")
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "fp32"], "of the matmuls")
_MESH_DIM = flags.DEFINE_string("mesh_dim", "1,-1,1", "dp,fsdp,mp, as in train_rm")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "lines computed at once", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 0, "tokens a conversation; 0: as the model was trained", lower_bound=0)

AHEAD = 4


def score() -> None:
    """Write one line a line: {"chosen", "rejected"} or {"reward"}, with the `id` of the input where it has one.

    A line that cannot be scored (malformed, empty, overlong ...) becomes {"error": reason}, and is counted at the end.
    Raises InputError for what is not there, before anything is compiled.
    """
    for name, value in (("model", _MODEL.value), ("input", _INPUT.value), ("output", _OUTPUT.value)):
        if not value:
            raise InputError(f"--{name} is empty; --model, --input and --output are all needed")
    mesh = sharding.make_mesh(_MESH_DIM.value)
    model, tokenizer, max_length = load_model(_MODEL.value, mesh)
    data = DataConfig(max_length=_MAX_LENGTH.value or max_length, batch_size=_BATCH_SIZE.value, max_bad_fraction=1.0)
    store = build_store(_INPUT.value, tokenizer, data, scoring=True)
    orders = [np.arange(at, min(at + data.batch_size, len(store))) for at in range(0, len(store), data.batch_size)]
    batches = Batches(store, data, orders, row_groups=sharding.row_groups(mesh), pad_id=tokenizer.pad_id)
    forward = make_forward(mesh, model.model.config, dtype=_DTYPE.value)
    rewards_of = jax.jit(make_reward_step(forward), compiler_options=compiler_options(mesh))

    def rewards() -> Iterator[tuple[float, float]]:
        for _, batch in ahead(batches(orders), AHEAD):
            sides = jax.device_get(rewards_of(model, sharding.place_batch(mesh, batch)))
            yield from zip(*(side[batch.weight > 0].tolist() for side in sides), strict=True)

    counts = write_scores(store.outcomes, rewards(), epath.Path(_OUTPUT.value))
    print(f"wrote {_OUTPUT.value}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))


def load_model(path: str, mesh: jax.sharding.Mesh) -> tuple[RewardModel, Tokenizer, int]:
    """(parameters, tokenizer, max_length) of a Hugging Face reward model or of a run's checkpoint.

    Raises InputError where there is neither, or where the model has no score head.
    """
    directory, step = run.split_checkpoint(path)
    if run.is_run(directory):
        record = run.read_record(directory)
        abstract = abstract_model(LlamaConfig(**record["model"]), mesh)
        model, _ = restore_model(directory / "checkpoints", step, abstract)
        return model, run.load_run_tokenizer(directory, record), record["config"]["data"]["max_length"]
    source = ModelSource(path, "")
    if not is_classifier(source.raw):
        raise InputError(f"--model={path}: a causal model without a score head; give a reward model or train one")
    model = source.load(abstract_model(source.config, mesh), score_std=0.0, seed=0)
    tokenizer = load_tokenizer(path)
    return model, tokenizer, source.config.max_position_embeddings


def write_scores(
    outcomes: Iterable[Outcome], rewards: Iterator[tuple[float, float]], output: epath.Path
) -> dict[str, int]:
    """One line out for each record; `rewards` are those of the records without an error. Returns counts by kind."""
    counts = Counter()
    with output.open("w") as file:
        for outcome in outcomes:
            if outcome.error is not None:
                kind, values = "errors", {"error": outcome.error}
            else:
                chosen, rejected = next(rewards)
                kind, values = "pairs", {"chosen": chosen, "rejected": rejected}
                if outcome.single:
                    kind, values = "conversations", {"reward": chosen}
            counts[kind] += 1
            line = json.dumps(values)
            file.write((line if outcome.id is None else f'{{"id": {outcome.id}, {line[1:]}') + "\n")
    return dict(counts)


if __name__ == "__main__":
    run_command(score)
