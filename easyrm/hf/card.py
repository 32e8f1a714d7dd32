"""The model card of an exported reward model: README.md, from the run's own record and nothing else."""

import json
from typing import Any

from easyrm.hf.hub import hub_name

_USE = """\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")
model = AutoModelForSequenceClassification.from_pretrained("PATH_OR_NAME").eval()
messages = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]
text = tokenizer.apply_chat_template(messages, tokenize=False)
with torch.no_grad():
    reward = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
```"""

_NOTES = """\
- The template writes BOS itself, where the tokenizer has one, and the tokenizer adds none: do not add it again.
- The conversation ends at EOS, and the reward is read there.
- The padding token is distinct from EOS, so batches may be padded on either side.
- Only the difference between rewards of the same prompt has been trained; a reward by itself has no scale."""


def model_card(record: dict[str, Any], metrics: list[dict[str, Any]], *, example: str) -> str:
    """The text of README.md.

    `record` is the run's config.json (`config`, `model`, `data`, `versions`, `total_steps`, `mesh`, `devices`),
    `metrics` the lines of its metrics.jsonl, `example` one conversation as the run's template renders it. What the
    record does not hold is said to be not recorded.
    """
    parts = [
        _front_matter(record),
        "# Reward model\n\nA scalar reward model (`LlamaForSequenceClassification`, one label), trained on preference "
        f"pairs with easyrm {_known(record.get('versions', {}).get('easyrm'))}.\n\n"
        f"- Started from: {_origin(record)}\n"
        f"- Optimizer steps: {_known(record.get('total_steps'))}\n"
        f"- Mesh: {_known(record.get('mesh'))} on {_known(record.get('devices'))}",
        "## Input format\n\nA conversation, rendered by the tokenizer's chat template. For example (shown with JSON's "
        f"escapes):\n\n```\n{json.dumps(example, ensure_ascii=False)}\n```\n\n{_USE}\n\n{_NOTES}",
        "## Data\n\n" + _data(record.get("data") or {}),
        "## Results\n\n" + _results(metrics),
        "## Hyperparameters\n\n" + _table(("flag", "value"), _flatten(record.get("config") or {})),
        "## Model\n\n" + _table(("field", "value"), _flatten(record.get("model") or {})),
        "## Software\n\n" + _table(("library", "version"), _flatten(record.get("versions") or {})),
        "## Limits\n\nThis card was written by the training run. Beyond the figures above the model has not been "
        "evaluated, and the licences of its base model and of its data are not recorded here: both apply.",
    ]
    return "\n\n".join(parts) + "\n"


def _known(value: Any) -> str:
    return "not recorded" if value is None else value if isinstance(value, str) else json.dumps(value)


def _init_from(record: dict[str, Any]) -> str:
    return record.get("config", {}).get("model", {}).get("init_from") or ""


def _origin(record: dict[str, Any]) -> str:
    return f"`{_init_from(record)}`" if _init_from(record) else "random weights"


def _front_matter(record: dict[str, Any]) -> str:
    """The hub's metadata; `base_model` only where the run started from a model on the hub."""
    lines = ["library_name: transformers", "pipeline_tag: text-classification", "tags:", "- reward-model", "- easyrm"]
    if base := hub_name(_init_from(record)):
        lines.insert(0, f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---"])


def _data(data: dict[str, Any]) -> str:
    """One table a data set: files, pairs, tokens and fingerprint, with what was dropped by reason."""
    sections = []
    for split, report in data.items():
        if not report:
            continue
        rows = {"files": ", ".join(map(str, report.get("files") or [])) or None}
        rows |= {"pairs read": report.get("read"), "pairs kept": report.get("kept")}
        rows |= {f"pairs dropped: {reason}": count for reason, count in (report.get("dropped") or {}).items()}
        rows |= {"tokens": report.get("tokens"), "tokens, a shared prompt counted once": report.get("tokens_unique")}
        rows["fingerprint"] = report.get("fingerprint")
        sections.append(f"### {split}\n\n" + _table(("", ""), {key: _known(value) for key, value in rows.items()}))
    return "\n\n".join(sections) or "Not recorded."


def _results(metrics: list[dict[str, Any]]) -> str:
    """The last line of training and the last evaluation."""
    training = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if any(key.startswith("eval/") for key in line)]
    sections = []
    for title, lines in (("Last training step logged", training), ("Last evaluation", evaluations)):
        sections.append(f"### {title}\n\n" + (_table(("metric", "value"), lines[-1]) if lines else "None was made."))
    return "\n\n".join(sections)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as the flags that set them: {"data": {"train": x}} becomes {"data.train": x}."""
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    if not rows:
        return "Not recorded."
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()])


def _cell(value: Any) -> str:
    """A value as text that cannot break out of its table cell."""
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
