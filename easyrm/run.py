"""The directory of a run: its record (config.json), and whether a run may continue what it finds there."""

import dataclasses
import importlib.metadata
import json
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from easyrm.config import RunConfig
from easyrm.data.template import TEMPLATE_HASH
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError
from easyrm.hf.source import ModelSource
from easyrm.hf.tokenizer import check_tokenizer, write_tokenizer
from easyrm.training.inputs import Inputs

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "sentencepiece")

# What may differ when a run is continued: it changes where and how, not what is computed.
MAY_CHANGE = {
    "recipe",
    "mesh_dim",
    "output_dir",
    "log_freq",
    "eval_freq",
    "save_freq",
    "keep_checkpoints",
    "export",
    "export_dtype",
    "distributed",
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


def check_output_dir(config: RunConfig) -> epath.Path:
    """The output directory, before anything expensive. Raises InputError where another configuration's run lies."""
    directory = epath.Path(config.output_dir)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output_dir={directory}: a file is in the way; name a directory")
    if (directory / "config.json").exists():
        before, now = _flatten(read_record(directory)["config"]), _flatten(config.to_dict())
        changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
        if changed:
            what = ", ".join(f"--{name}={now[name]} (there: {before.get(name)})" for name in changed)
            raise InputError(
                f"--output_dir={directory} holds a run of another configuration: {what}; "
                "choose another directory, or give the same flags to resume"
            )
    return directory


def describe(
    config: RunConfig, source: ModelSource, tokenizer: Tokenizer, mesh: Mesh, inputs: Inputs
) -> dict[str, Any]:
    """The record of a run: everything that its figures depend on, as plain values."""
    reports = {"train": inputs.train.store, "eval": inputs.eval.store if inputs.eval else None}
    return {
        "config": config.to_dict(),
        "model": dataclasses.asdict(source.config),
        "tokenizer": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "pad_reason": tokenizer.pad_reason,
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


def open_run(directory: epath.Path, record: dict[str, Any], tokenizer: Tokenizer, examples: list[str]) -> None:
    """Write config.json and the tokenizer as Hugging Face reads it, checked on `examples` to give the same ids.

    Raises InputError where the directory's run was made of other data, or the written tokenizer differs.
    """
    if (directory / "config.json").exists():
        before, now = read_record(directory)["data"]["train"], record["data"]["train"]
        if before["fingerprint"] != now["fingerprint"]:
            raise InputError(
                f"--output_dir={directory} holds a run on other data ({before['kept']} pairs, fingerprint "
                f"{before['fingerprint'][:12]}; now {now['kept']}, {now['fingerprint'][:12]}); choose another directory"
            )
    if jax.process_index() == 0:
        (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
        write_tokenizer(tokenizer, directory / "tokenizer", record["config"]["data"]["max_length"])
        check_tokenizer(directory / "tokenizer", tokenizer, examples)
        (directory / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def read_record(directory: epath.Path) -> dict[str, Any]:
    """The record of a run. Raises InputError where there is none or it does not parse."""
    path = directory / "config.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; name the directory of a run") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); name the directory of a run, or remove it") from error
    if not isinstance(record, dict) or not {"config", "model", "data"} <= set(record):
        raise InputError(f"{path}: not the record of a run of easyrm; name another directory")
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


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
