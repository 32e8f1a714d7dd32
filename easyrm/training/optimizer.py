"""Adam, its learning-rate schedule and gradient clipping, all from optax."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from easyrm.errors import InputError


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW (`b1`, `b2`, `eps`); the learning rate rises linearly to `lr` over `warmup_ratio` of the updates and falls
    linearly to `end_lr`.

    `clip_norm` bounds the gradient's global norm (0: no bound); `weight_decay` acts on kernels and the embedding, not
    on norms; `mu_dtype` (fp32|bf16) stores the first moment. The second moment is always fp32: in bf16, updates of
    1 - b2 = 0.001 would be rounded away.
    """

    lr: float = 5e-6
    end_lr: float = 0.0
    warmup_ratio: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    mu_dtype: str = "fp32"

    @property
    def mu_bytes(self) -> int:
        """Bytes of a first moment."""
        return 2 if self.mu_dtype == "bf16" else 4

    def validate(self) -> None:
        """Raise InputError for values that cannot train."""
        if self.eps == 0:
            raise InputError("--optimizer.eps=0.0: choose a number above 0; embeddings of unused tokens would be 0/0")
        for name in ("lr", "end_lr", "eps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"--optimizer.{name}={value}: choose a finite number, 0 or more")
        for name in ("warmup_ratio", "b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(f"--optimizer.{name}={value}: choose a number in [0, 1)")
        if self.mu_dtype not in ("fp32", "bf16"):
            raise InputError(f"--optimizer.mu_dtype={self.mu_dtype}: choose fp32 or bf16")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of update k, counted from 0: warm-up over ceil(warmup_ratio * steps), then decay.

    No warm-up at warmup_ratio 0. The last update, k = steps - 1, is one step short of `end_lr`.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    decay = optax.linear_schedule(config.lr, config.end_lr, max(steps - warmup, 1))
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW over a run of `steps` updates."""
    adam = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, leaf: "norm" not in jax.tree_util.keystr(path), params
        ),
        mu_dtype=jnp.bfloat16 if config.mu_dtype == "bf16" else None,
    )
    # One chain with and without a bound, so that their states have one form.
    return optax.chain(optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(), adam)
