"""All that one host can look at by itself, without touching a device: begun at once, each check in its own thread."""

import contextlib
import functools

from easyrm.config import RunConfig
from easyrm.distributed import tpu_chips
from easyrm.errors import InputError
from easyrm.health import sources, space, storage, tpu, versions
from easyrm.health.finding import OK, SKIPPED, Check, Finding
from easyrm.models.config import LlamaConfig
from easyrm.planning.model import model_shape
from easyrm.run import check_output_dir

_QUICK, _SLOW = 10.0, 20.0  # seconds of a check on this machine, and of one that asks disks and servers
_CACHE = "compilation_cache"


class Local:
    """The checks of this host. `llama`: the model's shape, where it is known once `findings` has returned."""

    def __init__(self, config: RunConfig, hosts: int, facts: dict[str, str], probes: storage.Probes):
        self._config, self._hosts, self._probes = config, hosts, probes
        self.llama: LlamaConfig | None = None
        self._described = bool(config.data.train or config.model.init_from or config.model.config)
        self._checks = [
            Check("settings", _SLOW, self._settings, config.output_dir),
            Check("versions", _QUICK, lambda: versions.in_range(facts)),
            Check("tpu", _QUICK, lambda: tpu.look(tpu_chips())),
            Check("memory", _SLOW, self._capacity),
        ]
        if config.output_dir or config.compilation_cache:
            self._checks.append(Check("output_dir", _SLOW, self._storage, config.output_dir))
        self._checks += self._sources()

    def findings(self) -> list[Finding]:
        """What all of them found, once they have ended or were cut off."""
        return [finding for check in self._checks for finding in check.findings()]

    def _settings(self) -> Finding:
        if not self._described:
            text = "no run is described; give it the flags of train_rm to check its model, data and output_dir"
            return Finding("settings", SKIPPED, text)
        self._config.validate()
        said: list[str] = []
        check_output_dir(self._config, said.append)
        return Finding("settings", OK, "; ".join(["the flags make sense together", *said]))

    def _storage(self) -> list[Finding]:
        # One after the other: together, each would measure half of what a disk can do.
        config = self._config
        named = {"output_dir": config.output_dir, _CACHE: config.compilation_cache}
        return [storage.look(flag, directory, self._probes) for flag, directory in named.items() if directory]

    def _capacity(self) -> list[Finding]:
        if self._described:
            with contextlib.suppress(InputError):  # the check of the model says so
                self.llama = model_shape(self._config.model)
        memory = space.memory(self._config, self.llama, self._hosts, accelerator=bool(tpu.accelerators()))
        return [*space.disk(self._config, self.llama), memory]

    def _sources(self) -> list[Check]:
        config, checks = self._config, []
        try:
            used = sources.repositories(config)
        except InputError as error:
            used, checks = [], [Check("eval.suites", _QUICK, functools.partial(_refused, error))]
        checks.append(Check("hub", _QUICK, lambda: sources.token(used)))
        checks += [Check(one.check, _SLOW, functools.partial(sources.hub, one), f"hf://{one.name}") for one in used]
        on_hub = {one.check for one in used}
        if (config.model.init_from or config.model.config) and "model" not in on_hub:
            checks.append(Check("model", _SLOW, lambda: sources.model(config), config.model.init_from))
        source = config.tokenizer or config.model.init_from
        if source and "tokenizer" not in on_hub:
            checks.append(Check("tokenizer", _SLOW, lambda: sources.load_tokenizer(config), source))
        for name, spec in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if any(part.strip() and not part.strip().startswith("hf://") for part in spec.split(",")):
                look = functools.partial(sources.data, name, spec, ranked=config.loss.ranked)
                checks.append(Check(name, _SLOW, look, spec))
        if config.eval.suites and "eval.suites" not in on_hub:
            checks.append(Check("eval.suites", _SLOW, lambda: sources.suites(config.eval.suites), config.eval.suites))
        return checks


def _refused(error: InputError) -> Finding:
    raise error
