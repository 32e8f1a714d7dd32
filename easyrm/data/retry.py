"""Failures of the way to a file, such as a bucket that answers late: tried again, a bounded number of times."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from easyrm.errors import InputError, Unavailable, one_line

TRIES = 5  # in a row without a new record
FIRST_WAIT = 1.0  # seconds before the second try; doubled before each further one
wait = time.sleep

# ValueError: a name that no file can have, or a pipe that cannot be read from its middle.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)
_T = TypeVar("_T")


class Unreachable(Exception):
    """The way to the data failed, not their format; the cause is the client's own error."""


@dataclasses.dataclass
class Position:
    """How far a source has been given out: the next attempt goes on behind `line`.

    `offset` is the byte where that line ends (decompressed), `version` what the file was when its reading began.
    """

    line: int = 0
    offset: int = 0
    version: tuple[int, int] | None = None


@contextlib.contextmanager
def reaching(*passed: type[Exception]) -> Iterator[None]:
    """Makes every exception of a storage client Unreachable, other than InputError and those to be `passed`."""
    try:
        yield
    except (InputError, *passed):
        raise
    except Exception as error:  # each client has error types of its own
        raise Unreachable from error


def steadily(name: str, attempt: Callable[[Position], Iterator[_T]], on_retry: Callable[[str], None]) -> Iterator[_T]:
    """What `attempt` gives, started again behind the last line given wherever it raises Unreachable.

    `on_retry` hears of each further try. Raises InputError for a cause that waiting cannot mend (no such file, no
    permission), and Unavailable after TRIES tries in a row without a new line.
    """
    done, tries = Position(), 0
    while True:
        before = done.line
        try:
            yield from attempt(done)
            return
        except Unreachable as unreachable:
            error = unreachable.__cause__
        tries = 1 + (tries if done.line == before else 0)
        place = f"data {name}: cannot be read" + (f" after line {done.line}" if done.line else "")
        reason = one_line(error)
        if isinstance(error, _LASTING):
            raise InputError(f"{place} ({reason}); check that it is there and may be read") from error
        if tries == TRIES:
            raise Unavailable(f"{place}, {TRIES} tries ({reason}); start again when the storage answers") from error
        seconds = FIRST_WAIT * 2 ** (tries - 1)
        on_retry(f"{place} ({reason}); try {tries + 1} of {TRIES} in {seconds:g} s")
        wait(seconds)


def may_pass(error: BaseException | None) -> bool:
    """Whether an HTTP answer behind `error` is a fault of the server, or says that there were too many requests."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == 429 or status >= 500:
            return True
        error = error.__cause__
    return False
