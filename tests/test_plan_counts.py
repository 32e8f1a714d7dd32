"""What a plan reads from programs: bytes of collectives, loops multiplied out, and FLOPs of matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from runs import run_config, tiny_llama

from easyrm.chips import training_flops
from easyrm.data.packing import RowShape
from easyrm.planning.flops import matmul_flops
from easyrm.planning.hlo import KINDS, read_traffic
from easyrm.planning.workload import Work
from easyrm.sharding import make_mesh
from easyrm.training.program import Program


def traffic_of(function, *arrays, axis=8):
    mesh = jax.make_mesh((axis,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:axis])
    spread = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False
    )
    return read_traffic(jax.jit(spread).lower(*arrays).compile().as_text())


# Of a ring of 8 chips that hold 1024 floats each: what a chip sends.
SENT = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True), 7 * 4096),
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), 2 * 4096 * 7 / 8),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), 4096 * 7 / 8),
    "all-to-all": (lambda x: jax.lax.all_to_all(x.reshape(8, -1), "x", 0, 0), 4096 * 7 / 8),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), 4096),
}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_each_collective_in_a_program_of_xla(kind):
    function, sent = SENT[kind]
    found = traffic_of(function, jnp.zeros(8 * 1024))
    assert found.sent == {**dict.fromkeys(KINDS, 0.0), kind: sent}
    assert found.calls[kind] == 1


def test_a_loop_sends_as_often_as_it_runs():
    def once(x, _):
        return jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]) + 1, None

    def twice(x, _):
        return jax.lax.scan(once, x, None, length=3)

    found = traffic_of(lambda x: jax.lax.scan(twice, x, None, length=5)[0], jnp.zeros(8 * 1024))
    assert found.sent["collective-permute"] == 15 * 4096
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_is_said():
    def until(x):
        step = lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]) * 2  # noqa: E731
        return jax.lax.while_loop(lambda x: x[0] < 100, step, x)

    found = traffic_of(until, jnp.zeros(8 * 1024))
    assert (found.calls["collective-permute"], found.unknown_loops) == (1, 1)


# The forms that only TPU programs have, as libtpu 0.0.42 writes them, cut to what matters.
TPU_PROGRAM = """HloModule jit_train_step, num_partitions=4

%all-reduce-scatter.1 (input.1: bf16[2,1024]) -> bf16[1,1024] {
  %input.1 = bf16[2,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.1 = bf16[2,1024]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=1, replica_groups={{0,1},{2,3}}
}

%async_collective_fusion.1 (param_0.1: bf16[512]) -> bf16[1024] {
  ROOT %all-gather.1 = bf16[1024]{0:T(8,128)} all-gather(%param_0.1), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (param_0.2: bf16[512]) -> bf16[1024] {
  ROOT %all-gather.2 = bf16[1024]{0:T(8,128)} all-gather(%param_0.2), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (state.1: (bf16[512], u32[])) -> (bf16[512], u32[]) {
  %constant.2 = u32[]{:T(128)} constant(2)
  %state.1 = (bf16[512]{0:T(8,128)}, u32[]{:T(128)}) parameter(0)
  %part.1 = bf16[512]{0:T(8,128)} get-tuple-element(%state.1), index=0
  %counter.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  %permute-start.1 = (bf16[512]{0:T(8,128)S(1)}, bf16[512]{0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%part.1), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %permute-done.1 = bf16[512]{0:T(8,128)} collective-permute-done(%permute-start.1)
  %next.1 = u32[]{:T(128)} add(%counter.1, %constant.2)
  ROOT %tuple.1 = (bf16[512]{0:T(8,128)}, u32[]{:T(128)}) tuple(%permute-done.1, /*index=1*/%next.1)
}

%condition (state.2: (bf16[512], u32[])) -> pred[] {
  %constant.3 = u32[]{:T(128)} constant(8)
  %state.2 = (bf16[512]{0:T(8,128)}, u32[]{:T(128)}) parameter(0)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%state.2), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%counter.2, %constant.3), direction=LT
}

ENTRY %main (p: bf16[512]) -> bf16[512] {
  %p = bf16[512]{0:T(8,128)} parameter(0)
  %fusion.1 = bf16[1,1024]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = bf16[1024]{0:T(8,128)} fusion(%p), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.3 = bf16[1024]{0:T(8,128)} fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  %while.1 = (bf16[512]{0:T(8,128)}, u32[]{:T(128)}) while(%t), condition=%condition, body=%body
  %all-reduce.2 = (f32[]{:T(128)}, f32[256]{0:T(128)}) all-reduce(%a, %b), channel_id=5, \
replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0','axis_1'}, to_apply=%add
  %all-gather.3 = (bf16[512]{0}, bf16[1024]{0}) all-gather-start(%p), channel_id=6, replica_groups=mesh['axis_0'=2,\
'axis_1'=2] {'axis_1'}, dimensions={0}
}
"""


def test_forms_of_tpu_programs():
    found = read_traffic(TPU_PROGRAM)
    assert found.sent["reduce-scatter"] == 2 * 1024 * 2 / 2  # an all-reduce inside a fusion that keeps its own part
    assert found.sent["all-gather"] == 1024 + 1024  # a collective in two stages counts once; a started one counts
    assert found.sent["collective-permute"] == 4 * 1024  # up to 8 in steps of 2
    assert found.sent["all-reduce"] == 2 * (4 + 1024) * 3 / 4
    assert found.unknown_loops == 0


def test_matmul_flops_are_those_that_xla_counts():
    function = lambda a, b: jnp.sum((a @ b) @ b.T)  # noqa: E731
    arrays = jnp.zeros((32, 64)), jnp.zeros((64, 16))
    counted = matmul_flops(jax.jit(function).trace(*arrays).jaxpr)
    products = 2 * 32 * 64 * 16 * 2
    # XLA adds the additions of the sum.
    assert (
        counted == products == pytest.approx(jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"], 0.05)
    )

    scanned = jax.jit(lambda a, b: jax.lax.scan(lambda x, _: (x @ b @ b.T, None), a, None, length=7)[0])
    assert matmul_flops(scanned.trace(*arrays).jaxpr) == 7 * products


def traced_flops(remat, mesh_dim="1,1,1"):
    llama, mesh = tiny_llama(), make_mesh(mesh_dim, jax.devices()[: int(np.prod([*map(int, mesh_dim.split(","))]))])
    config = run_config({"model.remat": remat, "model.attention": "xla", "dtype": "fp32"})
    rows = Work(RowShape(8, 128), 2, 4, 8).rows(4)
    return matmul_flops(Program(config, llama, mesh, 10).trace(rows).jaxpr)


def test_matmul_flops_of_the_train_step():
    # Dense attention sees every key of the row, and its backward pass computes the scores, one product, again.
    llama, keys = tiny_llama(), 8 * 128 * 128
    again = 2 * llama.num_hidden_layers * llama.num_attention_heads * llama.head_dim * keys
    useful = training_flops(llama, 8 * 128, keys)
    assert traced_flops("none") == pytest.approx(useful + again, rel=0.01)
    assert traced_flops("none", "1,4,2") == pytest.approx(traced_flops("none"))
    # One more forward pass, but for the last product of each block, which nobody needs again.
    assert 1.2 * (useful + again) < traced_flops("nothing_saveable") < 4 / 3 * (useful + again)
