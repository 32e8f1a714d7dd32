"""Which activations a run keeps by itself."""

import pytest

from easyrm.models.config import SIZES
from easyrm.planning.topology import devices_of, parse_topology
from easyrm.sharding import make_mesh
from easyrm.training import remat
from easyrm.training.remat import choose_remat


def test_auto_keeps_activations_where_they_fit():
    mesh = make_mesh("1,2,1")
    assert choose_remat(SIZES["debug"], mesh, 4096, 2**30, 4) == "none"
    assert choose_remat(SIZES["debug"], mesh, 4096, 2**24, 4) == "nothing_saveable"


def test_memory_of_this_host():
    assert 2**28 < remat.device_memory(make_mesh("1,8,1")) < 2**44


@pytest.mark.parametrize(("tokens", "expected"), [(512, "none"), (65536, "nothing_saveable")])
def test_memory_of_a_chip_that_is_not_there(tokens, expected):
    pytest.importorskip("libtpu", reason="the tpu extra is not installed")
    mesh = make_mesh("1,16,1", devices_of(parse_topology("v5p:2x2x4")))
    assert choose_remat(SIZES["llama3.1-8b"], mesh, tokens, remat.device_memory(mesh), 4) == expected
