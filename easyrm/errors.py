"""The exceptions that commands print as one line instead of a traceback, and others in one line."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: a flag, a file or a value. The message is one line that names the thing, the value and the way out.

    Commands print the message and exit with status 2; any other exception is a defect and keeps its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """Training met a loss, gradient or parameter that is not a finite number; the message names the step and its pairs.

    `step` is the first such step; `before` says whether the state was kept as it was before it.
    """

    def __init__(self, message: str, step: int, *, before: bool):
        super().__init__(message)
        self.step, self.before = step, before


class SaveFailed(RuntimeError):
    """A checkpoint could not be written where one was required; the message names the step and the newest one."""


class Unavailable(RuntimeError):
    """What a run needs does not answer now: a bucket, the hub. The message says what.

    Commands exit with status 69, which sysexits.h calls EX_UNAVAILABLE, as where a process is lost: it may pass, and
    whoever starts lost runs again starts this one.
    """

    STATUS = 69


class HostMissing(Unavailable):
    """Not all processes of a run came in time, for a host may only be slow; the message says where to look."""


class Resumable(SystemExit):
    """The run ended early and in good order: the same command goes on from what is saved.

    Commands print the message and exit with status 75, which sysexits.h calls EX_TEMPFAIL: try again. It is no
    Exception, so that nothing takes a stop for a failure.
    """

    STATUS = 75

    def __init__(self, message: str, *, at_once: bool = False):
        """`at_once`: raised in the middle of anything, by a signal; the process ends without Python's own farewell."""
        super().__init__(self.STATUS)
        self.message, self.at_once = message, at_once

    def __str__(self) -> str:
        return self.message


TOLD = (InputError, NonFiniteLoss, SaveFailed, Unavailable, Resumable)  # their message is all that a person needs


def one_line(error: BaseException) -> str:
    """The first line of what `error` says, shortened, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def writing(flag: str) -> Iterator[None]:
    """Around what is written under the value of `flag` (--NAME=VALUE): says that it cannot be.

    Raises InputError, or Unavailable where it is a bucket's and may pass. There any exception is taken for one of
    writing, for a bucket's client has errors of its own; of a local directory, OSError is.
    """
    try:
        yield
    except TOLD:
        raise
    except Exception as error:
        remote = "://" in flag
        if not remote and not isinstance(error, OSError):
            raise
        lasting = isinstance(error, PermissionError | FileNotFoundError) or str(error).startswith("Forbidden")  # gcsfs
        if remote and not lasting:
            raise Unavailable(f"{flag} cannot be written now ({one_line(error)})") from error
        raise InputError(f"{flag} cannot be written ({error}); free space, or choose another directory") from error
