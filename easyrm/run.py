"""The directory of a run: its record (config.json), and whether a run may continue what it finds there."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from easyrm.buckets import check_bucket
from easyrm.config import RunConfig
from easyrm.data.template import TEMPLATE_HASH
from easyrm.data.tokenizer import Tokenizer, load_tokenizer
from easyrm.errors import InputError, writing
from easyrm.files import flatten, sha256_of, write_atomically
from easyrm.hf.source import ModelSource
from easyrm.hf.tokenizer import check_tokenizer, write_tokenizer
from easyrm.redact import redact_tree
from easyrm.strict_json import read_object
from easyrm.training.inputs import Inputs

_CHECKSUM = "sha256"  # of the rest of the record
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "sentencepiece")

# What may differ when a run is continued: it changes where and how, not what is computed.
MAY_CHANGE = {
    "recipe",
    "mesh_dim",
    "output_dir",
    "log_freq",
    "eval_freq",
    "eval.suites",
    "eval.patience",
    "save_freq",
    "save_minutes",
    "keep_checkpoints",
    "keep_best",
    "best_metric",
    "keep_every",
    "strict_saves",
    "on_nonfinite",
    "max_nonfinite",
    "allow_config_change",
    "export",
    "export_dtype",
    "license",
    "distributed",
    "distributed_timeout",
    "compilation_cache",
    "profile_steps",
    "tensorboard",
    "wandb_project",
    "model.attention",
    "model.remat",
    "data.train",  # the fingerprint of its tokens decides
    "data.eval",
    "data.micro_batches",
    "data.row_length",
    "data.packing",
    "data.max_bad_fraction",
}


def check_output_dir(config: RunConfig, say: Callable[[str], None]) -> epath.Path:
    """The output directory, before anything expensive.

    Raises InputError where a run of another configuration lies there, unless --allow_config_change: then it is said;
    and as `check_bucket` does.
    """
    check_bucket(config.output_dir)
    directory = epath.Path(config.output_dir)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir={directory}: a file is in the way; name a directory")
    if (found := find_record(directory)) is not None:
        # The record holds no secrets; what is compared, and printed where it differs, holds none either.
        # A setting that the record lacks is newer than the run: its default is what the run was made with.
        trees = (RunConfig().to_dict(), found["config"], config.to_dict())
        defaults, before, now = (flatten(redact_tree(tree)) for tree in trees)
        before = defaults | before
        changed = [name for name in now if name not in MAY_CHANGE and before[name] != now[name]]
        what = [f"--{name}={now[name]} (there: {before[name]})" for name in changed]
        _refuse_changes(config, f"a run of another configuration: {', '.join(what)}" if what else "", say)
    return directory


def describe(
    config: RunConfig, source: ModelSource, tokenizer: Tokenizer, mesh: Mesh, inputs: Inputs
) -> dict[str, Any]:
    """The record of a run: everything that its figures depend on, as plain values, without secrets."""
    reports = {"train": inputs.train.store, "eval": inputs.eval.store if inputs.eval else None}
    record = {
        "config": config.to_dict(),
        "model": dataclasses.asdict(source.config),
        "tokenizer": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "pad_reason": tokenizer.pad_reason,
            "vocab_size": tokenizer.vocab_size,
            "template_sha256": TEMPLATE_HASH,
        },
        "data": {
            name: {**store.report, "fingerprint": store.fingerprint} if store else None
            for name, store in reports.items()
        },
        "total_steps": inputs.steps,
        "row_shapes": [list(shape) for shape in inputs.train.shapes],
        "mesh": dict(mesh.shape),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("easyrm", *LIBRARIES)},
    }
    return redact_tree(record)


def open_run(
    directory: epath.Path,
    record: dict[str, Any],
    tokenizer: Tokenizer,
    examples: list[str],
    config: RunConfig,
    say: Callable[[str], None],
) -> None:
    """Write config.json and the tokenizer as Hugging Face reads it, checked on `examples` to give the same ids.

    Raises InputError where the directory's run was made of other data, tokens or model shapes, unless
    --allow_config_change, and where the written tokenizer differs or the directory cannot be written; Unavailable
    where a bucket fails at that.
    """
    if (found := find_record(directory)) is not None:
        _refuse_changes(config, _differences(found, record), say)
    if jax.process_index() == 0:
        with writing(f"--output_dir={directory}"):
            _write(directory, record, tokenizer, examples)


def _write(directory: epath.Path, record: dict[str, Any], tokenizer: Tokenizer, examples: list[str]) -> None:
    folder = directory / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder, record["config"]["data"]["max_length"])
    check_tokenizer(folder, tokenizer, examples)
    record["tokenizer_files"] = _file_hashes(folder)
    write_atomically(directory / "config.json", json.dumps({**record, _CHECKSUM: sha256_of(record)}, indent=2) + "\n")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between the data, tokenizer, template and model of two records; "" where nothing does."""
    found = []
    then, data = before["data"]["train"], now["data"]["train"]
    if then["fingerprint"] != data["fingerprint"]:
        found.append(
            f"other data or tokens than --data.train={now['config']['data']['train']} gives now ({then['kept']} pairs, "
            f"fingerprint {then['fingerprint'][:12]}; now {data['kept']}, {data['fingerprint'][:12]})"
        )
    for part in ("tokenizer", "model"):
        keys = sorted(set(before[part]) | set(now[part]))
        changed = [key for key in keys if before[part].get(key) != now[part].get(key)]
        found += [f"{part} {key}={now[part].get(key)} (there: {before[part].get(key)})" for key in changed]
    return f"a run on {', '.join(found)}" if found else ""


def _refuse_changes(config: RunConfig, changes: str, say: Callable[[str], None]) -> None:
    if changes and not config.allow_config_change:
        raise InputError(
            f"--output_dir={config.output_dir} holds {changes}; choose another directory, give the same flags and data "
            "to resume, or --allow_config_change to go on with what changed"
        )
    if changes:
        say(f"note: --output_dir={config.output_dir} holds {changes}; going on, as --allow_config_change says")


def load_run_tokenizer(directory: epath.Path, record: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a run left in `directory`. Raises InputError where its files are not those of the record."""
    folder = directory / "tokenizer"
    for name, digest in record.get("tokenizer_files", {}).items():
        if not (folder / name).exists() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise InputError(f"{folder / name}: not the file that the run wrote; start the run's command once more")
    return load_tokenizer(str(folder))


def read_record(directory: epath.Path) -> dict[str, Any]:
    """The record of a run. Raises InputError where there is none, and as `find_record` does."""
    record = find_record(directory)
    if record is None:
        raise InputError(f"{directory / 'config.json'}: no such file; name the directory of a run")
    return record


def find_record(directory: epath.Path) -> dict[str, Any] | None:
    """The record of the run in `directory`, of its newest checkpoint where config.json is gone; None where no run is.

    Raises InputError for a config.json that is none, or was changed.
    """
    copies = sorted(directory.glob("checkpoints/*/config/metadata"), key=lambda path: path.parts[-3].zfill(20))
    copies = [copy for copy in copies if copy.parts[-3].isdigit()]
    path = directory / "config.json"
    if not path.exists():
        return read_object(copies[-1]) if copies else None
    record = read_object(path)
    if not {"config", "model", "data"} <= set(record):
        raise InputError(f"{path}: not the record of a run of easyrm; name another directory")
    if record.pop(_CHECKSUM, None) != sha256_of(record):
        raise InputError(f"{path}: changed after the run wrote it; restore it, or remove it: checkpoints hold a copy")
    return record


def split_checkpoint(path: str) -> tuple[epath.Path, int | None]:
    """RUN_DIR[/checkpoints[/STEP]] -> (RUN_DIR, STEP or None for the newest)."""
    here = epath.Path(path)
    step = int(here.name) if here.name.isdigit() and here.parent.name == "checkpoints" else None
    here = here.parent if step is not None else here
    return (here.parent if here.name == "checkpoints" else here), step


def is_run(path: epath.Path) -> bool:
    """Whether a directory holds a run rather than a Hugging Face model."""
    return (path / "checkpoints").is_dir()


def _file_hashes(folder: epath.Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
