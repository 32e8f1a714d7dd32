"""The model card of an exported reward model: README.md, from the run's own record and figures and nothing else."""

import json
from typing import Any

from easyrm.files import flatten
from easyrm.hf.card_metadata import front_matter
from easyrm.hf.card_results import in_order, results
from easyrm.hf.markdown import code, folded, table, text

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
```

- The template writes BOS itself, where the tokenizer has one, and the tokenizer adds none: do not add it again.
- The conversation ends at EOS, and the reward is read there.
- The padding token is distinct from EOS, so batches may be padded on either side."""

_FORMAT = """\
```
<|user|>
Your message here!
<|assistant|>
The response here.
```

**The newline after `<|assistant|>` matters**, as does every other one: the model was trained with them, and other text
gets other rewards. The tokenizer's chat template writes them. BOS stands in front where the tokenizer has one, and EOS
follows each response directly. One conversation exactly as it was trained on, shown with JSON's escapes:"""

_INTENDED = """\
For scoring responses in RLHF: choosing the best of n, as the reward of PPO, filtering and ranking data. It compares
responses to the same prompt."""


def model_card(
    record: dict[str, Any],
    metrics: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    *,
    name: str,
    step: int,
    dtype: str,
    example: str,
) -> str:
    """The text of README.md, for the model `name` exported at `step` with weights in `dtype`.

    `record` is the run's config.json (`config`, `model`, `data`, `versions`, `total_steps`, `mesh`, `devices`),
    `metrics` the lines of its metrics.jsonl, of which none after `step` is shown, `evaluations` what
    `read_evaluations` gives for `step`, `example` one conversation as the run's template renders it. What the record
    does not hold is said to be not recorded.
    """
    config, evaluations = record.get("config") or {}, in_order(evaluations)
    parts = [
        front_matter(record, evaluations, name),
        f"# {text(name)}",
        _summary(record, step, dtype),
        "## Evaluation\n\n" + results(evaluations, name, step),
        f"## Input format\n\n{_FORMAT}\n\n```\n{json.dumps(example, ensure_ascii=False)}\n```",
        f"## How to use it\n\n{_USE}",
        f"## Intended use and limitations\n\n{_INTENDED}\n\n{_limitations(record.get('data') or {})}",
        "## Training data\n\n" + _data(record.get("data") or {}),
        "## Training hyperparameters\n\n" + _short(config, record.get("total_steps"), step, dtype),
        folded("All flags", _table(("flag", "value"), flatten(config))),
        "## Training figures\n\n" + _figures(metrics, step),
        "## Model and software",
        folded("Shape of the model", _table(("field", "value"), flatten(record.get("model") or {}))),
        folded("Versions", _table(("library", "version"), flatten(record.get("versions") or {}))),
    ]
    card = "\n\n".join(parts) + "\n"
    return card.encode("utf-8", "replace").decode()  # JSON may hold halves of characters, which no file takes


def _known(value: Any) -> str:
    return "not recorded" if value is None else value if isinstance(value, str) else json.dumps(value)


def _summary(record: dict[str, Any], step: int, dtype: str) -> str:
    config, versions = record.get("config") or {}, record.get("versions") or {}
    base = (config.get("model") or {}).get("init_from")
    train, total = (config.get("data") or {}).get("train"), record.get("total_steps")
    licence = (
        f"Licence: {code(config['license'])}, as stated by whoever trained the model. The licences of its base model "
        "and of its data apply beside it."
        if config.get("license")
        else "Licence: not stated. The licences of its base model and of its data apply, and were not recorded."
    )
    return (
        "A scalar reward model (`LlamaForSequenceClassification`, one label), trained on preference pairs with easyrm "
        f"{text(_known(versions.get('easyrm')))}.\n\n"
        f"- Started from: {code(base) if base else 'random weights'}\n"
        f"- Trained on: {code(train) if train else 'not recorded'}\n"
        f"- Optimizer steps: {step}{'' if total is None else f' of {total}'}\n"
        f"- Weights: {text(dtype)}\n"
        f"- Trained with: mesh {text(_known(record.get('mesh')))} on {text(_known(record.get('devices')))}\n"
        f"- {licence}"
    )


def _limitations(data: dict[str, Any]) -> str:
    longest = (data.get("train") or {}).get("longest")
    length = "not recorded" if longest is None else f"{longest} tokens"
    return (
        "- Only differences between rewards of the same prompt were trained. A reward by itself has no scale, and "
        "rewards of different prompts are not comparable unless they are normalised.\n"
        f"- The longest conversation in the training data: {length}. Beyond that it is untested.\n"
        "- Reward models tend to favour longer responses. Where it was measured, the evaluation above says how often.\n"
        "- In which languages and domains it is of use depends on the data, and was not examined.\n"
        "- It is not a safety classifier: a high reward does not mean that a response is true or harmless.\n"
        "- Beyond the figures above it has not been evaluated."
    )


def _short(config: dict[str, Any], total: int | None, step: int, dtype: str) -> str:
    """The settings that the published cards list."""
    loss = config.get("loss") or {}
    flags = {name: _known(value) for name, value in flatten(config).items()}

    def of(name: str) -> str:
        return flags.get(name, "not recorded")

    options = "; ".join(f"{key} {_known(value)}" for key, value in loss.items() if key != "type")
    rows = {
        "learning rate": of("optimizer.lr"),
        "schedule": f"linear warm-up, then linear to {of('optimizer.end_lr')}",
        "warm-up ratio": of("optimizer.warmup_ratio"),
        "batch size, pairs": of("data.batch_size"),
        "optimizer": f"AdamW with betas=({of('optimizer.b1')}, {of('optimizer.b2')}) and epsilon={of('optimizer.eps')}",
        "weight decay": of("optimizer.weight_decay"),
        "gradient clipping": "none"
        if of("optimizer.clip_norm") == "0.0"
        else f"global norm {of('optimizer.clip_norm')}",
        "epochs": f"as many as --total_steps={of('total_steps')} take"
        if config.get("total_steps")
        else of("num_epochs"),
        "optimizer steps": f"{step} of {_known(total)}",
        "max length, tokens": of("data.max_length"),
        "loss": of("loss.type") + (f" ({options})" if options else ""),
        "seed": of("seed"),
        "dtype": f"compute {of('dtype')}, parameters fp32, exported weights {dtype}",
    }
    return _table(("setting", "value"), rows)


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
        rows = {key: _known(value) for key, value in rows.items()}
        sections.append(f"### {text(split)}\n\n" + _table((" ", " "), rows))
    return "\n\n".join(sections) or "Not recorded."


def _figures(metrics: list[dict[str, Any]], step: int) -> str:
    """The last line of training up to `step`, and the evaluation during training at `step`."""
    training = [line for line in metrics if "loss" in line and line["step"] <= step]
    evaluated = [line for line in metrics if any(key.startswith("eval/") for key in line) and line["step"] == step]
    sections = []
    for title, lines in (("Last training step logged", training), ("Evaluation during training", evaluated)):
        shown = _table(("metric", "value"), {key: value for line in lines[-1:] for key, value in line.items()})
        sections.append(folded(title, shown if lines else "None was made."))
    return "\n\n".join(sections)


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    return table(head, rows.items())
