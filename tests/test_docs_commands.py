"""Every command in the README and the documents is run: by the real program, on small files, by the rules below."""

import configparser
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from documents import PAGES, ROOT, Block, Command, blocks, commands, name_of
from documents_world import make_folder, run_python


class Rule(NamedTuple):
    """How a Python program is run here: flags put behind the documented ones, and the function at which it may end."""

    flags: str = ""
    stop: str = ""
    statuses: tuple[int, ...] = (0,)


SMALL_BATCHES = "--batch_size=4 --row_length=512 --max_length=320"
PARSED = Rule(stop="argparse:ArgumentParser.parse_args")  # real flags of a program that runs long or needs TRL
RULES = {
    "-m easyrm.train_rm": Rule(
        "--data.batch_size=4 --data.micro_batches=1 --data.max_length=320 --total_steps=2 --mesh_dim=1,1,1"
    ),
    "-m easyrm.convert": Rule(),
    "-m easyrm.evaluate": Rule(),
    "-m easyrm.report": Rule(),
    "-m easyrm.score": Rule(),
    "-m easyrm.serve": Rule(),  # runs on while the page goes on; curl asks it
    "-m easyrm.import_easylm": Rule("--config=config.json"),
    "-m easyrm.plan": Rule(stop="easyrm.planning.topology.check_libtpu"),  # flags, recipe, shapes and slice are checked
    "-m easyrm.doctor": Rule("--devices=1 --data.max_length=320", statuses=(0, 2)),
    "-m benchmarks.faults": PARSED,
    "-m benchmarks.soak": PARSED,
    "benchmarks/packing.py": Rule(SMALL_BATCHES),
    "benchmarks/input_pipeline.py": Rule(SMALL_BATCHES),
    "benchmarks/throughput.py": Rule("--size=S --batch_size=4 --max_length=256 --steps=1"),
    "benchmarks/attention.py": Rule("--platform=cpu --rows=1 --length=128 --implementations=xla --repeats=1"),
    "benchmarks/trl_baseline.py": PARSED,
    "benchmarks/scaling.py": Rule(),
    "-m pytest": Rule("--collect-only -q -p no:cacheprovider"),
    "-c": Rule(),
}
# Recorded; the files of tpu_launch that they are given exist.
STAND_INS = ("gcloud", "sky", "kubectl", "docker", "xpk", "git", "hf", "editor")
REAL = ("cp", "mkdir", "tpu_launch/tpu.sh")
MORE_FLAGS = {"tpu_launch/tpu.sh": "--dry-run"}  # prints every command of gcloud that it would run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folder with every name that the documents use."""
    folder = tmp_path_factory.mktemp("documents") / "world"
    make_folder(folder)
    return folder


class Reader:
    """Somebody who types the commands of one page, one after the other, in a folder of their own."""

    def __init__(self, folder: Path):
        self._folder, self._environment, self._servers, self._port = folder, {"EDITOR": "editor"}, [], 0
        self._called = folder / ".called"
        tools = folder / ".tools"
        tools.mkdir()
        for name in STAND_INS:
            (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {self._called}\n')
            (tools / name).chmod(0o755)
        self._path = f"{tools}:{os.environ['PATH']}"

    def type(self, text: str) -> str:
        """What went wrong with a command, "" where nothing did."""
        words = shlex.split(text, comments=True)
        environment = dict(self._environment)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            environment |= [words.pop(0).split("=", 1)]
        program = words[0] = "editor" if words[0] == "$EDITOR" else words[0]
        if program == "export":
            self._environment |= dict(word.split("=", 1) for word in words[1:])
            return ""
        by_program = {"python": self._python, "pip": self._pip, "make": self._make, "curl": self._curl}
        if program in by_program:
            return by_program[program](words, environment)
        if program in (*STAND_INS, *REAL):
            return self._shell(text, words, environment)
        return "no rule in this file says how to run it"

    def close(self) -> str:
        """End what runs on; what went wrong with it."""
        for server in self._servers:
            os.kill(server.pid, signal.SIGTERM)
            server.join(30)
        return "".join(f"serve ended with {server.exitcode}" for server in self._servers if server.exitcode)

    def _python(self, words: list[str], environment: dict[str, str]) -> str:
        program = " ".join(words[1:3]) if words[1] == "-m" else words[1]
        if program not in RULES:
            return f"no rule in this file says how to run {program}"
        rule = RULES[program]
        words = [word.replace("gs://", "gs/") for word in words] + shlex.split(rule.flags)
        if program == "-m easyrm.serve":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._port = free.getsockname()[1]
            server, _ = run_python([*words, f"--port={self._port}"], self._folder, environment, wait=False)
            self._servers.append(server)
            return ""
        status, said = run_python(words, self._folder, environment, rule.stop)
        return "" if status in rule.statuses else f"exit status {status}\n{said[-1500:]}"

    def _pip(self, words: list[str], _) -> str:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        asked = {extra for word in words for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")}
        unknown = asked - set(setup["options.extras_require"])
        return f"setup.cfg has no extra {unknown}" if unknown or words[1] != "install" else ""

    def _make(self, words: list[str], environment: dict[str, str]) -> str:
        return self._run(["make", "-n", *words[1:]], ROOT, environment)

    def _curl(self, words: list[str], _) -> str:
        address = re.sub(r":\d+", f":{self._port}", words[1], count=1)
        asked = urllib.request.Request(f"http://{address}", words[words.index("-d") + 1].encode())
        problem = ""
        for _ in range(120):  # until the model is loaded
            try:
                urllib.request.urlopen(asked, timeout=60).close()
                return ""
            except OSError as error:
                problem = str(error)
                time.sleep(0.5)
        return problem

    def _shell(self, text: str, words: list[str], environment: dict[str, str]) -> str:
        before = self._called.read_text() if self._called.exists() else ""
        problem = self._run(["bash", "-c", f"{text} {MORE_FLAGS.get(words[0], '')}"], self._folder, environment)
        if words[0] in STAND_INS and not problem:
            problem = "" if self._called.read_text() != before else f"{words[0]} was not called"
            files = [word.rpartition("=")[2] for word in words if word.rpartition("=")[2].startswith("tpu_launch/")]
            problem += "".join(f"{file} is not there" for file in files if not (ROOT / file).exists())
        return problem

    def _run(self, argv: list[str], folder: Path, environment: dict[str, str]) -> str:
        done = subprocess.run(
            argv,
            cwd=folder,
            env={**os.environ, "PATH": self._path, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return f"exit status {done.returncode}\n{done.stdout[-500:]}{done.stderr[-500:]}" if done.returncode else ""


def typed(page: Path) -> list[Command | Block]:
    """The commands and the Python programs of a page, in order."""
    found = []
    for block in blocks(page):
        if block.language == "bash":
            found += commands(block)
        elif block.language == "python":
            found.append(block)
    return found


def run_block(block: Block, folder: Path) -> str:
    """What went wrong with a Python program; one that needs TRL is only parsed."""
    compile(block.text, name_of(block.page), "exec")
    if "from trl import" in block.text:
        return ""
    status, said = run_python(["python", "-c", block.text], folder, {})
    return f"exit status {status}\n{said[-1500:]}" if status else ""


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked")
@pytest.mark.parametrize("page", [page for page in PAGES if typed(page)], ids=name_of)
def test_the_commands_of_a_page_run(page, world, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(world, folder, symlinks=True)
    reader, problems = Reader(folder), []
    for item in typed(page):
        problem = run_block(item, folder) if isinstance(item, Block) else reader.type(item.text)
        if problem:
            problems.append(f"{name_of(page)}:{item.line}: {item.text.strip().splitlines()[0]}\n{problem}")
    problems += filter(None, [reader.close()])
    assert not problems, "\n\n".join(problems)


@pytest.mark.parametrize(
    "command",
    [
        "python -m easyrm.train_rm --model.init_form=BASE --data.train=pairs.jsonl --output_dir=runs/a",
        "python -m easyrm.train_rm --model.init_from=BASE --data.train=absent.jsonl --output_dir=runs/a",
        "python -m easyrm.plan --recipe=llama3.1-tulu2-8b-uf --topology=v5p-64",
        "python benchmarks/trl_baseline.py --size=M --data=FILE --tokenizer=DIR --batches=8",
        "pip install 'easyrm[everything]'",
        "make domo",
        "wget tokenizer.model",
    ],
)
def test_a_wrong_command_is_found(command, world, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(world, folder, symlinks=True)
    assert Reader(folder).type(command)
