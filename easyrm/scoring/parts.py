"""An output that grows part by part, and goes on where it was interrupted."""

import json
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from easyrm.errors import InputError
from easyrm.files import write_atomically
from easyrm.strict_json import read_object


class Parts:
    """The lines of `output`, gathered in the directory `<output>.parts` until `finish` joins them.

    `count` lines are there already. Each part is written whole or not at all, also to a bucket. With several processes
    all must call everything; process 0 writes.
    """

    def __init__(self, output: epath.Path, settings: dict[str, Any]):
        """Raises InputError where parts of other `settings` (plain values) lie, or `output` cannot be written."""
        self._output = output
        self._folder = output.with_name(output.name + ".parts")
        self._writes = jax.process_index() == 0
        self.count = self._next = 0
        problem = ""
        if self._writes:
            try:
                problem = self._open(settings)
            except OSError as error:
                problem = f"--output={output} cannot be written ({error}); choose another"
        if jax.process_count() > 1:
            found = np.array([self.count, self._next, bool(problem)])
            self.count, self._next, failed = map(int, multihost_utils.broadcast_one_to_all(found))
            problem = problem or ("process 0 cannot write the output, see its message" if failed else "")
        if problem:
            raise InputError(problem)

    def _open(self, settings: dict[str, Any]) -> str:
        if self._output.is_dir():
            return f"--output={self._output} is a directory; name a file"
        about = self._folder / "settings.json"
        if about.exists():
            there = read_object(about)
            if changed := [name for name, value in settings.items() if there.get(name) != value]:
                what = ", ".join(f"{name}={settings[name]} (there: {there.get(name)})" for name in changed)
                return f"{self._folder} holds the first lines of another command: {what}; remove it, or go on with that"
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(about, json.dumps(settings, indent=2) + "\n")
        while (part := self._part(self._next)).exists():
            self.count += part.read_bytes().count(b"\n")
            self._next += 1
        return ""

    def _part(self, number: int) -> epath.Path:
        return self._folder / f"{number:06d}.jsonl"

    def write(self, lines: Iterable[str]) -> None:
        """Keep the next lines."""
        lines = list(lines)
        if self._writes:
            write_atomically(self._part(self._next), "".join(f"{line}\n" for line in lines))
        self._next, self.count = self._next + 1, self.count + len(lines)

    def finish(self) -> None:
        """Put `output` in its place and remove the parts."""
        if not self._writes:
            return
        remote = "://" in str(self._output)
        whole = self._output if remote else self._output.with_name(f".{self._output.name}.unfinished")
        with whole.open("wb") as file:
            for number in range(self._next):
                with self._part(number).open("rb") as part:
                    shutil.copyfileobj(part, file)
        if not remote:
            whole.replace(self._output)
        self._folder.rmtree()
