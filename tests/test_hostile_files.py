"""Headers, indexes and configurations made to mislead are refused in one line, whatever is in them."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file
from test_hf_config import RAW

from easyrm.errors import InputError
from easyrm.hf.config import read_config
from easyrm.hf.safetensors import Checkpoint, read_header


def header_of(path, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return epath.Path(path)


def tensor(start, stop, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


UNSOUND = {
    "overlap": {"a": tensor(0, 12, [3]), "b": tensor(8, 16, [2])},
    "the same span twice": {"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])},
    "a gap": {"a": tensor(0, 4, [1]), "b": tensor(8, 16, [2])},
    "bytes of no tensor": {"a": tensor(0, 8, [2])},
    "too long": {"a": tensor(0, 32, [8])},
    "past the end": {"a": tensor(8, 24, [4])},
    "negative start": {"a": tensor(-8, 8, [4])},
    "backwards": {"a": tensor(16, 0, [4])},
    "negative shape": {"a": tensor(0, 16, [-2, -2])},
    "huge product": {"a": tensor(0, 16, [2**62, 2**62, 2**62])},
    "huge size": {"a": tensor(0, 16, [2**64 + 4])},
    "huge rank": {"a": tensor(0, 16, [1] * 4000 + [4])},
    "float shape": {"a": tensor(0, 16, [4.0])},
    "float span": {"a": tensor(0.0, 16.0, [4])},
    "boolean span": {"a": tensor(False, 16, [4])},
    "scalar shape": {"a": tensor(0, 16, 4)},
    "no shape": {"a": tensor(0, 16, None)},
    "number as dtype": {"a": tensor(0, 16, [4], dtype=7)},
    "list as dtype": {"a": tensor(0, 16, [4], dtype=["F32"])},
    "no span": {"a": {"dtype": "F32", "shape": [4]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}},
    "two lines in a name": {"a\nb": tensor(0, 16, [4])},
    "a list": {"a": [0, 16]},
    "a name twice": b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": 1}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "another encoding": b"\xff\xfe{}",
    "nothing": b"",
    "a number": b"1e999",
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("what", UNSOUND)
def test_a_header_that_is_not_sound_is_refused(tmp_path, what):
    with pytest.raises(InputError, match=r"model\.safetensors: ") as error:
        read_header(header_of(tmp_path / "model.safetensors", UNSOUND[what]))
    assert "\n" not in str(error.value)


def test_a_sound_header_is_read(tmp_path):
    header = {"b": tensor(8, 16, [1, 2]), "a": tensor(0, 8, [2]), "none": tensor(0, 0, [0]), "__metadata__": {}}
    assert {name: entry.shape for name, entry in read_header(header_of(tmp_path / "x", header)).items()} == {
        "a": (2,),
        "b": (1, 2),
        "none": (0,),
    }


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd",
        "../secret.safetensors",
        "sub/x.safetensors",
        "..\\x",
        "..",
        ".",
        "",
        "a\nb",
        "a\0b",
        5,
        None,
        ["x"],
    ],
)
def test_an_index_cannot_lead_out_of_its_directory(tmp_path, file):
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (tmp_path / "hf").mkdir()
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: weight_map names ") as error:
        Checkpoint(tmp_path / "hf")
    assert repr(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": np.zeros(2, np.float32)}, tmp_path / name)
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    save_file({"x": np.ones(2, np.float32), "y": np.zeros(1, np.float32)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"b\.safetensors: holds x, as another file does"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "value", [None, True, "4", -1, 0, 0.5, float("nan"), 10**400, [], ["x"], {}, {"x": 1}], ids=str
)
def test_a_config_of_any_types_is_read_or_refused(tmp_path, value):
    """No other exception; and what is read has the types that the arithmetic needs."""
    keys = {*RAW, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"}
    keys |= {"rope_scaling", "rope_parameters", "tie_word_embeddings", "initializer_range", "id2label", "num_labels"}
    keys |= {"attention_bias", "hidden_act", "partial_rotary_factor", "quantization_config"}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "type": "linear", "partial_rotary_factor": 1.0}
    changes = [{key: value} for key in keys] + [{"rope_scaling": rope | {key: value}} for key in rope]
    changes += [change | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1} for change in changes]
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps(RAW | change))
        try:
            config, _ = read_config(tmp_path)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        assert all(type(size) is int and 0 < size < 2**31 for size in (config.head_dim, config.num_key_value_heads))
        assert config.rope_theta > 0 and config.rms_norm_eps > 0
