"""The plan: its arithmetic, its rows, its search, and what it refuses."""

import dataclasses
import functools
import importlib.util
import re

import jax
import pytest
from runs import call, make_world, run_config, tiny_llama

from easyrm import plan
from easyrm.chips import GIB, PEAK_BF16_FLOPS, TPUS, model_weights
from easyrm.data.packing import RowShape
from easyrm.errors import InputError
from easyrm.models.config import SIZES
from easyrm.plan import Request, demand_of, prices_of
from easyrm.planning import search, topology
from easyrm.planning.compiled import Memory, Plan, describe_refusal
from easyrm.planning.estimate import Roofline, hbm_traffic, roofline
from easyrm.planning.topology import SLICES, devices_of, parse_topology
from easyrm.planning.workload import Work, demand_of_rows, read_demand, typical_demand, work_on
from easyrm.sharding import make_mesh
from easyrm.training.optimizer import OptimizerConfig
from easyrm.training.program import abstract_model, bytes_per_device
from easyrm.training.remat import memory_bytes, state_bytes


def test_a_price_that_no_slice_has_is_refused():
    request = Request(topology="v5e:4x4", price="v4=2", rows=0, row_length=0, pair_tokens=0, pairs=0, best=1)
    tpu, llama = parse_topology("v5e:4x4"), SIZES["llama3.1-8b"]
    with pytest.raises(InputError, match="--price=v4=2: it has no price of v5e"):
        plan.plan_one(config_of(), llama, tpu, request)
    with pytest.raises(InputError, match="--price=v4=2: it has no price of any slice"):
        plan.plan_search(config_of(), llama, [tpu], request, print)


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
        ({"recipe": "llama3.1-tulu2-8b-uf", "topology": "v5e:4x4", "total_steps": -1}, "--total_steps=-1"),
        ({"recipe": "llama3.1-tulu2-8b-uf", "topology": "v5e:4x4", "num_epochs": -3}, "--num_epochs=-3"),
        ({"recipe": "llama3.1-tulu2-8b-uf", "topology": "v5e:4x4", "dtype": "fp16"}, "--dtype=fp16"),
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
    assert state_bytes(SIZES["llama3.1-8b"], 8, mu_bytes=4) == pytest.approx(exact, rel=1e-3)


def test_a_first_moment_in_bf16_is_counted_as_that():
    llama, mesh, work = SIZES["llama3.1-8b"], {"dp": 1, "fsdp": 16, "mp": 1}, Work(RowShape(16, 4096), 1, 16, 16)
    fp32, bf16 = (OptimizerConfig(mu_dtype=dtype).mu_bytes for dtype in ("fp32", "bf16"))
    fewer = model_weights(llama) * 2 / 16
    assert state_bytes(llama, 16, fp32) - state_bytes(llama, 16, bf16) == pytest.approx(fewer)
    read_and_written = hbm_traffic(llama, mesh, work, "none", fp32) - hbm_traffic(llama, mesh, work, "none", bf16)
    assert read_and_written == pytest.approx(2 * fewer)


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
    sizes = [memory_bytes(llama, mesh, work.tokens, remat, 4) for remat in ("offload", "nothing_saveable", "none")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    more = dataclasses.replace(work, shape=RowShape(32, 4096), needed=32)
    assert memory_bytes(llama, mesh, more.tokens, "none", 4) > sizes[2]
    assert memory_bytes(llama, mesh, dataclasses.replace(more, micro_batches=2).tokens, "none", 4) == sizes[2]


def test_asking_for_rows_beats_data(tmp_path):
    config = run_config({**make_world(tmp_path), "data.max_length": 320})
    asked = functools.partial(Request, topology="", price="", row_length=0, pair_tokens=0, pairs=0, best=1)
    assert demand_of(config, tiny_llama(), asked(rows=4), 1).fixed == (4, 320)
    assert demand_of(config, tiny_llama(), asked(rows=0), 1).pairs == 48
