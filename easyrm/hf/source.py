"""Where a run's model comes from: a checkpoint whose header is checked at once and whose weights are read later."""

from typing import Any

import jax

from easyrm.file_digests import check_files
from easyrm.hf.config import read_config
from easyrm.hf.hub import fetch
from easyrm.hf.load import load_params, open_checkpoint
from easyrm.models.config import SIZES


class ModelSource:
    """`config` (LlamaConfig) and `raw` (config.json as it was read, {} for a named size) of a model.

    With `init_from`, a Hugging Face directory, hub name or gs://..., every tensor's name and shape is checked here,
    before anything is compiled, and the files, the tokenizer's too, against the digests.json of an export; `load` reads
    the weights. Else `config` is a named size or a config.json.
    """

    def __init__(self, init_from: str, config: str):
        """Raises InputError for what cannot be read or computed."""
        self.path = fetch(init_from) if init_from else None
        if self.path is None and config in SIZES:
            self.config, self.raw = SIZES[config], {}
        else:
            self.config, self.raw = read_config(self.path or config)
        if self.path is not None:
            check_files(self.path)
            open_checkpoint(self.path, self.config)

    def load(self, abstract: Any, *, score_std: float, seed: int) -> Any:
        """The parameters, fp32, placed as the `abstract` arrays say; see `load_params`."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return load_params(self.path, abstract, shardings, config=self.config, score_std=score_std, seed=seed)
