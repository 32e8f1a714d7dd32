"""Whether model, tokenizer and data can be reached and read; of what is large, only the beginning is looked at."""

import dataclasses
import os
import shutil
from collections.abc import Callable

import huggingface_hub
from etils import epath
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from easyrm.config import RunConfig
from easyrm.data import sources, tokenizer
from easyrm.data.groups import is_group, parse_group
from easyrm.data.pairs import Dropped, parse_pair
from easyrm.errors import InputError, one_line
from easyrm.health.finding import FAIL, OK, SKIPPED, WARN, Finding, plural
from easyrm.hf.hub import MODEL_FILES, hub_name
from easyrm.hf.source import ModelSource
from easyrm.suites.registry import parse_suites

_SECONDS = 8.0  # for an answer of the hub
_FILES = 8  # of a data set of which the first record is read
_TOKEN = "set HF_TOKEN on every host to a token that may read it, and accept its licence on its page"


@dataclasses.dataclass(frozen=True)
class Repository:
    """What of the hub is used, by which check, and the files that one of has to be there."""

    check: str
    name: str
    kind: str
    files: tuple[str, ...] = ()


def repositories(config: RunConfig) -> list[Repository]:
    """Everything of the hub that a run of this configuration reads. Raises InputError for malformed suites."""
    found = []
    if config.model.init_from and (name := hub_name(config.model.init_from)):
        found.append(Repository("model", name, "model", ("config.json",)))
    source = config.tokenizer or config.model.init_from
    if source and (name := hub_name(source)):
        found.append(Repository("tokenizer", name, "model", ("tokenizer.json", "tokenizer.model")))
    specs = {"data.train": config.data.train, "data.eval": config.data.eval}
    parts = [(check, part.strip()) for check, spec in specs.items() for part in spec.split(",")]
    parts += [("eval.suites", request.source) for request in parse_suites(config.eval.suites)]
    for check, part in parts:
        if part.startswith("hf://"):
            found.append(Repository(check, part.removeprefix("hf://").partition(":")[0], "dataset"))
    return found


def token(used: list[Repository]) -> Finding:
    """Whether there is a token of the hub, of which nothing is told, and whether anything asks for the hub."""
    there = "a token is set" if huggingface_hub.get_token() else "no token is set"
    if not used:
        return Finding("hub", SKIPPED, f"nothing of this run is on the Hugging Face hub; {there}")
    names = ", ".join(dict.fromkeys(repository.name for repository in used))
    needed = "" if huggingface_hub.get_token() else "; public repositories need none, gated and private ones do"
    return Finding("hub", OK, f"{there}; used: {names}{needed}")


def hub(repository: Repository, api: huggingface_hub.HfApi | None = None) -> Finding:
    """Whether the hub gives this user a repository, and whether there is room for a model; nothing is downloaded."""
    check, name, kind = repository.check, repository.name, repository.kind
    api = api or huggingface_hub.HfApi()
    cached = any(_cached(repository, file) for file in repository.files)
    try:
        info = api.repo_info(name, repo_type=kind, timeout=_SECONDS, files_metadata=check == "model")
        if info.gated:
            api.auth_check(name, repo_type=kind)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        gated = isinstance(error, GatedRepoError)
        what = "is gated, and not open to this user" if gated else "is not there, or not open to this user"
        return Finding(check, FAIL, f"hf://{name} {what}", f"check the name; {_TOKEN}")
    except Exception as error:  # of the hub's client, of its HTTP library, of the network
        said = f"the Hugging Face hub does not answer for hf://{name} ({type(error).__name__}: {one_line(error)})"
        if cached:
            return Finding(check, WARN, f"{said}; what is in the cache will be used", "look at the network")
        return Finding(check, FAIL, said, f"look at the network, or at HF_ENDPOINT={constants.ENDPOINT}")
    present = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if repository.files and not set(repository.files) & present.keys():
        return Finding(check, FAIL, f"hf://{name} has no {' or '.join(repository.files)}", "name another")
    if check == "model":
        used = filter_repo_objects(present, **MODEL_FILES)
        return _room(repository, {file: present[file] for file in used if file.endswith(".safetensors")})
    return Finding(check, OK, f"hf://{name} can be read")


def model(config: RunConfig) -> Finding:
    """Whether a model that is not on the hub can be loaded: its shape, and the names and shapes of its tensors."""
    if not config.model.init_from:
        source = ModelSource("", config.model.config)
        return Finding("model", OK, f"{config.model.config}: {_shape(source)}, random weights")
    source = ModelSource(config.model.init_from, "")
    return Finding("model", OK, f"{config.model.init_from}: {_shape(source)}, all tensors are there")


def load_tokenizer(config: RunConfig) -> Finding:
    """Whether a tokenizer that is not on the hub loads, as the trainer loads it."""
    source = config.tokenizer or config.model.init_from
    loaded = tokenizer.load_tokenizer(source, config.data.pad_token)
    return Finding("tokenizer", OK, f"{source}: {loaded.vocab_size} tokens, EOS {loaded.eos}, pad {loaded.pad}")


def data(check: str, spec: str, *, ranked: bool) -> Finding:
    """Whether files of pairs (or, where `ranked`, of groups) are there and the first record of each can be parsed."""
    paths = [path for path in sources.resolve(spec, _quiet) if not path.startswith("hf://")]
    for path in paths[:_FILES]:
        record = next(iter(sources.read_one(path, _quiet)), None)
        if record is None:
            return Finding(check, FAIL, f"{path} holds no record", "check that the file is complete")
        try:
            parse: Callable = parse_group if ranked and is_group(record) else parse_pair
            parse(record)
        except Dropped as dropped:
            return Finding(check, FAIL, f"{record.where}: {dropped}", "write pairs as README.md shows them")
    more = f"; {len(paths) - _FILES} more were not opened" if len(paths) > _FILES else ""
    return Finding(check, OK, f"{spec}: {plural(len(paths), 'file')}, the first record is sound{more}")


def suites(spec: str) -> Finding:
    """Whether the files of --eval.suites that are not on the hub are there and begin with a record."""
    requests = [request for request in parse_suites(spec) if not request.source.startswith("hf://")]
    for request in requests:
        if next(iter(sources.read(request.source, _quiet)), None) is None:
            raise InputError(f"--eval.suites: {request.source} holds no record; check that the file is complete")
    return Finding("eval.suites", OK, f"{', '.join(request.source for request in requests)} can be read")


def _room(repository: Repository, files: dict[str, int]) -> Finding:
    if not files:
        return Finding("model", FAIL, f"hf://{repository.name} has no .safetensors files", "name another model")
    missing = sum(size for file, size in files.items() if not _cached(repository, file))
    folder = epath.Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not missing:
        return Finding("model", OK, f"hf://{repository.name} is in the cache {constants.HF_HUB_CACHE}")
    text = f"hf://{repository.name} can be read; {missing / 1e9:.1f} GB to download to {constants.HF_HUB_CACHE}, where "
    if not os.access(folder, os.W_OK):
        return Finding("model", FAIL, f"{text}this user may not write", "set HF_HOME to a directory where it may")
    text += "{free} GB are free"
    way_out = "" if missing < free else "free space, or set HF_HOME to a directory with more"
    return Finding("model", FAIL if way_out else OK, text, way_out, {"free": [free / 1e9]})


def _cached(repository: Repository, file: str) -> bool:
    found = huggingface_hub.try_to_load_from_cache(repository.name, file, repo_type=repository.kind)
    return isinstance(found, str)


def _shape(source: ModelSource) -> str:
    llama = source.config
    return f"{llama.num_hidden_layers} layers, width {llama.hidden_size}, {llama.vocab_size} tokens"


def _quiet(_: str) -> None:
    pass
