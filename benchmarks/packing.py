"""How many tokens packing computes, against the real ones and against padding; prints one JSON line.

    python benchmarks/packing.py --data=pairs.jsonl.gz --tokenizer=DIR --batch_size=64 --row_length=4096

Batches hold exactly batch_size pairs, in the shuffled order of the first epoch; pairs of an incomplete last batch are
left out and counted as pairs_left_over. tokens_padded is 2 * max_length a pair, as if every sequence had its own row.
"""

import argparse
import json
import sys

from easyrm.data.config import DataConfig
from easyrm.data.packing import pack
from easyrm.data.row_plan import choose_shape, plan_shapes
from easyrm.data.store import build_store
from easyrm.data.stream import PairStream
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--batch_size", type=int, default=64, help="pairs an optimizer step")
    parser.add_argument("--row_length", type=int, default=4096, help="tokens of the longest row; 0 to have it chosen")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of the longest conversation kept")
    parser.add_argument("--micro_batches", type=int, default=1)
    parser.add_argument("--row_groups", type=int, default=1, help="dp * fsdp of the mesh")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def open_store(flags: argparse.Namespace):
    """(tokenizer, token store) for the flags; log lines go to stderr. Raises InputError."""
    config = DataConfig(flags.data, "", flags.max_length, flags.batch_size, flags.micro_batches)
    config.row_length = flags.row_length
    config.validate()
    tokenizer = load_tokenizer(flags.tokenizer)
    store = build_store(flags.data, tokenizer, config, log=lambda line: print(line, file=sys.stderr))
    if len(store) < flags.batch_size:
        raise InputError(f"--data={flags.data} has {len(store)} pairs; use a --batch_size of at most that")
    return tokenizer, store


def packed_batches(flags: argparse.Namespace, store, pad_id: int):
    """Plans the shapes, then packs one epoch; yields (pair indices, RowBatch)."""
    stream = PairStream(len(store), flags.batch_size, flags.seed, shuffle=True)
    batches = list(stream.batches(0, len(store) // flags.batch_size))
    settings = {"batch_size": flags.batch_size, "row_groups": flags.row_groups}
    layout = {"micro_batches": flags.micro_batches, "packing": True}
    lengths = {"row_length": flags.row_length, "max_length": flags.max_length}
    shapes = plan_shapes(store, batches, **lengths, **settings, **layout)
    for indices in batches:
        shape = choose_shape(shapes, store.lengths(indices), **layout)
        yield indices, pack([store[i] for i in indices], shape, pad_id=pad_id, **settings, **layout)


def main() -> None:
    flags = arguments()
    tokenizer, store = open_store(flags)
    computed = unique = pairs = 0
    shapes = {}
    for indices, batch in packed_batches(flags, store, tokenizer.pad_id):
        computed, pairs = computed + batch.tokens.size, pairs + int(batch.weight.sum())
        unique += int(store.lengths(indices).sum())
        shape = f"{batch.tokens.shape[0] * batch.tokens.shape[1]}x{batch.tokens.shape[2]}"
        shapes[shape] = shapes.get(shape, 0) + 1
    padded = 2 * flags.max_length * pairs
    result = {"tokens_computed": computed, "tokens_unique": unique, "tokens_padded": padded, "pairs": pairs}
    result |= {"pairs_left_over": len(store) - pairs, "computed_over_unique": round(computed / unique, 4)}
    result |= {"padded_over_computed": round(padded / computed, 2), "batches_by_shape": shapes}
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
