"""A damaged, hostile or foreign EasyLM file is refused with one line, before anything is written."""

import json
import pickle
import re

import msgpack
import numpy as np
import pytest
from easylm_ancestor import make_arrays, tree, write_stream
from flax import serialization
from runs import make_tokenizer

from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError
from easyrm.hf.easylm import import_model
from easyrm.hf.easylm_file import EasyLMFile
from easyrm.models.config import SIZES, LlamaConfig

CONFIG = LlamaConfig(320, 16, 24, 1, 2, 1)
ARRAYS = make_arrays(CONFIG)
HEAD = "score/kernel"
WTE = "transformer/wte/embedding"
WQ = "transformer/h/0/attention/wq/kernel"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")))


def refusal(checkpoint, tokenizer, tmp_path, config=CONFIG, dtype="fp32"):
    """The one line that refuses a checkpoint; nothing may be left of the output."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as refused:
        import_model(checkpoint, config, tokenizer, tmp_path / "hf", dtype=dtype, say=lambda line: None)
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def entry(key, value):
    """One object of a stream; `value` are bytes, or what flax makes them of."""
    data = value if isinstance(value, bytes) else serialization.to_bytes(value)
    return msgpack.packb((tuple(key.split("/")), data))


def stream(**changed):
    """A sound stream with some values replaced, or left out where they are None; keys with _ for /."""
    changed = {key.replace("_", "/"): value for key, value in changed.items()}
    values = {**ARRAYS, **changed}
    return b"".join(entry(key, value) for key, value in values.items() if value is not None)


def packed(shape, dtype, values, code=1):
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb((shape, dtype, values))))


def test_the_sound_stream_is_taken(tmp_path, tokenizer):
    (tmp_path / "p").write_bytes(stream())
    import_model(f"params::{tmp_path / 'p'}", CONFIG, tokenizer, tmp_path / "hf", dtype="fp32", say=lambda line: None)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"]


def nan_at(key, index, value=np.nan):
    array = ARRAYS[key].copy()
    array[index] = value
    return array


CHUNKED = {"__msgpack_chunked_array__": True, "shape": {"0": 16, "1": 1}, "chunks": {"0": np.ones(16, np.float32)}}
DAMAGED = {
    "empty": (b"", "holds no array"),
    "cut within values": (stream()[:-9], r"score/kernel at byte \d+: expected \d+ bytes of bytes, found \d+: cut off"),
    "cut within a key": (stream() + entry(HEAD, b"")[:4], r"entry 12 at byte \d+: expected 5 bytes of a part of a key"),
    "a pickle": (pickle.dumps(ARRAYS, protocol=4), "entry 0 at byte 0: expected an array of key and value, found map"),
    "text": (b"not a checkpoint", "entry 0 at byte 0: expected an array of key and value, found int"),
    "a huge length": (stream() + b"\x92\x91\xa1x\xc6\xff\xff\xff\xff", "x at byte .* 4294967295 bytes .*found 0: cut"),
    "a huge text": (stream() + b"\x92\x91\xdb\xff\xff\xff\xff", "a part of a key, found str of 4294967295"),
    "many key parts": (b"\x92\xdd\xff\xff\xff\xff", "parts of a key, found array of 4294967295"),
    "a number for a key": (b"\x92\x91\x07\xc4\x00", "a part of a key, found int"),
    "a key with an escape": (entry("a\x1b[2J", b""), "expected a part of a key, found b'a"),
    "an unused byte": (b"\x92\xc1", "a byte that MessagePack does not use"),
    "a key twice": (stream() + entry(HEAD, ARRAYS[HEAD]), r"score/kernel at byte \d+: expected each key once"),
    "a key twice, with params": (stream() + entry(f"params/{HEAD}", ARRAYS[HEAD]), "score/kernel is there twice"),
    "whole and in chunks": (stream() + entry(f"{HEAD}/chunk_0", b"x"), "each key once"),
    "a chunk is missing": (stream(score_kernel=None) + entry(f"{HEAD}/chunk_1", b"x"), "score/kernel .* no chunk_0"),
    "a chunk twice": (stream(score_kernel=None) + 2 * entry(f"{HEAD}/chunk_1", b"x"), "each key once"),
    "no array": (
        stream(score_kernel=msgpack.packb("x")),
        "score/kernel at byte .* a map or an array of flax, found str",
    ),
    "an unknown ext type": (stream(score_kernel=packed((16, 1), "float32", b"\0" * 64, 9)), "ext type 1.*ext type 9"),
    "a scalar": (stream(score_kernel=np.float32(3)), "expected ext type 1, an array, found ext type 3"),
    "values that are too few": (stream(score_kernel=packed((16, 1), "float32", b"\0" * 60)), r"64 bytes .*found 60"),
    "a negative size": (stream(score_kernel=packed((-16, 1), "float32", b"")), "a size, found negative int"),
    "a rank of nine": (stream(score_kernel=packed((1,) * 9, "float32", b"\0" * 4)), "a shape, found array of 9"),
    "more than an array": (stream(score_kernel=serialization.to_bytes(ARRAYS[HEAD]) + b"x"), "found 1 more bytes"),
    "chunks of another size": (stream(score_kernel=CHUNKED | {"shape": {"0": 15, "1": 1}}), "15 elements of one dtype"),
    "chunks out of order": (stream(score_kernel=CHUNKED | {"chunks": {"1": np.ones(16)}}), "the key '0', found '1'"),
    "nan": (stream(score_kernel=nan_at(HEAD, 5)), r"score/kernel at byte \d+: expected a finite number, found nan"),
    "deep": (stream(score_kernel=msgpack.packb(tree({"/".join("a" * 40): 1}))), "a map or an array of flax, found map"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path, tokenizer, name):
    content, message = DAMAGED[name]
    (tmp_path / "p").write_bytes(content)
    line = refusal(f"params::{tmp_path / 'p'}", tokenizer, tmp_path)
    assert line.startswith(f"{tmp_path / 'p'}: ")
    assert re.search(message, line), line


def test_where_a_value_is_not_finite(tmp_path, tokenizer):
    wq = nan_at(WQ, (11, 7), -np.inf)
    content = stream(**{WQ.replace("/", "_"): wq})
    (tmp_path / "p").write_bytes(content)
    at = content.index(np.float32(-np.inf).tobytes(), content.index(b"wq"))
    line = refusal(f"params::{tmp_path / 'p'}", tokenizer, tmp_path)
    assert f"{WQ} at byte {at}: expected a finite number, found -inf in float32" in line
    (tmp_path / "p").write_bytes(stream(score_kernel=nan_at(HEAD, 3, 3.4e38)))  # finite until it is rounded
    assert "found inf in bfloat16" in refusal(f"params::{tmp_path / 'p'}", tokenizer, tmp_path, dtype="bf16")


def test_all_that_does_not_fit_is_named_together(tmp_path, tokenizer):
    arrays = {key: value for key, value in ARRAYS.items() if key != WQ}
    arrays |= {"transformer/h/1/ffn_norm/kernel": np.ones(16, np.float32), HEAD: np.ones((16, 2), np.float32)}
    arrays |= {
        "transformer/ln_f/kernel": np.ones(16),
        "transformer/wte/embedding": ARRAYS["transformer/wte/embedding"].T,
    }
    line = refusal(f"params::{write_stream(tmp_path / 'p', arrays)}", tokenizer, tmp_path)
    for problem in (
        f"missing {WQ} [16, 16]",
        "mis-shaped score/kernel [16, 2], expected [16, 1]",
        "mis-shaped transformer/wte/embedding [16, 320], expected [320, 16]",
        "transformer/ln_f/kernel has dtype float64, expected one of bfloat16, float16, float32",
        "unexpected transformer/h/1/ffn_norm/kernel [16]",
    ):
        assert problem in line
    assert line.count(";") == 5


def test_what_was_asked_for_wrongly(tmp_path, tokenizer):
    plain, state = write_stream(tmp_path / "p", ARRAYS), tmp_path / "s"
    write_stream(state, ARRAYS, "params/params/", [("opt_state/0/count", np.int32(3))])
    for checkpoint, message in {
        plain: "give KIND::PATH",
        f"pickle::{plain}": "KIND is params, trainstate_params, trainstate, flax_params",
        f"params::{tmp_path / 'q'}": "no such file",
        f"params::{tmp_path}": "a directory; give the file",
        f"params::{state}": f"holds a train state; give trainstate_params::{state}",
        f"trainstate::{plain}": f"is it params::{plain}?",
        f"flax_params::{plain}": "byte 0: expected a map, as flax_params files are, found array",
    }.items():
        assert message in refusal(checkpoint, tokenizer, tmp_path)
    line = refusal(f"params::{plain}", tokenizer, tmp_path, LlamaConfig(300, 16, 24, 1, 2, 1))
    assert "mis-shaped transformer/wte/embedding" in line
    line = refusal(f"params::{plain}", tokenizer, tmp_path, LlamaConfig(2, 16, 24, 1, 2, 1))
    assert "eos_token_id=2 is beyond the model's vocab_size=2" in line
    assert "missing transformer/h/39/" in refusal(f"params::{plain}", tokenizer, tmp_path, SIZES["llama2-13b"])


@pytest.mark.parametrize("kind", ["params", "flax_params"])
def test_no_single_damage_is_a_crash(tmp_path, kind):
    path = tmp_path / "p"
    content = stream() if kind == "params" else serialization.to_bytes(tree(ARRAYS))
    places = {*range(60), *np.linspace(0, len(content) - 1, 150, dtype=int).tolist()}
    heads = [content.index(part) + i for part in (b"wq", b"score", b"float32") for i in range(-16, 24)]
    outcomes = {"taken": 0, "refused": 0}
    for at in sorted(places.union(heads)):
        for changed in (bytes([content[at] ^ 1 << (at % 8)]), b"\xdf\xff\xff\xff\xff", b""):
            path.write_bytes(content[:at] + changed + (content[at + len(changed) :] if changed else b""))
            try:
                EasyLMFile(f"{kind}::{path}")
                outcomes["taken"] += 1
            except InputError as error:
                outcomes["refused"] += 1
                assert "\n" not in str(error)
    assert min(outcomes.values()) > 50


def test_a_failing_disk_is_named(tmp_path, tokenizer, monkeypatch):
    checkpoint = f"params::{write_stream(tmp_path / 'p', ARRAYS)}"
    read = EasyLMFile.rows

    def cut_meanwhile(self, name):
        (tmp_path / "p").write_bytes(b"")
        return read(self, name)

    monkeypatch.setattr(EasyLMFile, "rows", cut_meanwhile)
    assert "0 bytes at byte" in refusal(checkpoint, tokenizer, tmp_path)
