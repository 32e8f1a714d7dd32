"""How fast pairs are read, tokenized and packed; prints one JSON line of pairs per second.

    python benchmarks/input_pipeline.py --data=pairs.jsonl.gz --tokenizer=DIR --batch_size=64 --row_length=4096

`store` reads, checks and tokenizes the data (once a run), `packing` plans the shapes and packs one epoch from the store
(ahead of every step), `together` is one after the other. Flags are those of benchmarks/packing.py.
"""

import json
import sys
import time

from packing import arguments, open_store, packed_batches

from easyrm.errors import InputError


def main() -> None:
    flags = arguments()
    start = time.perf_counter()
    tokenizer, store = open_store(flags)
    stored = time.perf_counter()
    packed = sum(int(batch.weight.sum()) for _, batch in packed_batches(flags, store, tokenizer.pad_id))
    done = time.perf_counter()
    rates = {
        "store_pairs_per_s": len(store) / (stored - start),
        "packing_pairs_per_s": packed / (done - stored),
        "together_pairs_per_s": packed / (done - start),
    }
    print(json.dumps({"pairs": len(store), "tokens_unique": store.report["tokens_unique"], **rates}))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
