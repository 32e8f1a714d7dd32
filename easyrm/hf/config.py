"""Hugging Face's config.json: read into a LlamaConfig, and written for an exported reward model."""

import json
from collections.abc import Callable
from typing import Any

from etils import epath

from easyrm.errors import InputError
from easyrm.file_digests import MODEL_FILES, check_files
from easyrm.hf.hub import fetch
from easyrm.models.config import LlamaConfig
from easyrm.strict_json import read_object

CLASSIFIER = "LlamaForSequenceClassification"
_ARCHITECTURES = ("LlamaForCausalLM", CLASSIFIER)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # of transformers 5, and of 4
# What each kind of frequency scaling needs beside its name.
_ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What we compute for keys whose other values change the arithmetic; a missing key means the same.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
TORCH_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def read_config(source: str | epath.PathLike) -> tuple[LlamaConfig, dict[str, Any]]:
    """The LlamaConfig and the raw dict of a model directory, a hub name, `gs://...` or a config.json.

    Reads the keys of transformers 4 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`). Raises InputError for
    a file that does not parse, that is not as the digests.json beside it says, and for every model that we do not
    compute exactly.
    """
    path = fetch(source)
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        raw = read_object(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{file}: no such file; a model directory holds a config.json") from error
    if file.name in MODEL_FILES:
        check_files(file.parent, MODEL_FILES)
    return llama_config(raw, where=str(file)), raw


def is_classifier(raw: dict[str, Any]) -> bool:
    """Whether a raw config is that of a sequence classifier, whose score head is to be loaded."""
    return CLASSIFIER in (raw.get("architectures") or ())


def num_labels(raw: dict[str, Any]) -> int:
    """Outputs of a raw config's classifier, as transformers counts them: by `id2label`, else `num_labels`, else 2."""
    return len(raw["id2label"]) if raw.get("id2label") else raw.get("num_labels", 2)


def llama_config(raw: dict[str, Any], where: str) -> LlamaConfig:
    """The LlamaConfig of a raw config; `where` names it in the InputError for what we do not compute."""
    _refuse_foreign(raw, where)
    theta, scaling = _rope(raw, where)
    config = LlamaConfig(
        **{key: raw[key] for key in _REQUIRED},
        # The defaults are those of transformers, not ours; 0 is LlamaConfig's word for its own.
        num_key_value_heads=_value(raw, "num_key_value_heads", 0, _is_size, where),
        head_dim=_value(raw, "head_dim", 0, _is_size, where),
        max_position_embeddings=_value(raw, "max_position_embeddings", 2048, _is_size, where),
        rms_norm_eps=_value(raw, "rms_norm_eps", 1e-6, _is_positive, where),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_value(raw, "tie_word_embeddings", False, lambda value: isinstance(value, bool), where),
        initializer_range=_value(raw, "initializer_range", 0.02, _is_positive, where),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"{where}: num_key_value_heads={config.num_key_value_heads} does not divide "
            f"num_attention_heads={config.num_attention_heads}; correct the file"
        )
    if config.head_dim % 2 or config.head_dim < 2:
        raise InputError(f"{where}: head_dim={config.head_dim} is not even, as RoPE needs; correct the file")
    return config


def _value(raw: dict[str, Any], key: str, default: Any, is_sound: Callable[[Any], bool], where: str) -> Any:
    """What a raw config says of `key`; where it is absent or null, `default`. InputError for what is not sound."""
    value = raw.get(key)
    if value is not None and not is_sound(value):
        raise InputError(f"{where}: {key}={value!r} is not a value that it can have; correct the file")
    return default if value is None else value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300


def _refuse_foreign(raw: dict[str, Any], where: str) -> None:
    """InputError unless the raw config is that of a plain Llama, causal or with one label."""
    if {"total_steps", "tokenizer_files"} <= raw.keys():
        raise InputError(f"{where}: a run of easyrm, not a model; give its export, or make one with easyrm.convert")
    if raw.get("model_type") != "llama":
        raise InputError(f"{where}: model_type={raw.get('model_type')!r} is not supported; give a model of type llama")
    architectures = _value(raw, "architectures", [], lambda value: isinstance(value, list), where)
    if architectures and not any(known in architectures for known in _ARCHITECTURES):
        raise InputError(f"{where}: architectures={architectures} is not supported; give {' or '.join(_ARCHITECTURES)}")
    for key, only in _ONLY.items():
        value = raw.get(key)
        if value is not None and value != only:
            raise InputError(f"{where}: {key}={json.dumps(value)} is not supported; give a model with {key}={only}")
    for key in _REQUIRED:
        if not _is_size(raw.get(key)):
            raise InputError(f"{where}: {key}={raw.get(key)!r} is not a positive 32-bit integer; correct the file")
    _value(raw, "id2label", {}, lambda value: isinstance(value, dict), where)
    if is_classifier(raw) and num_labels(raw) != 1:
        raise InputError(
            f"{where}: num_labels={num_labels(raw)}, and a reward model has 1; give a classifier with one label, "
            f"or the causal model it was made from"
        )


def _rope(raw: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either generation of keys; scaling is None where frequencies are not scaled."""
    tables = [_value(raw, key, {}, lambda value: isinstance(value, dict), where) for key in _ROPE_KEYS]
    found = tables[0] or tables[1]
    default = _value(raw, "rope_theta", 10000.0, _is_positive, where)
    theta = float(_value(found, "rope_theta", default, _is_positive, where))
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        raise InputError(f"{where}: rope_type={kind!r} is not supported; give a model with default, linear or llama3")
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{where}: partial_rotary_factor={found['partial_rotary_factor']} is not supported; "
            f"give a model that rotates whole heads"
        )
    for key in _ROPE_SCALING[kind]:
        if not _is_positive(found.get(key)):
            raise InputError(
                f"{where}: rope_type={kind!r} needs the positive number {key}, found {found.get(key)!r}; add it"
            )
    return theta, {"rope_type": kind, **{key: found[key] for key in _ROPE_SCALING[kind]}}


def exported_config(config: LlamaConfig, raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of an exported reward model, for transformers 4.51 and 5.

    `raw` gives `bos_token_id`, `eos_token_id` and `pad_token_id` (those of the tokenizer it was trained with); `dtype`
    is that of the weights, bf16 or fp32. RoPE goes into the top-level keys of transformers 4, which 5 reads too; 5's
    own `rope_parameters` would be ignored by 4 without a word. Raises InputError where the pad id is missing, outside
    the vocabulary, or an EOS: with pad = EOS transformers would pool the reward at the wrong token.
    """
    pad, eos = raw.get("pad_token_id"), raw.get("eos_token_id")
    if eos is None:
        raise InputError("eos_token_id is not known; export with a tokenizer that has an EOS token")
    if type(pad) is not int or not 0 <= pad < config.vocab_size:
        raise InputError(
            f"pad_token_id={pad} is not a token of the model's {config.vocab_size}; choose one with --data.pad_token"
        )
    if pad in (eos if isinstance(eos, list) else [eos]):
        raise InputError(f"pad_token_id={pad} is also the EOS token; choose another with --data.pad_token")
    return {
        "architectures": [CLASSIFIER],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "id2label": {"0": "LABEL_0"},
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "label2id": {"LABEL_0": 0},
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": pad,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": config.rope_scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": TORCH_DTYPES[dtype],
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }


def write_config(directory: epath.PathLike, config: LlamaConfig, raw: dict[str, Any], dtype: str) -> None:
    """Writes `exported_config(...)` as config.json into an existing directory."""
    text = json.dumps(exported_config(config, raw, dtype), indent=2) + "\n"
    (epath.Path(directory) / "config.json").write_text(text)
