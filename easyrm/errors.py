"""The exceptions that commands print as one line instead of a traceback."""


class InputError(ValueError):
    """Bad input: a flag, a file or a value. The message is one line that names the thing, the value and the way out.

    Commands print the message and exit with status 2; any other exception is a defect and keeps its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not a number; the message names the step, its pairs and the last checkpoint."""
