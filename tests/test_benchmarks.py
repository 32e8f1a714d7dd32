"""The benchmarks that outsiders call still print their one line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import make_pairs, make_tokenizer, write_lines

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "packing": (["--row_length=512"], {"tokens_computed", "tokens_unique", "tokens_padded", "pairs"}),
    "throughput": (
        ["--size=S", "--packing=true", "--dtype=fp32", "--steps=1"],
        {
            "pairs_per_s",
            "tokens_per_s",
            "tokens_computed",
            "tokens_unique",
            "compile_s",
            "peak_rss_mb",
            "loss",
        },
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs(tmp_path, name):
    flags, keys = COMMANDS[name]
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(40))
    tokenizer = make_tokenizer(tmp_path / "tokenizer.model")
    common = [f"--data={data}", f"--tokenizer={tokenizer}", "--batch_size=4", "--max_length=256"]
    result = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *common, *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert keys <= set(json.loads(result.stdout.splitlines()[-1]))
