"""The front matter of a model card: the metadata by which the Hugging Face hub files a model and shows its figures."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from easyrm.evaluation_files import SHARES, title_of
from easyrm.hf.card_results import figure_title
from easyrm.hf.hub import hub_name

# Where the published suites are.
_DATASETS = {
    "rewardbench": "allenai/reward-bench",
    "rewardbench2": "allenai/reward-bench-2",
    "rm-bench": "THU-KEG/RM-Bench",
}
_HUB_DATA = re.compile(r"hf://([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::(.+))?", re.ASCII)


def front_matter(record: dict[str, Any], evaluations: list[dict[str, Any]], name: str) -> str:
    """YAML between two rules, in the form of `huggingface_hub.ModelCardData`.

    What is not known is not there: no licence without `--license`, neither base model nor data set that is not on the
    hub, no `model-index` without a measured figure.
    """
    config = record.get("config") or {}
    base = hub_name((config.get("model") or {}).get("init_from") or "")
    parts = ((config.get("data") or {}).get("train") or "").split(",")
    datasets = [found[1] for part in parts if (found := _HUB_DATA.fullmatch(part.strip()))]
    results = [result for evaluation in evaluations for result in _eval_results(evaluation)]
    data = ModelCardData(
        license=(config.get("license") or "").lower() or None,  # the hub writes SPDX ids in lower case
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "easyrm"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """Every share that was measured, in per cent, and the mean reward difference of a file of pairs.

    The hub takes the name of a source only with an address: without a page of the data, `dataset_args` says all.
    """
    suite, figures = evaluation["suite"], evaluation["figures"]
    on_hub = _HUB_DATA.fullmatch(evaluation["source"])
    dataset = _DATASETS.get(suite) or (on_hub[1] if on_hub else None)
    again = suite in _DATASETS and evaluation["name"] != suite
    shared = {
        "task_type": "text-classification",
        "dataset_name": title_of(suite, evaluation["name"]),
        # The hub takes one result a data set: a second evaluation on a suite goes by its own name.
        "dataset_type": evaluation["name"] if dataset is None or again else dataset,
        "dataset_split": on_hub[2] if on_hub else None,
        "dataset_args": {
            **{name: evaluation[name] for name in ("evaluator", "dtype", "max_length", "read", "scored")},
            "source": evaluation["source"],
        },
        "source_name": f"{evaluation['evaluator']} on {dataset}" if dataset else None,
        "source_url": f"https://huggingface.co/datasets/{dataset}" if dataset else None,
    }
    shares = [figure for figure in SHARES[suite] if figure in figures and not figure.startswith("interval")]
    values = {figure: ("accuracy", round(100 * figures[figure], 1)) for figure in shares}
    if suite == "pairs" and "margin" in figures:
        values["mean_reward_difference"] = ("margin", round(figures["margin"], 4))
    return [
        EvalResult(metric_type=kind, metric_name=figure_title(figure), metric_value=value, **shared)
        for figure, (kind, value) in values.items()
    ]
