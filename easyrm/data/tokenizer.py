"""Text to token ids, by a tokenizer file used exactly as it is.

transformers is not asked: its version 5 rebuilds Llama tokenizers on loading and thereby changes their ids.
"""

import contextlib
import dataclasses
import functools
import tempfile
from typing import Any

import tokenizers
from etils import epath

from easyrm.data.retry import may_pass
from easyrm.data.sentencepiece_model import SentencePieceModel
from easyrm.data.token_bound import longest_token
from easyrm.errors import InputError, Unavailable, one_line
from easyrm.file_digests import TOKENIZER_FILES, check_files
from easyrm.strict_json import read_object

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "digests.json")
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<unk>", "<|reserved_special_token_0|>")
_CHOOSES_PAD = "--data.pad_token=... of train_rm, or pad_token in its tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Token strings and ids; equal if it says the same of every special token and has as many ids.

    `bos` and `unk` are "" where there is none, their ids None. `vocab_size` is 1 + the largest id. `pad_reason` is a
    phrase saying by which rule the pad token was chosen.
    """

    bos: str
    eos: str
    pad: str
    unk: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int
    pad_reason: str = dataclasses.field(compare=False)
    model: tokenizers.Tokenizer | SentencePieceModel = dataclasses.field(compare=False, repr=False)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters that one token covers at most; 0 where no such bound can be proved."""
        return longest_token(self.model)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; the strings of special tokens are parsed as these, and nothing is added."""
        if isinstance(self.model, SentencePieceModel):
            return self.model.encode_batch(texts)
        return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]


def load_tokenizer(source: str, pad_token: str = "") -> Tokenizer:
    """Loads a `tokenizer.model`, a Hugging Face directory, a hub name (`[hf://]org/name`) or a `gs://` directory.

    The pad token is `pad_token`, or the configured one, or the first of `<|finetune_right_pad_id|>`, `<unk>`,
    `<|reserved_special_token_0|>` in the vocabulary. Raises InputError if the source is missing or damaged, if it has
    no EOS, if there is no pad token or if it is EOS: padding would then hide where a conversation ends; Unavailable if
    the hub says that it cannot give it now.
    """
    with contextlib.ExitStack() as stack:
        return _load(_fetch(source, stack), source, pad_token)


def _load(path: epath.Path, source: str, pad_token: str) -> Tokenizer:
    if path.name == "tokenizer.json":
        path = path.parent
    if path.is_dir():
        check_files(path, TOKENIZER_FILES)
    configured = _configured(path) if path.is_dir() else {}
    model_file = path / "tokenizer.model" if path.is_dir() else path
    if path.is_dir() and (path / "tokenizer.json").is_file():
        model, special = _load_json(path / "tokenizer.json"), configured
        size = 1 + max(model.get_vocab(with_added_tokens=True).values())
    elif model_file.is_file():
        model = SentencePieceModel(model_file.read_bytes(), str(model_file))
        special, size = {**_sentencepiece_specials(model), **configured}, len(model.pieces)
    else:
        raise InputError(f"tokenizer {source}: neither tokenizer.json nor tokenizer.model in it; name another")
    return _with_specials(source, model, special, size, pad_token)


def _with_specials(source: str, model, special: dict[str, str], size: int, pad_token: str) -> Tokenizer:
    eos = special.get("eos_token", "")
    if not eos:
        raise InputError(f"tokenizer {source}: it has no EOS token; set eos_token in its tokenizer_config.json")
    pad, reason = _choose_pad(source, model, special.get("pad_token", ""), pad_token)
    if pad == eos:
        raise InputError(
            f"tokenizer {source}: the pad token {pad} ({reason}) is also EOS, where the reward is read; "
            f"choose another with {_CHOOSES_PAD}"
        )
    names = {"bos": special.get("bos_token", ""), "eos": eos, "pad": pad, "unk": special.get("unk_token", "")}
    ids = {name: model.token_to_id(token) if token else None for name, token in names.items()}
    for name, token in names.items():
        if token and ids[name] is None:
            way_out = f"choose one with {_CHOOSES_PAD}" if name == "pad" else "mend tokenizer_config.json"
            raise InputError(f"tokenizer {source}: the {name} token {token!r} is not in its vocabulary; {way_out}")
    for token in filter(None, names.values()):
        _mark(model, token)
    unmarked = {"bos_id": ids["bos"], "eos_id": ids["eos"], "pad_id": ids["pad"]}
    return Tokenizer(**names, **unmarked, vocab_size=size, pad_reason=reason, model=model)


def _choose_pad(source: str, model, configured: str, override: str) -> tuple[str, str]:
    if override:
        return override, "as --data.pad_token says"
    if configured:
        return configured, "as the tokenizer's configuration says"
    for token in _PAD_TOKENS:
        if model.token_to_id(token) is not None:
            return token, f"the first of {', '.join(_PAD_TOKENS)} in the vocabulary"
    raise InputError(
        f"tokenizer {source}: it has no pad token, and none of {', '.join(_PAD_TOKENS)}; "
        f"choose a token other than EOS with {_CHOOSES_PAD}"
    )


def _mark(model: tokenizers.Tokenizer | SentencePieceModel, token: str) -> None:
    """Has `token` parsed as special, as transformers does with what a tokenizer_config.json names."""
    if isinstance(model, SentencePieceModel):
        model.mark(token)
    elif token not in {added.content for added in model.get_added_tokens_decoder().values()}:
        model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])


def _load_json(path: epath.Path) -> tokenizers.Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"tokenizer {path}: not a tokenizer file ({error}); fetch the file again") from error
    model.no_truncation()
    model.no_padding()
    return model


def _sentencepiece_specials(model: SentencePieceModel) -> dict[str, str]:
    processor = model.processor
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    ids["unk_token"] = processor.unk_id()
    return {name: model.pieces[i] for name, i in ids.items() if i >= 0}


def _configured(directory: epath.Path) -> dict[str, str]:
    """The special tokens named in the directory; tokenizer_config.json has the last word."""
    special = {}
    for file in (directory / "special_tokens_map.json", directory / "tokenizer_config.json"):
        if not file.is_file():
            continue
        values = read_object(file)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = _content(values.get(name))
            if not isinstance(token, str):
                raise InputError(f"tokenizer {file}: {name} is {token!r}, not a string; fetch the file again")
            if token:
                special[name] = token
    return special


def _content(token: Any) -> Any:
    """A token is written as a string or as {"content": string, ...}."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _fetch(source: str, stack: contextlib.ExitStack) -> epath.Path:
    """A local file or directory with the tokenizer files of `source`; a copy of those of a bucket lives in `stack`."""
    if not source:
        raise InputError("no tokenizer given; use --tokenizer=DIRECTORY, a tokenizer.model or hf://org/name")
    on_hub, name = source.startswith("hf://"), source.removeprefix("hf://")
    path = epath.Path(source)
    if source.startswith("gs://"):
        local = epath.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenizer-")))
        return _copy(path, source, local)
    if not on_hub and path.exists():  # of hf:// epath would ask the hub, though the cache may have it
        return path
    if not on_hub and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError(f"tokenizer {source}: no such file or directory, nor a hub name; check the path")
    import huggingface_hub

    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        if may_pass(error):
            raise Unavailable(f"tokenizer {source}: the hub does not give it now ({one_line(error)})") from error
        raise InputError(
            f"tokenizer {source}: not here, and not on the hub ({one_line(error)}); check the name"
        ) from error


def _copy(path: epath.Path, source: str, local: epath.Path) -> epath.Path:
    if path.is_file():
        return path.copy(local / path.name)
    found = [path / name for name in FILES if (path / name).exists()]
    if not any(file.name.startswith("tokenizer.") for file in found):
        raise InputError(f"tokenizer {source}: none of {', '.join(FILES)} there; check the path")
    for file in found:
        file.copy(local / file.name)
    return local
