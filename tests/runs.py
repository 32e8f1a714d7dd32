"""Small data, tokenizers, models and runs that tests make for themselves."""

import contextlib
import dataclasses
import gzip
import json
import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from easyrm.config import RunConfig
from easyrm.models.config import LlamaConfig
from easyrm.train_rm import train

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite", "lion", "mole", "newt", "owl"]
TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}


def sentence(rng: random.Random, least: int = 1, most: int = 12) -> str:
    """Some words."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def make_pairs(n: int, seed: int = 0, **extra) -> list[dict]:
    """Pairs with one to three turns; a good answer repeats the last word of the question."""
    rng, pairs = random.Random(seed), []
    for i in range(n):
        prompt = []
        for _ in range(rng.randint(0, 2)):
            prompt += [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]
        question = sentence(rng)
        prompt.append({"role": "user", "content": question})
        good, bad = f"{sentence(rng)} {question.split()[-1]}", f"{sentence(rng)} {rng.choice(WORDS)} no"
        sides = {
            side: [*prompt, {"role": "assistant", "content": text}]
            for side, text in (("chosen", good), ("rejected", bad))
        }
        pairs.append({**sides, "id": f"pair-{i}", **{name: value(i) for name, value in extra.items()}})
    return pairs


def write_lines(path: Path, lines: list) -> Path:
    """JSON Lines, compressed where the name says so."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make_tokenizer(path: Path, vocab_size: int = 320) -> Path:
    """A sentencepiece BPE tokenizer.model with byte fallback, as Llama 2's."""
    corpus = [message["content"] for pair in make_pairs(400, seed=99) for message in pair["chosen"]]
    corpus += ["<|user|> <|assistant|> <|system|> " * 3, "Ärger & co: déjà vu? 12 + 30 = 42"] * 5
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def make_world(folder: Path, pairs: int = 48) -> dict[str, str]:
    """Flags for a run on data, tokenizer and model shape that are written into `folder`."""
    write_lines(folder / "pairs.jsonl", make_pairs(pairs))
    make_tokenizer(folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps(TINY_MODEL))
    return {
        "data.train": str(folder / "pairs.jsonl"),
        "tokenizer": str(folder / "tokenizer.model"),
        "model.config": str(folder / "config.json"),
        "data.batch_size": 4,
        "data.max_length": 320,
        "optimizer.lr": 1e-3,
        "optimizer.b2": 0.95,
        "dtype": "fp32",
        "mesh_dim": "1,1,1",
    }


def run_config(settings: dict) -> RunConfig:
    """A RunConfig from dotted names."""
    config = RunConfig()
    for name, value in settings.items():
        *group, field = name.split(".")
        holder = getattr(config, group[0]) if group else config
        assert field in {known.name for known in dataclasses.fields(holder)}, name
        setattr(holder, field, value)
    return config


def run(settings: dict) -> list[dict]:
    """Train in this process; the lines of metrics.jsonl."""
    train(run_config(settings))
    return lines_of(settings["output_dir"])


def lines_of(output_dir) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def command(module: str, settings: dict, *more: str) -> list[str]:
    """The command line of `python -m easyrm.<module>`."""
    return [sys.executable, "-m", f"easyrm.{module}", *(f"--{name}={value}" for name, value in settings.items()), *more]


def call(module: str, settings: dict, *more: str, devices: int = 1, **environment) -> subprocess.CompletedProcess:
    """Run a command as a user would, in a process of its own."""
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **environment}
    return subprocess.run(
        command(module, settings, *more), capture_output=True, text=True, env=env, timeout=600, check=False
    )


def start(processes: int, settings: dict, module: str = "train_rm", *, devices: int = 4) -> list[subprocess.Popen]:
    """A command as several processes of some devices each, stdout and stderr together."""
    return start_programs(processes, command(module, settings), devices=devices)


def start_programs(processes: int, arguments: list[str], *, devices: int = 4) -> list[subprocess.Popen]:
    """A program as several processes that JAX is told of, as `start`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    coordination = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, **coordination, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(processes)
    ]


def start_two(settings: dict, module: str = "train_rm") -> list[subprocess.Popen]:
    """A command as two processes of four devices."""
    return start(2, settings, module)


def outputs_of(processes: list[subprocess.Popen], seconds: float = 300) -> list[str]:
    """What each process printed until it ended; none outlives this."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes; for this process, a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_llama() -> LlamaConfig:
    """The shape of TINY_MODEL."""
    skip = ("architectures", "model_type")
    return LlamaConfig(**{name: value for name, value in TINY_MODEL.items() if name not in skip})
