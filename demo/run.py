"""The whole way in one command: pairs, tokenizer, training from scratch, export, scores, a report and a table.

    python -m demo.run [--output=demo_run] [--hh=path/to/pairs.jsonl]

Each step is what a user would type. The run fails when held-out accuracy on the generated pairs is below 90 %.
"""

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from demo.pairs import generate, write_pairs

TRAIN_PAIRS, HELDOUT_PAIRS, SEED = 8000, 800, 0
FOLDERS = ("run/checkpoints/", "run/evaluations/", "run/report/")  # each one line of the table
MARK = ".easyrm-demo"  # in a folder that a demo made, and may therefore remove


@dataclass(frozen=True)
class Size:
    """What differs between generated pairs and a file of real ones; lengths in tokens, batch in pairs."""

    vocab: int
    width: int
    layers: int
    max_length: int
    row_length: int
    batch: int
    epochs: int
    lr: float
    log_freq: int
    eval_freq: int
    least_accuracy: float


GENERATED = Size(
    vocab=1000,
    width=64,
    layers=2,
    max_length=64,
    row_length=128,
    batch=32,
    epochs=6,
    lr=5e-3,
    log_freq=25,
    eval_freq=250,
    least_accuracy=0.9,
)
REAL = Size(
    vocab=4000,
    width=96,
    layers=2,
    max_length=512,
    row_length=0,
    batch=32,
    epochs=1,
    lr=1e-3,
    log_freq=1,
    eval_freq=25,
    least_accuracy=0.0,
)


def fresh_folder(path: Path) -> None:
    """Make `path` anew; removes what an earlier demo left there, and exits where anybody else's files are."""
    if path.exists() and not (path / MARK).is_file():
        sys.exit(f"--output={path} exists and is not a demo's folder; name another one")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / MARK).touch()


def write_data(output: Path, hh: Path | None) -> None:
    """Write train.jsonl and heldout.jsonl: generated pairs, or `hh` with its last tenth held out."""
    if hh is None:
        for name, pairs in zip(("train", "heldout"), generate(TRAIN_PAIRS, HELDOUT_PAIRS, SEED), strict=True):
            write_pairs(output / f"{name}.jsonl", pairs)
        return
    if not hh.is_file():
        sys.exit(f"--hh={hh}: no such file; give JSON Lines with `chosen` and `rejected` message lists (plain or .gz)")
    with (gzip.open if hh.suffix == ".gz" else open)(hh, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    cut = len(lines) - len(lines) // 10
    (output / "train.jsonl").write_text("".join(lines[:cut]), encoding="utf-8")
    (output / "heldout.jsonl").write_text("".join(lines[cut:]), encoding="utf-8")


def texts(path: Path) -> Iterator[str]:
    """The lines of all messages of a file of pairs. Exits where the file is not in easyrm's format.

    Single bad lines are passed over here: training counts and reports them.
    """
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        try:
            sides = [json.loads(line)[side] for side in ("chosen", "rejected")]
            contents = [message["content"] for side in sides if isinstance(side, list) for message in side]
        except (ValueError, KeyError, TypeError):
            continue
        if not all(isinstance(side, list) for side in sides):
            sys.exit(f"{path}:{number}: `chosen` and `rejected` must be lists of messages (role, content); convert it")
        for content in contents:
            yield from content.splitlines()


def train_tokenizer(output: Path, size: Size) -> int:
    """Train tokenizer.model on the training pairs; returns its vocabulary size.

    The role marks are pieces of their own. Bytes stand in for what has no piece, such as the template's newlines.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(output / "train.jsonl"),
        model_prefix=str(output / "tokenizer"),
        model_type="bpe",
        vocab_size=size.vocab,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["<|user|>", "<|assistant|>", "<|system|>"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer.model")).vocab_size()


def write_model_config(path: Path, size: Size, vocab_size: int) -> None:
    """A small Llama in Hugging Face's words. The wide initial weights shorten the first plateau of so short a run."""
    config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": size.width,
        "intermediate_size": 8 * size.width // 3,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": size.max_length,
        "initializer_range": 0.1,
    }
    path.write_text(json.dumps(config, indent=2) + "\n")


def command(module: str, *flags: str) -> float:
    """Run `python -m module flags`, saying so; returns seconds. Exits with the command's status where it fails."""
    print(f"\n$ python -m {module} " + " ".join(flags), flush=True)
    began = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", module, *flags], check=False).returncode
    if status:
        sys.exit(status)
    return time.perf_counter() - began


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(output: Path, size: Size, seconds: dict[str, float]) -> float:
    """Print what was reached; returns the held-out accuracy (a tie counts as wrong)."""
    scores = [score for score in read_lines(output / "scores.jsonl") if "error" not in score]
    if not scores:
        sys.exit(f"{output}/heldout.jsonl: no pair could be scored; give a longer file")
    accuracy = statistics.fmean(score["chosen"] > score["rejected"] for score in scores)
    steps = [line for line in read_lines(output / "run" / "metrics.jsonl") if "pairs_per_second" in line]
    pairs = sum(step["pairs"] for step in steps)
    computed = sum(step["tokens_computed"] for step in steps) / pairs
    padded = 2 * size.max_length
    rows = [
        ("held-out accuracy", f"{100 * accuracy:.1f} % of {len(scores)} pairs"),
        ("pairs/s", f"{statistics.median(step['pairs_per_second'] for step in steps):.0f}"),
        ("tokens a pair", f"{computed:.0f} computed, {padded} if padded ({padded / computed:.1f}x)"),
        *((f"seconds: {name}", f"{value:.0f}") for name, value in seconds.items()),
    ]
    rows += [(f"{output / name}", f"{size / 1024:.1f} KiB") for name, size in files_written(output).items()]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return accuracy


def files_written(output: Path) -> dict[str, int]:
    """Bytes by name; what lies in a folder of the run with many files is one entry."""
    sizes: dict[str, int] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file() and path.name != MARK):
        name = str(path.relative_to(output))
        name = next((folder for folder in FOLDERS if name.startswith(folder)), name)
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_run"), help="folder to write, made anew")
    parser.add_argument("--hh", type=Path, help="train on this file of pairs instead of generated ones")
    args = parser.parse_args()
    output, size = args.output, REAL if args.hh else GENERATED

    fresh_folder(output)
    write_data(output, args.hh)
    write_model_config(output / "model.json", size, train_tokenizer(output, size))
    training = command(
        "easyrm.train_rm",
        f"--data.train={output}/train.jsonl",
        f"--tokenizer={output}/tokenizer.model",
        f"--model.config={output}/model.json",
        "--model.remat=none",
        "--dtype=fp32",
        f"--data.max_length={size.max_length}",
        f"--data.row_length={size.row_length}",
        f"--data.batch_size={size.batch}",
        f"--num_epochs={size.epochs}",
        f"--optimizer.lr={size.lr}",
        "--optimizer.warmup_ratio=0.1",
        "--optimizer.b2=0.95",
        f"--log_freq={size.log_freq}",
        f"--data.eval={output}/heldout.jsonl",
        f"--eval_freq={size.eval_freq}",
        "--export=true",
        f"--output_dir={output}/run",
    )
    scoring = command(
        "easyrm.score",
        f"--model={output}/run/export",
        f"--input={output}/heldout.jsonl",
        f"--output={output}/scores.jsonl",
        "--dtype=fp32",
    )
    command("easyrm.report", f"{output}/run")
    accuracy = table(output, size, {"training": training, "scoring": scoring})
    if accuracy < size.least_accuracy:
        sys.exit(f"held-out accuracy {accuracy:.3f} is below {size.least_accuracy}")


if __name__ == "__main__":
    main()
