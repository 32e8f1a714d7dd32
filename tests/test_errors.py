"""What a command makes of an output that cannot be written: one line, and whether the same command may do."""

import pytest

from easyrm.errors import InputError, NonFiniteLoss, Unavailable, writing


@pytest.mark.parametrize(
    ("flag", "error", "kind"),
    [
        ("--output=here", OSError("disk full"), InputError),
        ("--output_dir=gs://lab/run", OSError("Forbidden: lab/run"), InputError),
        ("--output_dir=gs://lab/run", FileNotFoundError("lab"), InputError),
        ("--output_dir=gs://lab/run", RuntimeError("503"), Unavailable),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(flag, error, kind):
    with pytest.raises((InputError, Unavailable)) as raised, writing(flag):
        raise error
    assert type(raised.value) is kind and str(raised.value).startswith(f"{flag} cannot be written")


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ("--output=here", ZeroDivisionError()),
        ("--output=gs://lab/run", InputError("--x=1: choose 2")),
        ("--output=gs://lab/run", NonFiniteLoss("step 1", 1, before=False)),
    ],
)
def test_what_is_no_failure_to_write_stays_what_it_is(flag, error):
    with pytest.raises(type(error)) as raised, writing(flag):
        raise error
    assert raised.value is error
