"""No code from outside is run, and damage never gives another model in silence."""

import ast
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from toy_tokenizer import write_byte_level

from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError
from easyrm.hf.export import export
from easyrm.hf.safetensors import Checkpoint
from easyrm.hf.source import ModelSource
from easyrm.hf.tokenizer import write_tokenizer
from easyrm.models.config import LlamaConfig
from easyrm.models.reward import RewardModel
from easyrm.sharding import make_mesh
from easyrm.training.program import abstract_model

ROOT = Path(__file__).resolve().parents[1]

_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
_CALLS = {"eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
_CALLS |= {"torch.load", "np.load", "numpy.load"}
_KEYWORDS = {"allow_pickle", "shell", "trust_remote_code"}


def violations(source: str) -> list[str]:
    """What in a Python file unpickles, evaluates text, asks for a shell or for remote code, or unpacks unfiltered."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name.split(".")[0] in _MODULES or name in _CALLS]
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append("trust_remote_code")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [name] if name in _CALLS else []
            found += [keyword for keyword in _KEYWORDS & set(given) if given[keyword] != "False"]
            if name.split(".")[-1] in ("extractall", "unpack_archive") and given.get("filter") != "'data'":
                found.append(name)
    return found


def test_no_source_file_runs_what_it_reads():
    files = [
        file for folder in ("easyrm", "demo", "benchmarks", "tpu_launch") for file in ROOT.glob(f"{folder}/**/*.py")
    ]
    assert len(files) > 50
    assert {file.name: found for file in files if (found := violations(file.read_text()))} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import dill.source",
        "x = eval('1')",
        "exec(text)",
        "import torch\nx = torch.load(path)",
        "np.load(path)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "from os import system",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "archive.extractall(path)",
    ],
)
def test_a_planted_violation_is_caught(planted):
    assert len(violations(planted)) == 1
    quoted = f'"""{planted}"""\nmodel.eval()\nsubprocess.run(["ls"], shell=False)\nfile.extractall(to, filter="data")\n'
    assert violations(quoted) == []


CONFIG = LlamaConfig(12, 4, 6, 2, 2, 1)


@pytest.fixture(scope="module", params=[10**9, 300], ids=["one file", "shards"])
def exported(request, tmp_path_factory):
    """A small export with a byte-level tokenizer, in one file of weights or in several with an index."""
    folder = tmp_path_factory.mktemp("safety")
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda key: RewardModel(CONFIG, nnx.Rngs(key)), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype("f4")), abstract)
    tokenizer = load_tokenizer(str(write_byte_level(folder / "tokenizer")))
    export(
        params,
        CONFIG,
        folder / "hf",
        raw_config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        write_tokenizer=lambda directory: write_tokenizer(tokenizer, directory, 64),
        card="# A card\n",
        dtype="bf16",
        max_shard_bytes=request.param,
    )
    assert (folder / "hf" / "model.safetensors").exists() == (request.param == 10**9)
    return folder / "hf"


@pytest.fixture(scope="module")
def abstract():
    return abstract_model(CONFIG, make_mesh("1,1,1", jax.devices()[:1]))


def load_all(directory, abstract):
    """(config, raw config, tokenizer, parameters) as `easyrm.score` gets them; only the tried shape is compiled."""
    source = ModelSource(str(directory), "")
    tokenizer = load_tokenizer(str(directory))
    if source.config != CONFIG:
        return source.config, source.raw, tokenizer, None
    return source.config, source.raw, tokenizer, source.load(abstract, score_std=0.0, seed=0)


def same(one, other):
    """Whether two results of `load_all` agree, bit for bit."""
    same_words = one[:3] == other[:3] and tokens(one[2]) == tokens(other[2])
    leaves = [jax.tree.leaves(result[3]) for result in (one, other)]
    return same_words and all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def tokens(tokenizer):
    return tokenizer.encode_batch(["<|begin_of_text|><|user|>\nthe cat \x00é<|end_of_text|>", "that reward"])


def damages(data: bytes, tries: int):
    """(what was done, damaged contents) at the first 8 bytes, over all the file, and at its end."""
    places = sorted({*range(min(8, len(data))), *np.linspace(0, len(data) - 1, tries, dtype=int).tolist()})
    for number, at in enumerate(places):
        yield f"cut at {at}", data[:at]
        for bit in {number % 8, (3 * number + 1) % 8}:
            yield f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def outcome(file, contents, attempt):
    """What `attempt()` gives with `file` changed (None: removed), or the InputError's text; puts the file back."""
    before = file.read_bytes()
    file.unlink() if contents is None else file.write_bytes(contents)
    try:
        return attempt()
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    finally:
        file.write_bytes(before)


def test_a_damaged_export_is_refused_or_loads_the_same(exported, abstract):
    """Files on which nothing that we compute depends (README.md, the template for others) may be lost."""
    good = load_all(exported, abstract)
    refused = 0
    for file in sorted(exported.iterdir()):
        data = file.read_bytes()
        for what, contents in [("removed", None), ("empty", b""), *damages(data, 60)]:
            found = outcome(file, contents, lambda: load_all(exported, abstract))
            if isinstance(found, str):
                refused += 1
            else:
                assert same(found, good), f"{file.name}, {what}: another model, in silence"
                harmless = file.name in ("README.md", "digests.json") or contents is None
                assert harmless or file.suffix == ".safetensors", f"{file.name}, {what}: went unseen"
    assert refused > 500
    assert same(load_all(exported, abstract), good)


def test_without_digests_damage_is_refused_or_loads(exported, abstract, tmp_path):
    """As of a foreign checkpoint: no other exception escapes, and what digests.json is for is shown."""
    foreign = shutil.copytree(exported, tmp_path / "foreign")
    (foreign / "digests.json").unlink()
    good, silent = load_all(foreign, abstract), []
    assert same(good, load_all(exported, abstract))
    for file in sorted(foreign.glob("*[ngs].json")) + sorted(foreign.glob("*.safetensors")):
        if file.name == "tokenizer.json":
            continue
        for what, contents in [("removed", None), ("empty", b""), *damages(file.read_bytes(), 60)]:
            found = outcome(file, contents, lambda: load_all(foreign, abstract))
            if not isinstance(found, str) and not (found[3] is not None and same(found, good)):
                silent.append((file.suffix, what))
    assert {suffix for suffix, _ in silent} >= {".safetensors"}


def test_every_flipped_bit_of_a_weight_is_seen(exported, abstract):
    file = sorted(exported.glob("*.safetensors"))[0]
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in range(start, len(data), 7):
        for bit in (0, 7):
            contents = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            message = outcome(file, contents, lambda: load_all(exported, abstract))
            assert "digests.json" in message or "finite" in message


def test_a_refusal_names_the_file_or_the_parameter_and_the_way_out(exported, abstract):
    config = (exported / "config.json").read_text()
    attempt = lambda: load_all(exported, abstract)  # noqa: E731
    theta = outcome(exported / "config.json", config.replace("10000.0", "10001.0").encode(), attempt)
    assert "config.json: not the file that digests.json" in theta
    assert "remove digests.json if the change is meant" in theta
    digests = json.loads((exported / "digests.json").read_text())
    digests["parameters"]["model/norm/weight"] = "00000000"
    assert "model/norm/weight" in outcome(exported / "digests.json", json.dumps(digests).encode(), attempt)
    assert "damaged" in outcome(exported / "digests.json", b'{"format": 1, "files": {}, "parameters": {}}', attempt)
    escape = digests | {"files": {**digests["files"], "../../secret": "0" * 64}}
    assert "damaged" in outcome(exported / "digests.json", json.dumps(escape).encode(), attempt)
    assert "format=2" in outcome(exported / "digests.json", b'{"format": 2}', attempt)


def test_parameters_that_are_not_finite_are_refused(exported, abstract, tmp_path):
    foreign = shutil.copytree(exported, tmp_path / "foreign")
    (foreign / "digests.json").unlink()
    file, entry = next((e.file, e) for name, e in Checkpoint(foreign).entries.items() if name == "model.norm.weight")
    data = Path(file).read_bytes()
    for word in (0x7FC0, 0x7F80):  # NaN, infinity
        contents = data[: entry.start] + word.to_bytes(2, "little") + data[entry.start + 2 :]
        message = outcome(Path(file), contents, lambda: load_all(foreign, abstract))
        assert "model/norm/weight holds what is not a finite number" in message


def test_links_as_the_hub_cache_makes_them_are_followed(tmp_path, exported, abstract):
    blobs, snapshot = shutil.copytree(exported, tmp_path / "blobs"), tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert same(load_all(snapshot, abstract), load_all(exported, abstract))
