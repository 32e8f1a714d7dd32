"""rewardbench itself on an export, unchanged, and easyrm.score: prints one JSON line of how far their rewards differ.

rewardbench 0.1.4 needs older packages than easyrm, and so an environment of its own:

    python3.11 -m venv rb
    rb/bin/pip install torch==2.13.0
    rb/bin/pip install --no-deps rewardbench==0.1.4
    rb/bin/pip install transformers==4.51.0 trl==0.17.0 "setuptools<81" datasets fschat bitsandbytes accelerate \\
        pandas sentencepiece tiktoken tabulate wandb
    python benchmarks/rewardbench_parity.py --rewardbench_python=rb/bin/python --model=RUN_DIR/export --data=pairs.jsonl

Keys: pairs, left_out (whose form rewardbench would change, and those that easyrm.score cannot score),
largest_difference (of a reward), accuracy of both (a tie is wrong), verdicts_differing, newly_initialized (whether
transformers lacked a weight). Exits with 1 where a reward differs by more than --tolerance or a weight was lacking.
Small models agree within 1e-4; the rewards of both are float32. On two CPU cores, 900 pairs take rewardbench minutes.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SIDES = ("chosen", "rejected")
# rewardbench sends its batches to "cuda", whatever there is.
ON_ANY_DEVICE = """
import torch
from transformers import BatchEncoding

def anywhere(to):
    def replaced(self, *args, **kwargs):
        return to(self, *("cpu" if str(arg).startswith("cuda") else arg for arg in args), **kwargs)
    return replaced

if not torch.cuda.is_available():
    for owner in (torch.Tensor, torch.nn.Module, BatchEncoding):
        owner.to = anywhere(owner.to)

from rewardbench.rewardbench import main
main()
"""


def comparable(pair: dict) -> bool:
    """rewardbench takes the prompt of the chosen side for both, and gives out the roles in turn."""
    prompts = [pair[side][:-1] for side in SIDES]
    roles = [message["role"] for message in pair["chosen"]]
    return prompts[0] == prompts[1] and len(roles) % 2 == 0 and roles == ["user", "assistant"] * (len(roles) // 2)


def read_pairs(path: str) -> list[dict]:
    """The two sides of each pair, alone."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt") as file:
        return [{side: pair[side] for side in SIDES} for pair in map(json.loads, file)]


def rewards_of(path: Path, names: list[str]) -> np.ndarray:
    """[pairs, 2] of a file of JSON Lines; nan where a line has no rewards."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return np.array([[line.get(name, np.nan) for name in names] for line in lines], float)


def call(command: list, cwd: Path | None = None, **env: str) -> str:
    """What the command prints. Raises SystemExit with the end of it where it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\n{command[0]} ended with status {done.returncode}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewardbench_python", required=True, help="the Python of an environment with rewardbench")
    parser.add_argument("--model", required=True, help="the directory of an export")
    parser.add_argument("--data", required=True, help="pairs of conversations, JSON Lines")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens that easyrm.score takes")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    given = read_pairs(args.data)
    pairs = [pair for pair in given if comparable(pair)]
    if not pairs:
        raise SystemExit(f"{args.data}: none of {len(given)} pairs has one prompt and turns of user and assistant")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "rm").symlink_to(Path(args.model).resolve())  # outputs are named by the path of the model
        score = [sys.executable, "-m", "easyrm.score", f"--model={folder / 'rm'}", "--dtype=fp32"]
        score += [f"--input={folder / 'pairs.jsonl'}", f"--output={folder / 'ours.jsonl'}"]
        call([*score, f"--max_length={args.max_length}"])
        flags = ["--model=rm", "--dataset=pairs.jsonl", "--load_json", "--not_quantized", "--torch_dtype=float32"]
        flags += ["--batch_size=8", "--max_length=2048", "--output_dir=out/"]
        python = Path(args.rewardbench_python).absolute()
        log = call([python, "-c", ON_ANY_DEVICE, *flags], cwd=folder, HF_HUB_OFFLINE="1", PYTHONPATH="")
        ours = rewards_of(folder / "ours.jsonl", list(SIDES))
        theirs = rewards_of(folder / "out" / "rm_outputs.jsonl", [f"scores_{side}" for side in SIDES])
    scored = ~np.isnan(ours).any(axis=1)
    ours, theirs = ours[scored], theirs[scored]
    right = [rewards[:, 0] > rewards[:, 1] for rewards in (ours, theirs)]
    result = {
        "pairs": len(ours),
        "left_out": len(given) - len(ours),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "accuracy_easyrm": float(right[0].mean()),
        "accuracy_rewardbench": float(right[1].mean()),
        "verdicts_differing": int((right[0] != right[1]).sum()),
        "newly_initialized": "newly initialized" in log,
    }
    print(json.dumps(result))
    if not result["largest_difference"] <= args.tolerance or result["newly_initialized"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
