"""The configuration of a run: every flag of train_rm with its default, and the recipes that set them."""

import dataclasses
import math
import re
import tomllib
from pathlib import Path
from typing import Any

from etils import epath

from easyrm.data.config import DataConfig
from easyrm.errors import InputError
from easyrm.models.attention import IMPLEMENTATIONS
from easyrm.models.config import SIZES
from easyrm.models.llama import REMAT_POLICIES
from easyrm.training.evaluation import METRICS as EVAL_METRICS
from easyrm.training.loss import LossConfig
from easyrm.training.optimizer import OptimizerConfig
from easyrm.training.profile import parse_profile_steps

RECIPES = Path(__file__).parent / "recipes"
_LEAST = {
    "seed": 0,
    "log_freq": 1,
    "eval_freq": 0,
    "save_freq": 0,
    "save_minutes": 0,
    "keep_checkpoints": 1,
    "keep_best": 0,
    "keep_every": 0,
    "max_nonfinite": 1,
    "distributed_timeout": 1,
}


@dataclasses.dataclass
class ModelConfig:
    """Where the model comes from and how it is run.

    `init_from`: a Hugging Face directory, hf://org/name or gs://...; or empty with `config`, a named size or a
    config.json, for random weights. `score_std`: of a new head (0: 1/sqrt(D + 1)). `remat`: what a block's backward
    pass recomputes, or auto: nothing where all activations surely fit, else everything. `attention`: an
    implementation in easyrm/models/attention, or auto for the platform's fastest.
    """

    init_from: str = ""
    config: str = ""
    score_std: float = 0.0
    remat: str = "auto"
    attention: str = "auto"

    def validate(self) -> None:
        """Raise InputError unless there is exactly one source and a known policy."""
        if bool(self.init_from) == bool(self.config):
            raise InputError(
                "--model.init_from (a Hugging Face directory or hub name) or --model.config (a named size or a "
                "config.json, for random weights): give exactly one"
            )
        if self.remat not in ("auto", *REMAT_POLICIES):
            raise InputError(f"--model.remat={self.remat}: choose one of auto, {', '.join(REMAT_POLICIES)}")
        if self.attention not in ("auto", *IMPLEMENTATIONS):
            raise InputError(f"--model.attention={self.attention}: choose one of auto, {', '.join(IMPLEMENTATIONS)}")
        if not 0 <= self.score_std < math.inf:
            raise InputError(f"--model.score_std={self.score_std}: choose 0 (for 1/sqrt(D + 1)) or more")
        if self.config and self.config not in SIZES and not epath.Path(self.config).exists():
            sizes = ", ".join(SIZES)
            raise InputError(f"--model.config={self.config}: no such file, nor a named size ({sizes})")


@dataclasses.dataclass
class EvalConfig:
    """What is evaluated beside the pairs of --data.eval, and when a run has learned enough.

    `suites`: a comma-separated list of rewardbench, rewardbench2, rm-bench (from the hub), SUITE:FILE, or files of
    pairs. `patience`: end the run after so many evaluations in a row without a better --best_metric; 0: never.
    """

    suites: str = ""
    patience: int = 0

    def validate(self) -> None:
        """Raise InputError for a patience that makes no sense."""
        if self.patience < 0:
            raise InputError(f"--eval.patience={self.patience}: choose 0 (never stop early) or more evaluations")


@dataclasses.dataclass
class RunConfig:
    """Every flag of `python -m easyrm.train_rm`.

    `recipe`: a name under easyrm/recipes/ or a TOML file, whose settings other flags override. `mesh_dim`: devices for
    data, for shards of the parameters and for tensor parallelism, one of them -1 for all that are left. `seed`: of the
    new head and the order of the pairs. `dtype`: bf16 or fp32, in which is computed; parameters are fp32. `output_dir`:
    where all that the run leaves goes, local or gs://. `tokenizer`: a directory, a tokenizer.model or hf://org/name;
    empty: that of `model.init_from`. `total_steps` 0 means `num_epochs` of the data. `eval_freq` and `save_freq` count
    steps; 0 means at the end only. `log_freq`: steps a line of metrics.jsonl. `save_minutes`: at most so long between
    saves (0: as `save_freq` says). `keep_checkpoints`: how many of the newest stay; beside them the `keep_best` highest
    (of a loss: lowest) by `best_metric`, for which every evaluation is saved, and each step that `keep_every` divides.
    `strict_saves`: a save that fails ends the run. `on_nonfinite`: stop at a loss or gradient that is not finite, or
    skip such updates, at most `max_nonfinite` in a row. `allow_config_change`: resume although settings or data have
    changed. `export`: write the Hugging Face directory at the end, in `export_dtype`. `license`: what the exported
    model's card is to state, an id of the hub or of SPDX, as in llama3.1 or apache-2.0; empty: nothing. `distributed`:
    auto (where a TPU or JAX_COORDINATOR_ADDRESS is found), true or false; `distributed_timeout`: seconds to wait for
    all hosts. `compilation_cache`: a directory (local or gs://) that keeps compiled programs for the next start.
    `profile_steps`: first and last step of a profiler trace, as in 10,13. `tensorboard` and `wandb_project` send the
    metrics there too.
    """

    recipe: str = ""
    mesh_dim: str = "1,-1,1"
    seed: int = 0
    dtype: str = "bf16"
    num_epochs: float = 1.0
    total_steps: int = 0
    output_dir: str = ""
    log_freq: int = 1
    eval_freq: int = 0
    save_freq: int = 500
    save_minutes: float = 30.0
    keep_checkpoints: int = 2
    keep_best: int = 0
    best_metric: str = "eval/accuracy"
    keep_every: int = 0
    strict_saves: bool = False
    on_nonfinite: str = "stop"
    max_nonfinite: int = 10
    allow_config_change: bool = False
    export: bool = False
    export_dtype: str = "bf16"
    license: str = ""
    distributed: str = "auto"
    distributed_timeout: int = 300
    compilation_cache: str = ""
    profile_steps: str = ""
    tensorboard: bool = False
    wandb_project: str = ""
    tokenizer: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)

    def validate(self) -> None:
        """Raise InputError for what no run can be made of; touches no device and reads no data."""
        if not self.output_dir:
            raise InputError("--output_dir is empty: name a directory (local or gs://) for the run's files")
        self.validate_values()
        if not self.data.train:
            raise InputError("--data.train is empty: name a file, a glob, a directory, gs://... or hf://dataset")
        self.model.validate()

    def validate_values(self) -> None:
        """Raise InputError for a value that no run can have, whatever else is given."""
        for name in ("dtype", "export_dtype"):
            if getattr(self, name) not in ("bf16", "fp32"):
                raise InputError(f"--{name}={getattr(self, name)}: choose bf16 or fp32")
        if not re.fullmatch(r"[A-Za-z0-9.+-]*", self.license):
            raise InputError(
                f"--license={self.license}: not a licence id; give the hub's or the SPDX one, such as llama3.1 or "
                "apache-2.0, or other"
            )
        if self.distributed not in ("auto", "true", "false"):
            raise InputError(f"--distributed={self.distributed}: choose auto, true or false")
        endless = not math.isfinite(self.num_epochs)
        if endless or self.total_steps < 0 or (self.total_steps == 0 and not self.num_epochs > 0):
            raise InputError(
                f"--num_epochs={self.num_epochs} with --total_steps={self.total_steps}: nothing to train; "
                "give epochs above 0 or steps above 0"
            )
        for name, least in _LEAST.items():
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: choose {least} or more")
        if self.seed >= 2**63:
            raise InputError(f"--seed={self.seed}: choose a number below 2**63")
        if self.on_nonfinite not in ("stop", "skip"):
            raise InputError(f"--on_nonfinite={self.on_nonfinite}: choose stop or skip")
        if self.best_metric not in EVAL_METRICS and not (self.eval.suites and self.best_metric.startswith("eval/")):
            own = ", eval/SUITE/FIGURE" if self.eval.suites else " or, with --eval.suites, eval/SUITE/FIGURE"
            raise InputError(f"--best_metric={self.best_metric}: choose one of {', '.join(EVAL_METRICS)}{own}")
        for name, value in (("keep_best", self.keep_best), ("eval.patience", self.eval.patience)):
            if value and not (self.data.eval or self.eval.suites):
                raise InputError(f"--{name}={value} needs pairs to evaluate on; give --data.eval or --eval.suites")
        if self.eval.patience and not self.eval_freq:
            raise InputError(
                f"--eval.patience={self.eval.patience} with --eval_freq=0: nothing is evaluated before the end; "
                "give the steps between evaluations"
            )
        parse_profile_steps(self.profile_steps)
        for group in (self.data, self.eval, self.optimizer, self.loss):
            group.validate()

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as config.json keeps them."""
        return dataclasses.asdict(self)


def read_recipe(name: str) -> dict[str, Any]:
    """The nested settings of a recipe: a name under easyrm/recipes/ or a path to such a TOML file.

    Raises InputError for an unknown name and for a file that is not TOML.
    """
    path = RECIPES / f"{name}.toml"
    path = path if path.exists() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml"))) or "none yet"
        raise InputError(f"--recipe={name}: neither a file nor a recipe of easyrm (there are: {known})")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe={name}: {path} is not TOML: {error}") from error


def apply_recipe(config: RunConfig, recipe: dict[str, Any], source: str) -> None:
    """Set what a recipe names. Raises InputError for a name or a type that no flag has."""
    fields = {field.name for field in dataclasses.fields(config)}
    for name, value in recipe.items():
        here = getattr(config, name, None)
        if name not in fields:
            raise InputError(f"--recipe={source}: it sets {name!r}, which is no flag of train_rm")
        if dataclasses.is_dataclass(here) and isinstance(value, dict):
            apply_recipe(here, value, source)
        elif type(here) is float and type(value) is int:
            setattr(config, name, float(value))
        elif type(here) is not type(value):
            raise InputError(f"--recipe={source}: {name} = {value!r} is not of type {type(here).__name__}")
        else:
            setattr(config, name, value)
