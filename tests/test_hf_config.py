"""config.json in and out, against transformers' own reading and writing of it."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers import LlamaConfig as HFLlamaConfig

from easyrm.errors import InputError
from easyrm.hf.config import exported_config, num_labels, read_config, write_config
from easyrm.models.config import SIZES, LlamaConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write(directory: Path, raw: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR])
def test_what_transformers_saves_is_read(tmp_path, scaling):
    saved = HFLlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=77,
        rms_norm_eps=3e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 12345.0},
    )
    saved.save_pretrained(tmp_path)
    config, _ = read_config(tmp_path)
    assert config == LlamaConfig(
        96, 32, 48, 2, 4, 2, 6, 77, 3e-6, 12345.0, scaling, tie_word_embeddings=True, initializer_range=0.02
    )


def test_missing_keys_mean_what_transformers_means(tmp_path):
    config, _ = read_config(write(tmp_path, RAW))
    theirs = AutoConfig.from_pretrained(tmp_path)
    for field in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(theirs, field), field
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rope_scaling is None


def test_keys_of_transformers_4_are_read(tmp_path):
    old = RAW | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}
    config, raw = read_config(write(tmp_path, old) / "config.json")
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 4})
    assert raw == old


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "num_labels=2"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, "labels=3"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, change, named):
    with pytest.raises(InputError) as error:
        read_config(write(tmp_path, RAW | change))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff\xfe"])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(tmp_path)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="no such model"):
        read_config(tmp_path / "absent")


@pytest.mark.parametrize("size", ["llama2-7b", "codellama-7b", "llama3-8b", "llama3.1-70b", "llama3.2-1b"])
def test_the_export_means_the_same_to_transformers_and_to_us(tmp_path, size):
    config = SIZES[size]
    write_config(tmp_path, config, IDS, "bf16")
    theirs = AutoConfig.from_pretrained(tmp_path)
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    assert {key: theirs.rope_parameters[key] for key in rope} == rope
    assert theirs.architectures == ["LlamaForSequenceClassification"]
    assert (theirs.num_labels, theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (1, 0, 1, 2)
    assert str(theirs.dtype) == "torch.bfloat16"
    again, raw = read_config(tmp_path)
    assert again == config
    assert num_labels(raw) == theirs.num_labels
    # transformers 4 reads these two keys at the top level and knows no others.
    assert (raw["rope_theta"], raw["rope_scaling"]) == (config.rope_theta, config.rope_scaling)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ({"pad_token_id": 2}, "also the EOS"),
        ({"pad_token_id": 7, "eos_token_id": [5, 7]}, "also the EOS"),
        ({"pad_token_id": None}, "pad_token_id=None"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"pad_token_id": 32000}, "pad_token_id=32000"),
        ({"eos_token_id": None}, "eos_token_id"),
    ],
)
def test_token_ids_that_would_pool_the_wrong_token_are_refused(ids, named):
    with pytest.raises(InputError, match=named):
        exported_config(SIZES["debug"], IDS | ids, "fp32")


def test_real_configs_are_read(shared):
    config, raw = read_config(shared / "golden" / "init_llama2")
    assert config == LlamaConfig(4096, 128, 384, 2, 4, 2, max_position_embeddings=512)
    assert num_labels(raw) == 1
    config, _ = read_config(shared / "checkpoints" / "stories260K")
    assert config == LlamaConfig(512, 64, 172, 5, 8, 4, 8, max_position_embeddings=512, tie_word_embeddings=True)
