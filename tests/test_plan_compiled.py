"""A plan of a compiled program: on emulated devices and, with libtpu, of real TPU programs."""

import dataclasses
import importlib.util
import json
import re

import jax
import pytest
from runs import run_config, tiny_llama

from easyrm.chips import GIB, training_flops
from easyrm.config import RunConfig
from easyrm.models.config import SIZES
from easyrm.planning import compiled, search
from easyrm.planning.compiled import compile_plan
from easyrm.planning.hlo import read_traffic
from easyrm.planning.report import as_dict, as_text, search_table
from easyrm.planning.topology import devices_of, parse_topology
from easyrm.planning.workload import demand_of_rows, work_on
from easyrm.sharding import make_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is absent: it is in the tpu extra, not in test"
)


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
