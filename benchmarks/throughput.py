"""Training speed of a model of a named size on a file of pairs; prints one JSON line.

    python benchmarks/throughput.py --size=M --data=hh.jsonl.gz --tokenizer=DIR --batch_size=8 --max_length=512 \
        --packing=true --dtype=fp32 --steps=20

Weights are random. Row shapes are those of a whole epoch, of which the first steps are timed; their batches are packed
before the clock starts, so that the step alone is timed.
"""

import itertools
import json
import resource
import statistics
import time

import jax
from absl import flags

from easyrm import sharding
from easyrm.chips import PEAK_BF16_FLOPS, training_flops
from easyrm.config import ModelConfig, RunConfig
from easyrm.data.config import DataConfig
from easyrm.data.tokenizer import load_tokenizer
from easyrm.flags import run_command
from easyrm.models.config import SIZES, LlamaConfig
from easyrm.training.inputs import Inputs
from easyrm.training.program import Program
from easyrm.training.progress import START

# hidden/intermediate/layers/heads/kv; the vocabulary is the tokenizer's.
SHAPES = {"S": (128, 384, 2, 4, 2), "M": (256, 688, 4, 8, 4), "L": (512, 1376, 8, 8, 4), "1B": (2048, 8192, 16, 32, 8)}

_SIZE = flags.DEFINE_enum("size", "M", [*SHAPES, *SIZES], "S, M, L, 1B, or a named size of easyrm/models/config.py")
_DATA = flags.DEFINE_string("data", None, "pairs", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "a tokenizer directory or tokenizer.model", required=True)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "pairs a step")
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 1, "of a step")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "tokens a conversation")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 0, "tokens a row; 0: chosen")
_PACKING = flags.DEFINE_bool("packing", True, "pack rows and share prompts")
_DTYPE = flags.DEFINE_enum("dtype", "fp32", ["fp32", "bf16"], "of the matmuls")
_REMAT = flags.DEFINE_string("remat", "none", "rematerialisation policy")
_ATTENTION = flags.DEFINE_string("attention", "auto", "attention implementation")
_MESH_DIM = flags.DEFINE_string("mesh_dim", "1,-1,1", "dp,fsdp,mp")
_STEPS = flags.DEFINE_integer("steps", 20, "timed steps, after two that are not")


def main() -> None:
    """Time the real training step on the real input path."""
    tokenizer = load_tokenizer(_TOKENIZER.value)
    llama = SIZES.get(_SIZE.value) or LlamaConfig(tokenizer.vocab_size, *SHAPES[_SIZE.value])
    config = RunConfig(
        dtype=_DTYPE.value,
        model=ModelConfig(config="debug", remat=_REMAT.value, attention=_ATTENTION.value),
        data=DataConfig(
            train=_DATA.value,
            max_length=_MAX_LENGTH.value,
            batch_size=_BATCH_SIZE.value,
            micro_batches=_MICRO_BATCHES.value,
            row_length=_ROW_LENGTH.value,
            packing=_PACKING.value,
        ),
    )
    mesh = sharding.make_mesh(_MESH_DIM.value)
    quiet = lambda line: None  # noqa: E731
    inputs = Inputs(config, tokenizer, llama, row_groups=sharding.row_groups(mesh), say=quiet)
    program = Program(config, llama, mesh, inputs.steps)
    began = time.perf_counter()
    program.compile(inputs.train, quiet)
    compile_s = time.perf_counter() - began
    state, seconds, computed, lengths = program.random_state(), [], 0, []
    batches = itertools.islice(inputs.train(inputs.order(START)), _STEPS.value + 2)
    for step, (indices, batch) in enumerate(list(batches)):
        began = time.perf_counter()
        state, metrics = program.train_step(state, batch)
        loss = float(metrics["loss"])
        if step >= 2:
            seconds.append(time.perf_counter() - began)
            computed += batch.tokens.size
            lengths.append(inputs.train.store.lengths(indices).sum(axis=0))
    chosen, prompt, rejected = (int(sum(column)) for column in zip(*lengths, strict=True))
    pairs, unique = len(seconds) * _BATCH_SIZE.value, chosen + prompt + rejected
    line = {
        "size": _SIZE.value,
        "packing": _PACKING.value,
        "dtype": _DTYPE.value,
        "batch_size": _BATCH_SIZE.value,
        "row_shapes": [list(shape) for shape in inputs.train.shapes],
        "pairs_per_s": pairs / sum(seconds),
        "median_step_s": statistics.median(seconds),
        "tokens_per_s": (unique + prompt) / sum(seconds),
        "tokens_computed": computed / pairs,
        "tokens_unique": unique / pairs,
        "compile_s": compile_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": loss,
        "device": jax.devices()[0].device_kind,
    }
    if peak := PEAK_BF16_FLOPS.get(line["device"]):
        # Attention's share is left out: on short conversations it is a few percent.
        line["mfu"] = training_flops(llama, unique, 0) / sum(seconds) / (peak * jax.device_count())
    print(json.dumps(line))


if __name__ == "__main__":
    run_command(main)
