"""What the devices will run, compiled before anything is allocated."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from easyrm import sharding
from easyrm.config import RunConfig
from easyrm.data.batches import Batches
from easyrm.data.packing import RowBatch, RowShape
from easyrm.errors import InputError
from easyrm.models.attention import IMPLEMENTATIONS, fastest
from easyrm.models.config import LlamaConfig
from easyrm.models.llama import Kernels
from easyrm.models.matmul import cpu_bf16_matmul, matmul
from easyrm.models.reward import RewardModel
from easyrm.training.optimizer import make_optimizer
from easyrm.training.remat import choose_remat, device_memory
from easyrm.training.step import DTYPES, Forward, TrainState, make_reward_step, make_train_step

MIB = 2**20
UNROLLED = 8  # layers of a CPU program without a loop over them, which would copy what each layer keeps and gives


def make_forward(mesh: Mesh, llama: LlamaConfig, *, dtype: str, implementation: str = "auto") -> Forward:
    """How a model runs on a mesh: attention on each device's rows and heads, the residual stream sharded each block."""
    platform = mesh.devices.flat[0].platform
    if implementation == "auto":
        implementation = fastest(platform)
    needed = {"splash": "tpu", "pallas_gpu": "gpu"}.get(implementation, platform)
    if needed != platform:
        raise InputError(f"--model.attention={implementation} runs on {needed}, not on {platform}; use auto")
    attend = sharding.over_devices(mesh, IMPLEMENTATIONS[implementation])
    kernels = Kernels(attend)
    if platform == "cpu":
        multiply = cpu_bf16_matmul if dtype == "bf16" else matmul
        layers = llama.num_hidden_layers
        kernels = Kernels(attend, multiply, unroll=layers if layers <= UNROLLED else 1)
    residual = sharding.residual_sharding(mesh)
    return Forward(DTYPES[dtype], kernels, "none", lambda x: jax.lax.with_sharding_constraint(x, residual))


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """For jax.jit. XLA's CPU backend drops optimization barriers, unless the pass that does so is left out."""
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if mesh.devices.flat[0].platform == "cpu" else {}


def jit_rewards(forward: Forward, mesh: Mesh) -> Callable[[RewardModel, RowBatch], tuple[jax.Array, jax.Array]]:
    """The jitted reward step, whose rewards every process gets whole."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(make_reward_step(forward), out_shardings=everywhere, compiler_options=compiler_options(mesh))


def abstract_arrays(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes with their shardings, as compile and restore take them."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def abstract_model(llama: LlamaConfig, mesh: Mesh) -> RewardModel:
    """The parameters' shapes and shardings. Raises InputError where the mesh does not divide them."""
    sharding.check_heads(mesh, llama.num_attention_heads, llama.num_key_value_heads)
    model = jax.eval_shape(lambda key: RewardModel(llama, nnx.Rngs(key)), jax.random.key(0))
    return abstract_arrays(model, sharding.state_shardings(mesh, model))


class Program:
    """The compiled training step of each row shape, and the ways to a first state.

    `abstract` is the TrainState's shapes, dtypes and shardings. Order of birth: shapes, shardings, compilation, bytes
    per device; only then does anything allocate.
    """

    def __init__(self, config: RunConfig, llama: LlamaConfig, mesh: Mesh, steps: int):
        """Raises InputError where the mesh does not divide the model."""
        self._mesh, self._llama = mesh, llama
        self._optimizer = make_optimizer(config.optimizer, steps)
        model = abstract_model(llama, mesh)
        moments = jax.eval_shape(self._optimizer.init, model)
        rest = (moments, jax.ShapeDtypeStruct((), bool))
        self.abstract = TrainState(model, *abstract_arrays(rest, sharding.state_shardings(mesh, rest)))
        self._config = config
        self._forward = make_forward(mesh, llama, dtype=config.dtype, implementation=config.model.attention)
        self._memory_of_device = device_memory(mesh)
        self._options = compiler_options(mesh)
        self._rewards = jit_rewards(self._forward, mesh)
        self._compiled: dict[RowShape, Any] = {}

    def remat(self, rows: RowBatch) -> str:
        """The policy for rows of these shapes: --model.remat, or what auto makes of it."""
        if self._config.model.remat != "auto":
            return self._config.model.remat
        _, count, length = rows.tokens.shape
        tokens = count * length / sharding.row_groups(self._mesh)
        return choose_remat(self._llama, self._mesh, tokens, self._memory_of_device, self._config.optimizer.mu_bytes)

    def trace(self, rows: RowBatch) -> jax.stages.Traced:
        """The training step for rows of these shapes (arrays or abstract), to be looked at, lowered and compiled.

        Raises InputError where mp does not divide the row length.
        """
        length, ways = rows.tokens.shape[-1], self._mesh.shape["mp"]
        if length % ways:
            raise InputError(f"--mesh_dim: mp={ways} does not divide rows of {length} tokens")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        forward = dataclasses.replace(self._forward, remat=self.remat(rows))
        step = jax.jit(
            make_train_step(
                forward,
                self._optimizer,
                self._config.loss,
                skip_nonfinite=self._config.on_nonfinite == "skip",
            ),
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=self._options,
        )
        return step.trace(self.abstract, abstract_arrays(rows, sharding.batch_shardings(self._mesh, rows)))

    def compile(self, batches: Batches, say: Callable[[str], None]) -> dict[str, str]:
        """Compile the step for every shape of `batches`, all at once, and say what it takes of each device.

        Returns the remat policy by shape: a program of another policy on one host would stop all in a collective.
        """

        def compile_one(shape):
            return self.trace(batches.empty(shape)).lower().compile()

        began = time.monotonic()
        pool = ThreadPoolExecutor()
        try:
            self._compiled = dict(zip(batches.shapes, pool.map(compile_one, batches.shapes), strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a stop does not wait for programs that nobody will run
        say(f"compiled {len(batches.shapes)} shapes in {time.monotonic() - began:.1f} s; MiB per device:")
        policies = {}
        for shape in batches.shapes:
            name = f"{shape.rows} rows of {shape.length} tokens"
            policies[name] = self.remat(batches.empty(shape))
            say(f"  {name}, remat {policies[name]}: {self._memory(shape)}")
        return policies

    def _memory(self, shape: RowShape) -> str:
        taken = self._compiled[shape].memory_analysis()
        parameters, moments, _ = (bytes_per_device(jax.tree.leaves(tree)) for tree in self.abstract)
        sizes = {
            "parameters": parameters,
            "moments": moments,
            "batch": taken.argument_size_in_bytes - parameters - moments,
            "temporaries": taken.temp_size_in_bytes,
            "peak": taken.peak_memory_in_bytes,  # less than the sum: not all temporaries live at once
        }
        return ", ".join(f"{name} {size / MIB:.1f}" for name, size in sizes.items())

    def train_step(self, state: TrainState, batch: RowBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update; `state` is consumed. Metrics stay on the devices until somebody asks for them."""
        return self._compiled[_shape(batch)](state, sharding.place_batch(self._mesh, batch))

    def rewards(self, model: RewardModel, batch: RowBatch) -> tuple[jax.Array, jax.Array]:
        """Rewards of both sides of a batch, float32[M, B] each."""
        return self._rewards(model, sharding.place_batch(self._mesh, batch))

    def random_state(self) -> TrainState:
        """A state with random weights from the run's seed, the same on every mesh."""
        create = jax.jit(
            lambda key: RewardModel(self._llama, nnx.Rngs(key), score_std=self._config.model.score_std),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract.model),
        )
        return self.state_of(create(jax.random.key(self._config.seed)))

    def state_of(self, model: RewardModel) -> TrainState:
        """A first state with these parameters and Adam's moments at zero."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract[1:])
        start = jax.jit(lambda model: (self._optimizer.init(model), True), out_shardings=places)
        return TrainState(model, *start(model))


def _shape(batch: RowBatch) -> RowShape:
    micro_batches, rows, length = batch.tokens.shape
    return RowShape(micro_batches * rows, length)


def bytes_per_device(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    """What arrays of these shapes and shardings take of one device."""
    return sum(leaf.dtype.itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)
