"""A model that EasyLM trained as a Hugging Face directory: its names, its order of rotated pairs, its values.

EasyLM's kernels are [in, out] as ours. Its RoPE rotates neighbouring columns of a head, 2j and 2j + 1, where Hugging
Face's rotates j and j + head_dim / 2: the columns of queries and keys change places, head by head.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

import easyrm
from easyrm.data.template import render
from easyrm.data.tokenizer import Tokenizer
from easyrm.digests import add_part
from easyrm.errors import InputError
from easyrm.file_digests import write_digests
from easyrm.hf.config import exported_config
from easyrm.hf.directory import DTYPES as OUTPUT_DTYPES
from easyrm.hf.directory import (
    finish_directory,
    plan_shards,
    refuse_existing,
    save_shard,
    staging_directory,
    write_index,
)
from easyrm.hf.easylm_file import DTYPES, EasyLMFile
from easyrm.hf.names import LM_HEAD_PATH, SCORE_PATH, Weight, weights
from easyrm.hf.tokenizer import check_tokenizer, write_tokenizer
from easyrm.models.config import LlamaConfig

# Smaller than an export's: a shard is held until it is written, and a laptop is to do.
MAX_SHARD_BYTES = 2 * 10**9
# Rows at once: a transposed write of few rows stays in the processor's cache.
_ROW_BLOCK = 64

_BLOCK = "transformer/h/{i}/"
_KEYS = {
    "model/embed_tokens/weight": "transformer/wte/embedding",
    "model/norm/weight": "transformer/ln_f/kernel",
    "model/layers/input_layernorm/weight": _BLOCK + "attention_norm/kernel",
    "model/layers/post_attention_layernorm/weight": _BLOCK + "ffn_norm/kernel",
    "model/layers/self_attn/q_proj/kernel": _BLOCK + "attention/wq/kernel",
    "model/layers/self_attn/k_proj/kernel": _BLOCK + "attention/wk/kernel",
    "model/layers/self_attn/v_proj/kernel": _BLOCK + "attention/wv/kernel",
    "model/layers/self_attn/o_proj/kernel": _BLOCK + "attention/wo/kernel",
    "model/layers/mlp/gate_proj/kernel": _BLOCK + "feed_forward/w1/kernel",
    "model/layers/mlp/up_proj/kernel": _BLOCK + "feed_forward/w3/kernel",
    "model/layers/mlp/down_proj/kernel": _BLOCK + "feed_forward/w2/kernel",
    SCORE_PATH: "score/kernel",
    LM_HEAD_PATH: "lm_head/kernel",
}
_SCORE = _KEYS[SCORE_PATH]
_EXAMPLES = (
    [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "It is 42.\n\n- déjà vu"}],
    [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "Hi!"}],
)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a Hugging Face tensor comes from: EasyLM's key, our leaf, its layer, and the heads to be reordered."""

    key: str
    path: str
    layer: int
    weight: Weight
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As EasyLM stores it, which is one layer of our leaf."""
        return self.weight.leaf_shape[1:] if self.weight.layers else self.weight.leaf_shape


def import_model(
    checkpoint: str,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    output: str | epath.PathLike,
    *,
    dtype: str,
    say: Callable[[str], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model in `checkpoint` (KIND::PATH, see EasyLMFile) into the new directory `output`, as `export` does.

    With a score head it becomes a reward model with digests.json, else a causal model. `dtype` is bf16 or fp32.
    The host holds one shard, at most `max_shard_bytes` or one larger tensor, and a few MB. Raises InputError, before
    anything is written, for a file that cannot be read, and naming every missing, unexpected and mis-shaped array; and
    for a value that is not finite, after which nothing is left of a local `output`.
    """
    output = refuse_existing(output)
    settings = _config_json(config, tokenizer, dtype)
    file = EasyLMFile(checkpoint)
    causal = _SCORE not in file.arrays
    sources = _sources(config, causal)
    _check_arrays(file, sources)
    count, size = file.skipped
    if count:
        say(f"skipped {count} entries that are not the model's but the optimizer's, {size} bytes")
    say(
        f"{'a causal model' if causal else 'a reward model'} of {len(sources)} tensors; as --config says, "
        f"rms_norm_eps {config.rms_norm_eps:g}, rope_theta {config.rope_theta:g}, rope_scaling {config.rope_scaling}"
    )
    if causal:
        settings = {key: value for key, value in settings.items() if key not in ("id2label", "label2id")}
        settings |= {"architectures": ["LlamaForCausalLM"], "use_cache": True}
    digests = dict.fromkeys((source.path for source in sources.values()), "00000000")

    plan = plan_shards(config, dtype, max_shard_bytes, causal=causal)
    with staging_directory(output) as staging:
        for name, tensors in _shards(file, plan, sources, digests, dtype, say):
            save_shard(staging, output, name, tensors)
            del tensors  # else it would be held while the next shard is made
        write_index(staging, config, dtype, max_shard_bytes, causal=causal)
        write_tokenizer(tokenizer, staging, config.max_position_embeddings)
        check_tokenizer(staging, tokenizer, [render(chat, tokenizer.bos, tokenizer.eos) for chat in _EXAMPLES])
        (staging / "README.md").write_text(_card(output.name, dtype, causal), encoding="utf-8")
        (staging / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if not causal:  # of a causal model, the digests' reader would miss the score head
            write_digests(staging, digests)
        finish_directory(staging, output)
    say(f"imported to {output} ({dtype})")


def _config_json(config: LlamaConfig, tokenizer: Tokenizer, dtype: str) -> dict:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    for name, token in ids.items():
        if token is not None and token >= config.vocab_size:
            raise InputError(
                f"--tokenizer: {name}={token} is beyond the model's vocab_size={config.vocab_size}; "
                "give the tokenizer that the model was trained with"
            )
    return exported_config(config, ids, dtype)


def _sources(config: LlamaConfig, causal: bool) -> dict[str, _Source]:
    """By Hugging Face's tensor name."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return {
        name: _Source(_KEYS[path].format(i=layer), path, layer, weight, heads.get(path.split("/")[-2], 0))
        for path, weight in weights(config, causal=causal).items()
        for layer, name in enumerate(weight.names)
    }


def _check_arrays(file: EasyLMFile, sources: dict[str, _Source]) -> None:
    """InputError that names all arrays which are missing, not expected, or of another shape or dtype."""
    problems, expected = [], {source.key: source.shape for source in sources.values()}
    for key, shape in expected.items():
        array = file.arrays.get(key)
        if array is None:
            head = f", nor is there the {_SCORE} of a reward model" if key == _KEYS[LM_HEAD_PATH] else ""
            problems.append(f"missing {key} {list(shape)}{head}")
        elif array.shape != shape:
            problems.append(f"mis-shaped {key} {list(array.shape)}, expected {list(shape)}")
        elif array.dtype not in DTYPES:
            problems.append(f"{key} has dtype {array.dtype}, expected one of {', '.join(DTYPES)}")
    problems += [f"unexpected {key} {list(file.arrays[key].shape)}" for key in file.arrays if key not in expected]
    if problems:
        raise InputError(f"{file.path}: does not fit --config; correct either one: {'; '.join(problems)}")


def _shards(
    file: EasyLMFile,
    plan: dict[str, list[str]],
    sources: dict[str, _Source],
    digests: dict[str, str],
    dtype: str,
    say: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (file name, its tensors), and adds to the `digests` of our leaves what was read."""
    for name, names in plan.items():
        start = time.monotonic()
        tensors = {}
        for tensor in names:
            tensors[tensor] = _read_tensor(file, sources[tensor], digests, OUTPUT_DTYPES[dtype])
        size, seconds = sum(tensor.nbytes for tensor in tensors.values()) / 1e6, time.monotonic() - start
        say(f"{name}: {len(tensors)} tensors, {size:.1f} MB read and converted in {seconds:.1f} s")
        yield name, tensors


def _read_tensor(file: EasyLMFile, source: _Source, digests: dict[str, str], dtype: np.dtype) -> np.ndarray:
    """One tensor as Hugging Face stores it."""
    tensor = np.empty(source.weight.shape, dtype)
    target = tensor.T if source.weight.transposed else tensor
    row_size, before = math.prod(source.shape[1:]), source.layer * math.prod(source.shape)
    for first, stored in file.rows(source.key):
        rows = stored.astype(dtype, copy=False)
        values = rows.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            _refuse_value(file, source.key, values, first * row_size, dtype)
        if source.heads:
            rows = _half_split(rows, source.heads)
            values = rows.astype(np.float32, copy=False)
        digests[source.path] = add_part(digests[source.path], values, before + first * row_size)
        for at in range(0, len(rows), _ROW_BLOCK):
            block = rows[at : at + _ROW_BLOCK]
            target[first + at : first + at + len(block)] = block
    return tensor


def _half_split(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a kernel with each head's columns 0, 1, 2, 3 ... in the order 0, 2 ... 1, 3 ..."""
    pairs = kernel.reshape(len(kernel), heads, -1, 2)
    return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(kernel.shape)


def _refuse_value(file: EasyLMFile, key: str, values: np.ndarray, before: int, dtype: np.dtype) -> None:
    element = int(np.argmin(np.isfinite(values)))
    raise InputError(
        f"{file.path}: {key} at byte {file.byte_of(key, before + element)}: expected a finite number, found "
        f"{values.reshape(-1)[element]} in {np.dtype(dtype).name}; get the file again"
    )


def _card(name: str, dtype: str, causal: bool) -> str:
    use = (
        "A causal language model (`LlamaForCausalLM`) without a reward head."
        if causal
        else "A scalar reward model (`LlamaForSequenceClassification`, one label). The reward is read at the last "
        "token, the EOS of the conversation; the tokenizer's chat template writes it, and BOS."
    )
    return (
        f"# {name or 'model'}\n\n{use}\n\nImported from an EasyLM checkpoint by easyrm {easyrm.__version__}; weights "
        f"{dtype}. How it was trained, on what and under which licence is not recorded in the checkpoint.\n"
    )
