"""Rewards of pairs, conversations and candidates: `python -m easyrm.score --model=... --input=... --output=...`."""

import hashlib
import json
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

import jax
import numpy as np
from absl import flags
from etils import epath

from easyrm import run
from easyrm.data import sources
from easyrm.data.readers import Record
from easyrm.data.stream import prefetch
from easyrm.distributed import say, start_distributed
from easyrm.errors import InputError, writing
from easyrm.file_digests import NAME as DIGESTS
from easyrm.files import absolute
from easyrm.flags import run_command
from easyrm.scoring.parts import Parts
from easyrm.scoring.requests import Encoded, answer, encode_requests, parse_request
from easyrm.scoring.scorer import BATCH_TOKENS, Scorer, find_model
from easyrm.scoring.statistics import Statistics, save_statistics

_MODEL = flags.DEFINE_string("model", "", "a Hugging Face directory or hub name, or RUN_DIR[/checkpoints/STEP]")
_INPUT = flags.DEFINE_string("input", "", "pairs (chosen, rejected), conversations (messages), or prompt and responses")
_OUTPUT = flags.DEFINE_string("output", "", "JSON Lines to write, one line for each line of the input, in order")
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "fp32"], "of the matmuls")
_MESH_DIM = flags.DEFINE_string("mesh_dim", "1,-1,1", "dp,fsdp,mp, as in train_rm")
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "true", "false"], "as in train_rm")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", BATCH_TOKENS, "tokens computed at once", lower_bound=128)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 0, "tokens a conversation; 0: as the model was trained", lower_bound=0)
_NORMALIZE = flags.DEFINE_bool("normalize", False, "(reward - reward_mean) / reward_std, as the export's config says")
_SAVE_STATISTICS = flags.DEFINE_bool(
    "save_statistics", False, "keep mean and deviation of these rewards in the config.json of the export"
)

_LINES, _CHARACTERS = 2048, 2**25  # of a part: sorted into rows together, and not computed again after a stop
_SAY_SECONDS = 10.0


def score() -> None:
    """Write one line a line, with the `id` of the input where it has one.

    {"chosen", "rejected"} for a pair, {"reward"} for a conversation (`messages`), {"rewards"} for a `prompt` with
    `responses`; a line that cannot be scored becomes {"error": reason}, and is counted. Stopped at any time, the same
    command goes on after the last part that it wrote. Raises InputError for what is not there, before anything is
    compiled.
    """
    for flag in (_MODEL, _INPUT, _OUTPUT):
        if not flag.value:
            raise InputError(f"--{flag.name} is empty; --model, --input and --output are all needed")
    export = epath.Path(_MODEL.value)
    if _SAVE_STATISTICS.value:
        exported = (export / "config.json").exists() and not run.is_run(run.split_checkpoint(_MODEL.value)[0])
        if _NORMALIZE.value or not exported:
            raise InputError("--save_statistics needs the directory of an export as --model, and no --normalize")
    start_distributed(_DISTRIBUTED.value)
    files = sources.resolve(_INPUT.value, say)
    if absolute(_OUTPUT.value) in [absolute(path) for path in files]:
        raise InputError(f"--output={_OUTPUT.value} is the input itself; name another file")
    scorer = find_model(_MODEL.value).open(
        mesh_dim=_MESH_DIM.value,
        dtype=_DTYPE.value,
        batch_tokens=_BATCH_TOKENS.value,
        max_length=_MAX_LENGTH.value,
        normalize=_NORMALIZE.value,
    )
    settings = {
        "model": " ".join([_MODEL.value, *_version(export, scorer.step)]),
        "input": ", ".join(f"{path} ({_size(path)})" for path in files),
        "dtype": _DTYPE.value,
        "max_length": scorer.max_length,
        "batch_tokens": _BATCH_TOKENS.value,
        "normalize": _NORMALIZE.value,
    }
    parts = Parts(epath.Path(_OUTPUT.value), settings)
    if parts.count:
        say(f"going on after {parts.count} lines that are scored already")
    counts = write_scores(islice(sources.read(_INPUT.value, say), parts.count, None), scorer, parts)
    parts.finish()
    kinds = [f"{n} {what}" for what, n in counts.items()]
    say(f"wrote {parts.count} lines to {_OUTPUT.value}, now " + ", ".join(kinds or ["none"]))
    say(", ".join(f"{name} {scorer.counts[name]}" for name in ("tokens_computed", "tokens_unique", "distinct")))
    if _SAVE_STATISTICS.value and jax.process_index() == 0:
        found = statistics_of(epath.Path(_OUTPUT.value))
        with writing(f"--model={export}"):
            save_statistics(export, found, _INPUT.value)
        say(f"kept reward_mean {found.mean:.6g} and reward_std {found.std:.6g} in {export / 'config.json'}")


def write_scores(records: Iterable[Record], scorer: Scorer, parts: Parts) -> Counter:
    """Score the records part by part, saying how fast; returns how many lines there were of each kind."""
    counts, began, said = Counter(), time.monotonic(), 0.0

    def encoded() -> Iterator[Encoded]:
        for some in portions(records):
            yield encode_requests(map(parse_request, some), scorer.tokenizer, scorer.max_length)

    for requests, conversations in prefetch(encoded(), 1):
        rewards = iter(scorer.score(conversations))
        answers = [answer(request, rewards) for request in requests]
        parts.write(line for _, line in answers)
        counts.update(kind for kind, _ in answers)
        seconds = time.monotonic() - began
        if seconds - said > _SAY_SECONDS:
            said = seconds
            rates = {"lines": counts.total(), **{name: scorer.counts[name] for name in ("distinct", "tokens_unique")}}
            per_second = (f"{total / seconds:.4g} {name}/s" for name, total in rates.items())
            say(f"{parts.count} lines, {', '.join(per_second)}")
    return counts


def portions(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records, some at a time: the same some, wherever among their beginnings one starts."""
    some, characters = [], 0
    for record in records:
        some.append(record)
        characters += len(str(record.value))
        if len(some) == _LINES or characters > _CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


def statistics_of(scores: epath.Path) -> Statistics:
    """Mean and deviation of all rewards in a file that `score` wrote."""
    rewards = array("d")
    with scores.open() as file:
        for line in file:
            values = json.loads(line)
            rewards.extend(values[name] for name in ("chosen", "rejected", "reward") if name in values)
            rewards.extend(values.get("rewards", ()))
    if not rewards:
        raise InputError(f"{scores}: no line could be scored, and no rewards have no mean; give another --input")
    return Statistics(float(np.mean(rewards)), float(np.std(rewards)))


def _version(model: epath.Path, step: int | None) -> list[str]:
    """What tells two models of one name apart: the step of a run, the digests of an export."""
    if step is not None:
        return [str(step)]
    if str(model).startswith("hf://"):  # a look at it would be one at the hub
        return []
    digests = model / DIGESTS
    return [hashlib.sha256(digests.read_bytes()).hexdigest()[:12]] if digests.exists() else []


def _size(path: str) -> str:
    return "hub" if path.startswith("hf://") else f"{epath.Path(path).stat().length} bytes"


if __name__ == "__main__":
    run_command(score)
