"""Sixteen processes: imported, trained, killed, resumed on eight and exported, as one process would have done it."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY_MODEL, lines_of, make_world, run, start
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from easyrm.peers import PEER_LOST

STEPS, SAVED = 10, 4


def ends_of(processes, timeout):
    """(exit status, output) of each process. All are read at once: a full pipe would stop one."""
    with ThreadPoolExecutor(len(processes)) as pool:
        outputs = list(pool.map(lambda process: process.communicate(timeout=timeout)[0], processes))
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def kill_after(path: Path, process, others):
    """SIGKILL to one process once a checkpoint is complete there, or when something has gone wrong before."""
    until = time.monotonic() + 400
    while not path.exists() and time.monotonic() < until and all(other.poll() is None for other in others):
        time.sleep(0.1)
    process.kill()


def tails(ends):
    """What each process said last, for a message."""
    return "\n".join(f"{index}: {status} ...{output[-400:]}" for index, (status, output) in enumerate(ends))


@pytest.mark.slow
def test_sixteen_processes_are_killed_and_eight_finish_the_run(tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**TINY_MODEL, num_labels=1, pad_token_id=0))
    base.save_pretrained(tmp_path / "base")
    settings = {**make_world(tmp_path), "model.config": "", "model.init_from": str(tmp_path / "base")}
    settings |= {"total_steps": STEPS, "data.batch_size": 16, "export": True, "export_dtype": "fp32"}
    alone = run({**settings, "output_dir": str(tmp_path / "alone")})

    many = {**settings, "output_dir": str(tmp_path / "many"), "save_freq": SAVED, "distributed_timeout": 500}
    sixteen = start(16, {**many, "mesh_dim": "2,4,2"}, devices=1)
    with ThreadPoolExecutor(1) as killer:
        killing = killer.submit(kill_after, tmp_path / "many" / "checkpoints" / str(SAVED), sixteen[11], sixteen)
        ends = ends_of(sixteen, 590)
        killing.result()
    assert [status for status, _ in ends] == [-9 if index == 11 else PEER_LOST for index in range(16)], tails(ends)
    naming = ["lost process 11" in output for _, output in ends]
    assert sum(naming) > 7, tails(ends)  # a starved one may see first that process 0 has ended, which had said why
    assert not (tmp_path / "many" / "export").exists()

    ends = ends_of(start(8, {**many, "mesh_dim": "1,4,2"}, devices=1), 590)
    assert [status for status, _ in ends] == [0] * 8, tails(ends)
    assert f"resumed after step {SAVED} of {STEPS}" in ends[0][1] or f"resumed after step {2 * SAVED}" in ends[0][1]
    lines = lines_of(tmp_path / "many")
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in alone], rtol=1e-5)
    expected = load_file(tmp_path / "alone" / "export" / "model.safetensors")
    found = load_file(tmp_path / "many" / "export" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        moved = np.abs(tensor - before[name]).max()
        assert np.abs(found[name] - tensor).max() < 1e-3 * moved, name  # rounding, of what training changed
