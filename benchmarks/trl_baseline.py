"""TRL's RewardTrainer on the same pairs, tokenizer and model shape as throughput.py; prints one JSON line.

    pip install trl
    python benchmarks/trl_baseline.py --size=M --data=hh.jsonl.gz --tokenizer=DIR --batch_size=8 --max_length=512

The defaults are TRL's own, but for the sizes. --sorted groups pairs of like length, --no-checkpointing keeps
activations, --bf16 computes in bf16; together they were its fastest. Weights are random, or those of --model.
With --eval, the model is judged after the steps (--steps=0: one epoch), to compare quality with train_rm's.
"""

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from throughput import SHAPES
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer

from easyrm.data.tokenizer import load_tokenizer
from easyrm.hf.tokenizer import write_tokenizer


class Clock(TrainerCallback):
    """Seconds of each step, with the device idle at both ends."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self._began = time.perf_counter()

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def read_pairs(path: str) -> list[dict]:
    """The two sides of each pair."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt") as file:
        return [{side: pair[side] for side in ("chosen", "rejected")} for pair in map(json.loads, file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SHAPES), default="M")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after two that are not; 0: one epoch")
    parser.add_argument("--model", help="a Hugging Face reward model to start from")
    parser.add_argument("--eval", help="pairs to judge the trained model by")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--sorted", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--attention", default="sdpa", help="as transformers names it")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(load_tokenizer(args.tokenizer), folder, args.max_length)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = read_pairs(args.data)
    if args.sorted:
        pairs.sort(key=lambda pair: len(json.dumps(pair)))
        wanted = (args.steps + 2) * args.batch_size
        pairs = [pairs[i * len(pairs) // wanted] for i in range(wanted)]  # all lengths, as in an epoch
    hidden, intermediate, layers, heads, kv_heads = SHAPES[args.size]
    torch.manual_seed(0)
    random = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation=args.attention,
        )
    )
    model = LlamaForSequenceClassification.from_pretrained(args.model, dtype=torch.float32) if args.model else random
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=folder,
                per_device_train_batch_size=args.batch_size,
                max_length=args.max_length,
                max_steps=args.steps + 2 if args.steps else -1,
                num_train_epochs=1,
                learning_rate=args.lr,
                bf16=args.bf16,
                gradient_checkpointing=not args.no_checkpointing,
                train_sampling_strategy="sequential" if args.sorted else "random",
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=10**6,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=Dataset.from_list(read_pairs(args.eval)) if args.eval else None,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        judged = trainer.evaluate() if args.eval else {}
    seconds = clock.seconds[2:]
    print(
        json.dumps(
            {
                **{name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
                "pairs_per_s": len(seconds) * args.batch_size / sum(seconds),
                "steps": len(seconds),
                **{name: value for name, value in judged.items() if name in ("eval_loss", "eval_accuracy")},
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            }
        )
    )


if __name__ == "__main__":
    main()
