"""A trace of the profiler, also where a run stops or goes on within the steps that are asked for."""

import pytest
from etils import epath

from easyrm.training.profile import Profile


@pytest.mark.parametrize(
    ("steps", "traced"),
    [([9, 10, 11, 12, 13, 14], True), ([12, 13, 14], True), ([13], True), ([9, 10, 11], True), ([9, 14, 15], False)],
)
def test_a_trace_is_written_of_the_steps_that_run(tmp_path, steps, traced):
    profile = Profile("10,13", epath.Path(tmp_path))
    for step in steps:
        profile.before(step)
        profile.after(step, {})
    profile.close()
    assert bool(list(tmp_path.glob("profile/**/*.xplane.pb"))) == traced
