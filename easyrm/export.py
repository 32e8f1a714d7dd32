"""A run's parameters as a Hugging Face directory, with the run's own tokenizer, record and figures."""

from collections.abc import Callable
from typing import Any

from etils import epath

from easyrm.data.template import render
from easyrm.evaluation_files import read_evaluations
from easyrm.hf.card import model_card
from easyrm.hf.export import export
from easyrm.hf.tokenizer import write_tokenizer
from easyrm.models.config import LlamaConfig
from easyrm.redact import redact, redact_tree
from easyrm.run import load_run_tokenizer, read_record
from easyrm.training.metrics import read_metrics

_EXAMPLE = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]


def export_run(
    params: Any, directory: epath.Path, output: epath.Path, *, step: int, dtype: str, say: Callable[[str], None]
) -> None:
    """Write `params`, of `step` of the run in `directory`, to `output`; see `easyrm.hf.export.export`.

    Every process calls it. The model card shows the evaluations of this step alone.
    """
    record = read_record(directory)
    evaluations = read_evaluations(directory, step, say)
    tokenizer = load_run_tokenizer(directory, record)
    export(
        params,
        LlamaConfig(**record["model"]),
        output,
        raw_config=record["tokenizer"],
        write_tokenizer=lambda folder: write_tokenizer(tokenizer, folder, record["config"]["data"]["max_length"]),
        card=model_card(
            redact_tree(record),
            read_metrics(directory),
            redact_tree(evaluations),
            name=redact((directory if output == directory / "export" else output).name) or "reward-model",
            step=step,
            dtype=dtype,
            example=render(_EXAMPLE, tokenizer.bos, tokenizer.eos),
        ),
        dtype=dtype,
    )
    say(f"exported to {output} ({dtype})")
