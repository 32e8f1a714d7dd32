"""The plan: what it reads from compiled programs, its arithmetic, its search, and, with libtpu, real TPU programs."""

import dataclasses
import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from runs import call, make_world, run_config, tiny_llama

from easyrm import plan
from easyrm.chips import GIB, PEAK_BF16_FLOPS, TPUS, training_flops
from easyrm.config import RunConfig
from easyrm.data.packing import RowShape
from easyrm.errors import InputError
from easyrm.models.config import SIZES
from easyrm.plan import Request, demand_of, prices_of
from easyrm.planning import compiled, search, topology
from easyrm.planning.compiled import Memory, Plan, compile_plan, describe_refusal
from easyrm.planning.estimate import Roofline, roofline
from easyrm.planning.flops import matmul_flops
from easyrm.planning.hlo import KINDS, read_traffic
from easyrm.planning.report import as_dict, as_text, search_table
from easyrm.planning.topology import SLICES, devices_of, parse_topology
from easyrm.planning.workload import Work, demand_of_rows, read_demand, typical_demand, work_on
from easyrm.sharding import make_mesh
from easyrm.training.program import Program, abstract_model, bytes_per_device
from easyrm.training.remat import memory_bytes, state_bytes

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is absent: it is in the tpu extra, not in test"
)


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


def test_roofline():
    chip = TPUS["v5e"]
    found = roofline(chip, flops=197e12, hbm_bytes=2 * 819e9, sent_bytes=100e9)
    assert found == Roofline(compute=1.0, hbm=2.0, ici=0.5)
    assert (found.step, found.bound_by) == (2.0, "hbm")


def test_chip_table():
    sold = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
    for name, chip in TPUS.items():
        assert 0.9 * sold[name] < chip.hbm / GIB < 1.01 * sold[name]
        assert PEAK_BF16_FLOPS[chip.kind] == chip.peak_flops
        assert [parse_topology(f"{name}:{shape}").chips for shape in SLICES[name]][-1] == 256


@pytest.mark.parametrize("name", ["", "v5p", "v9:2x2", "v5p:2x2", "v5e:2x2x2", "v5e:0x4", "v5e:4x4;ls"])
def test_a_slice_that_is_none_is_refused(name):
    with pytest.raises(InputError, match=f"--topology={re.escape(name)}: "):
        parse_topology(name)


def test_without_libtpu_it_says_how_to_install_it(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'easyrm\[tpu\]'") as error:
        devices_of(parse_topology("v5p:2x2x1"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"recipe": "llama3.1-tulu2-8b-uf", "topology": "v9:2x2"}, "--topology=v9:2x2"),
        ({"topology": "v5p:2x2x1"}, "--model.config"),
        ({"recipe": "llama3.1-tulu2-8b-uf", "topology": "v5e:4x4", "row_length": 1024}, "--rows"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, named):
    found = call("plan", flags)
    assert found.returncode == 2 and not found.stdout
    message = found.stderr.strip().splitlines()[-1]
    assert named in message
    assert "Traceback" not in found.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_the_command_says_how_to_install_libtpu():
    found = call("plan", {"recipe": "llama3.1-tulu2-70b-uf", "topology": "v5p:2x4x4"})
    assert found.returncode == 2 and "pip install 'easyrm[tpu]'" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_prices():
    assert prices_of("") == {}
    assert prices_of("4.2") == dict.fromkeys(TPUS, 4.2)
    assert prices_of("v5e=1.2,v5p=4.2") == {"v5e": 1.2, "v5p": 4.2}
    for bad in ("x", "-1", "v9=1", "v5e=", "v5e=0"):
        with pytest.raises(InputError, match="--price"):
            prices_of(bad)


@pytest.mark.parametrize("message", [
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (34.50G) exceeds "
    "available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.50G of 15.75G hbm. Exceeded by 18.75G.",
])  # fmt: skip
def test_by_how_much_a_step_misses(message):
    assert describe_refusal(message) == "needs 34.50 of 15.75 GiB, 18.75 too much"


def test_state_bytes_are_those_of_the_program():
    mesh = make_mesh("1,4,2")
    model = abstract_model(SIZES["llama3.1-8b"], mesh)
    exact = 3 * bytes_per_device(jax.tree.leaves(model))
    assert state_bytes(SIZES["llama3.1-8b"], 8) == pytest.approx(exact, rel=1e-3)


def config_of(batch_size=64, train="hf://org/ultrafeedback"):
    return run_config({"data.batch_size": batch_size, "data.train": train})


def test_rows_follow_the_mesh():
    config = config_of()
    demand = typical_demand(config, 0, 60_908)
    assert demand.tokens == 64 * 796 and "796" in demand.assumed[0]
    for groups, shape in ((8, (16, 4096)), (16, (32, 2048)), (32, (64, 1024)), (64, (64, 1024))):
        work = work_on(demand, config, groups, 1)
        assert work.shape == shape and work.needed * work.shape.length >= demand.tokens
    assert work_on(demand, config, 8, 2).shape.rows % 16 == 0
    assert typical_demand(config_of(train="hf://org/hh_rlhf_60k"), 0, 1).tokens == 64 * 236


def test_idle_devices_are_seen_and_a_better_mesh_named():
    llama, config = SIZES["llama3.1-70b"], config_of(train="hf://org/hh_rlhf_60k")
    demand = typical_demand(config, 0, 60_908)
    work = work_on(demand, config, 128, 1)
    assert (work.shape.rows, work.needed, work.idle) == (128, 16, 112)
    better = search.fewer_idle(llama, 128, demand, config)
    assert better == "1,16,8"
    assert work_on(demand, config, 16, 1).idle == 0
    assert search.fewer_idle(llama, 256, typical_demand(config, 20, 1), config) == ""


def test_idle_devices_of_real_pairs(tmp_path):
    """Their row shape is filled up for every group of devices: what it holds is what counts."""
    config, llama = run_config(make_world(tmp_path)), tiny_llama()
    for groups, idle in ((1, False), (64, True)):
        demand = read_demand(config, llama, groups, lambda line: None)
        assert demand.fixed.rows % groups == 0
        assert bool(work_on(demand, config, groups, 1).idle) == idle
    padded = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False))
    assert work_on(demand, padded, 2 * padded.data.batch_size, 1).idle == 0


def test_forced_rows_are_the_worst_case():
    demand = demand_of_rows(config_of(), 64, 4096, 1000)
    assert (demand.tokens, demand.visible_keys) == (64 * 4096, 64 * 4096 * 4097 / 2)
    assert work_on(demand, config_of(), 32, 1).shape == (64, 4096)
    assert work_on(demand, config_of(), 48, 1).shape == (96, 4096)
    padded = config_of()
    padded.data.packing = False
    assert work_on(demand, padded, 32, 1).shape == (64, 4096)


def test_real_pairs_give_their_own_shape(tmp_path):
    settings = make_world(tmp_path)
    config = run_config(settings)
    said = []
    demand = read_demand(config, tiny_llama(), 2, said.append)
    assert demand.pairs == 48 and demand.fixed.rows % 2 == 0
    assert demand.fixed.capacity >= demand.tokens > 0
    assert any("48" in line for line in said)


def rank(demand, config, names, prices=None):
    return search.rank(config, SIZES["llama3.1-70b"], demand, [parse_topology(name) for name in names], prices or {})


def test_search_drops_what_cannot_fit_and_ranks_by_cost():
    config = config_of()
    demand = demand_of_rows(config, 64, 4096, 60_908)
    ranked, dropped = rank(demand, config, ["v5e:2x2", "v5e:4x8"])
    assert not ranked and dropped > 0  # 70B of parameters and moments are 781 GiB
    ranked, _ = rank(demand, config, ["v5e:2x2", "v5p:2x4x4", "v6e:8x8"])
    assert {found.slice.name for found in ranked} == {"v5p:2x4x4", "v6e:8x8"}
    assert [found.dollars for found in ranked] == sorted(found.dollars for found in ranked)
    cheap, _ = rank(demand, config, ["v5p:2x4x4", "v6e:8x8"], {"v5p": 100.0, "v6e": 1.0})
    dear, _ = rank(demand, config, ["v5p:2x4x4", "v6e:8x8"], {"v5p": 1.0, "v6e": 100.0})
    assert cheap[0].slice.name == "v6e:8x8" and dear[0].slice.name == "v5p:2x4x4"
    tried = [(found.slice.name, found.mesh) for found in search.to_compile(ranked)]
    assert len(tried) == len(set(tried)) == len({(found.slice.name, found.mesh) for found in ranked})


def test_search_compiles_until_enough_fit(monkeypatch):
    tried, said = [], []

    def compile_none(config, llama, tpu, demand, work, *, steps, price):
        tried.append((tpu.name, config.mesh_dim, config.model.remat))
        fits = len(tried) > 1
        memory = Memory(tpu.chip.hbm, 1, 2, 3 * fits or None, 6 * fits or None, 0, "" if fits else "needs more")
        mesh = dict(zip(("dp", "fsdp", "mp"), map(int, config.mesh_dim.split(",")), strict=True))
        limits = Roofline(1.0, 0.5, 0.25) if fits else None
        return Plan(tpu, mesh, config.model.remat, work, demand, steps, price, memory, 2.0, 1.0, None, limits, 0.0)

    monkeypatch.setattr(plan, "compile_plan", compile_none)
    request = Request(topology="", price="2", rows=64, row_length=4096, pair_tokens=0, pairs=6400, best=2)
    slices = [parse_topology(name) for name in ("v5e:4x8", "v5p:2x4x4", "v6e:8x8")]
    found = plan.plan_search(config_of(), SIZES["llama3.1-70b"], slices, request, said.append)
    assert [one.memory.fits for one in found] == [False, True, True] and len(set(tried)) == 3
    table = said[-1].splitlines()
    assert [line.split("  ")[0] for line in table[1:4]] == ["fits", "fits", "does not fit"]
    # 100 steps of a second on 32 or 64 chips at 2 USD an hour.
    assert table[1].split()[-1] in ("1.78", "3.56")


def test_search_offers_only_meshes_that_divide_the_model():
    for name, llama in SIZES.items():
        for chips in (8, 64):
            for dp, fsdp, mp in search.meshes(llama, chips):
                assert dp * fsdp * mp == chips and llama.num_key_value_heads % mp == 0, name


def test_estimated_memory_grows_with_what_is_kept():
    llama, mesh, work = SIZES["llama3.1-8b"], {"dp": 1, "fsdp": 16, "mp": 1}, Work(RowShape(16, 4096), 1, 16, 16)
    sizes = [memory_bytes(llama, mesh, work.tokens, remat) for remat in ("offload", "nothing_saveable", "none")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    more = dataclasses.replace(work, shape=RowShape(32, 4096), needed=32)
    assert memory_bytes(llama, mesh, more.tokens, "none") > sizes[2]
    assert memory_bytes(llama, mesh, dataclasses.replace(more, micro_batches=2).tokens, "none") == sizes[2]


def test_asking_for_rows_beats_data(tmp_path):
    config = run_config({**make_world(tmp_path), "data.max_length": 320})
    asked = functools.partial(Request, topology="", price="", row_length=0, pair_tokens=0, pairs=0, best=1)
    assert demand_of(config, tiny_llama(), asked(rows=4), 1).fixed == (4, 320)
    assert demand_of(config, tiny_llama(), asked(rows=0), 1).pairs == 48


def test_a_plan_is_made_without_libtpu_where_the_devices_are_there(monkeypatch):
    """The same code as for a slice, compiled for four CPU devices."""
    monkeypatch.setattr(compiled, "devices_of", lambda tpu: jax.devices()[:4])
    config = run_config({"mesh_dim": "1,4,1"})
    demand = demand_of_rows(config, 4, 128, 64)
    made = compile_plan(
        config, tiny_llama(), parse_topology("v5p:2x2x1"), demand, work_on(demand, config, 4, 1), steps=10, price=None
    )
    memory = made.memory
    assert memory.moments == pytest.approx(2 * memory.parameters, rel=1e-3) and memory.parameters > 0
    assert as_dict(made)["chips"] == 4 and "seconds a step at least" in as_text(made, "")


@pytest.fixture(scope="module")
def small_plan():
    # No other dimension is as long as a row, so that a buffer of L x L would have a shape of its own.
    llama = dataclasses.replace(
        SIZES["debug"], hidden_size=512, intermediate_size=768, num_attention_heads=4, head_dim=128
    )
    config = run_config({"mesh_dim": "1,2,2"})
    demand = demand_of_rows(config, 4, 1024, 6400)
    tpu = parse_topology("v5p:2x2x1")
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "read_traffic", lambda text: texts.append(text) or read_traffic(text))
        made = compile_plan(config, llama, tpu, demand, work_on(demand, config, 2, 1), steps=100, price=2.0)
    return llama, made, texts[0]


@needs_libtpu
def test_attention_keeps_no_square_of_the_row_length(small_plan):
    text = small_plan[2]
    assert "splash" in text and re.search(r"\[(\d+,)*1024,512\]", text)
    assert not re.search(r"\[(\d+,)*1024,1024\]", text)


@needs_libtpu
def test_a_real_tpu_program(small_plan):
    llama, made, _ = small_plan
    memory = made.memory
    assert memory.fits and memory.moments == pytest.approx(2 * memory.parameters, rel=1e-3)
    assert memory.parameters + memory.moments < memory.peak < memory.hbm
    assert made.flops > made.useful_flops > 0
    # Weights are gathered in bf16 in the forward and the backward pass, by one of two chips from the other.
    weights = 2 * (training_flops(llama, 1, 0) / 6) / 2 / 2
    assert made.traffic.total > 2 * weights
    assert made.traffic.unknown_loops == 0
    assert 0 < made.mfu < 1
    assert made.cost == pytest.approx(100 * made.roofline.step / 3600 * 4 * 2.0)


@needs_libtpu
def test_reports_of_a_real_plan(small_plan):
    _, made, _ = small_plan
    found = json.loads(json.dumps(as_dict(made)))
    assert found["fits"] and found["bytes"]["hbm"] == int(95.73 * GIB) and found["cost"] == made.cost
    text = as_text(made, "")
    assert "FITS" in text and "all-gather" in text and f"${made.cost:,.2f}" in text
    assert "v5p:2x2x1" in search_table([made], [], 100, priced=True)


@needs_libtpu
def test_a_step_too_large_is_refused_with_the_gap():
    config = run_config({"mesh_dim": "1,4,1"})
    demand = demand_of_rows(config, 16, 4096, 64)
    tpu = parse_topology("v5e:2x2")
    made = compile_plan(config, SIZES["llama3.1-8b"], tpu, demand, work_on(demand, config, 4, 1), steps=1, price=None)
    assert not made.memory.fits and "too much" in made.memory.refused
    assert "DOES NOT FIT" in as_text(made, "") and as_dict(made)["bytes"]["peak"] is None


@needs_libtpu
@pytest.mark.parametrize("name", ["v6e:4x4", "v5e:4x8", "v5p:2x2x4", "v4:4x4x4"])
def test_every_mesh_of_the_search_lies_on_the_torus(name):
    tpu = parse_topology(name)
    for mesh in search.meshes(SIZES["llama3.1-70b"], tpu.chips):
        assert make_mesh(",".join(map(str, mesh)), devices_of(tpu)).size == tpu.chips


@needs_libtpu
@pytest.mark.slow
def test_seventy_billion_on_32_chips():
    config = RunConfig()
    demand = demand_of_rows(config, 64, 4096, 60_908)
    tpu = parse_topology("v5p:2x4x4")
    made = compile_plan(
        config, SIZES["llama3.1-70b"], tpu, demand, work_on(demand, config, 32, 1), steps=951, price=None
    )
    assert made.memory.fits and made.memory.peak < 60 * GIB
    assert made.traffic.unknown_loops == 0
