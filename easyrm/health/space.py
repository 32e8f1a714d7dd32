"""Free disk and memory against what the run needs of them, as far as that is known."""

import contextlib
import glob
import os
import re
import shutil
import tempfile
from pathlib import Path

from easyrm.chips import model_weights
from easyrm.config import RunConfig
from easyrm.health.finding import FAIL, OK, SKIPPED, WARN, Finding
from easyrm.health.storage import standing
from easyrm.models.config import LlamaConfig
from easyrm.training.remat import BF16, FP32, state_bytes

_GB = 1e9
# Bytes of text a byte of file: token ids take 4 bytes, and a token is about 4 of text.
_TEXT = {".gz": 4, ".parquet": 3}
_STORE = 2 * _GB  # of a token store of unknown size: 500 million tokens, ten times UltraFeedback
_LOGS = 1 * _GB  # of a run whose model is not known, for metrics and evaluations
_PROGRAM = 6 * _GB  # of memory that Python, JAX, the compiler and the reading of data take together


def disk(config: RunConfig, llama: LlamaConfig | None) -> list[Finding]:
    """Free disk where the token store and, in a local --output_dir, checkpoints and export are to lie."""
    size = _data_bytes(config)
    needs = f"the token store takes {_gb(size)}" if size else f"the token store may take {_gb(_STORE)}"
    try:
        found = [_free(tempfile.gettempdir(), size, size or _STORE, needs, "set TMPDIR to a directory with more")]
    except OSError as error:  # it tries to write
        found = [Finding("disk", FAIL, error.strerror or str(error), "free space, or set TMPDIR to a directory")]
    if config.output_dir and "://" not in config.output_dir:
        one, every, needs = 0.0, _LOGS, f"metrics and evaluations may take {_gb(_LOGS)}"
        if llama is not None:
            state = state_bytes(llama, 1, config.optimizer.mu_bytes)
            export = model_weights(llama) * (BF16 if config.export_dtype == "bf16" else FP32) * config.export
            kept = config.keep_checkpoints + config.keep_best + 1
            one, every = state, state * kept + export
            needs = f"a checkpoint takes {_gb(one)}, all that are kept at once and the export {_gb(every)}"
        way_out = "free space, give another --output_dir, or keep fewer checkpoints"
        found.append(_free(str(standing(config.output_dir)), one, every, needs, way_out))
    return found


def memory(config: RunConfig, llama: LlamaConfig | None, hosts: int, *, accelerator: bool) -> Finding:
    """Free memory of this host, one of `hosts`; without an `accelerator` it is that of the devices, too."""
    free = available_memory()
    if free is None:
        return Finding("memory", SKIPPED, "not applicable: this system has no /proc/meminfo")
    needed, why = _PROGRAM, "Python, the compiler and the data"
    if llama is not None:
        held = state_bytes(llama, hosts, config.optimizer.mu_bytes)
        if not accelerator:
            held += held + model_weights(llama) * FP32 / hosts
            why += ", the state and gradients of its devices"
        needed += held
        why += ", and a copy of its share of the state while that is saved"
    text = f"{{free}} GB free; {_gb(needed)} are needed: {why}"
    figures = {"free": [free / _GB]}
    if free < needed:
        state = FAIL if llama is not None and free < needed - _PROGRAM else WARN
        return Finding("memory", state, text, "end other programs, take larger hosts, or more of them", figures)
    return Finding("memory", OK, text, figures=figures)


def available_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Bytes that this process may still take, of the machine or of its container; None where the system does not say.

    The kernel gives up a container's cached files for it, so that they are not taken.
    """
    try:
        free = float(re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE)[1]) * 1024
    except (OSError, TypeError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no such container, or "max": no limit
        limit, taken = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.findall(r"^(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - taken + sum(map(float, cached)))
    return free


def _free(directory: str, least: float, wanted: float, needs: str, way_out: str) -> Finding:
    free = shutil.disk_usage(directory).free
    text, figures = f"{directory}: {{free}} GB free; {needs}", {"free": [free / _GB]}
    if free < least:
        return Finding("disk", FAIL, text, way_out, figures)
    return Finding("disk", WARN if free < wanted else OK, text, way_out if free < wanted else "", figures)


def _data_bytes(config: RunConfig) -> float:
    """About what the tokens of all local data take; 0 where some of it is not here."""
    total = 0.0
    for part in f"{config.data.train},{config.data.eval}".split(","):
        part = part.strip()
        if "://" in part:
            return 0
        files = glob.glob(f"{part}/*") if os.path.isdir(part) else glob.glob(part, recursive=True)
        total += sum(os.path.getsize(file) * _TEXT.get(os.path.splitext(file)[1], 1) for file in files if part)
    return total


def _gb(size: float) -> str:
    return f"about {size / _GB:.1f} GB" if size >= _GB / 10 else "less than 0.1 GB"
