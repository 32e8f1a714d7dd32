"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Bad input: a flag, a file or a value. The message is one line that names the thing, the value and the way out.

    Commands print the message and exit with status 2; any other exception is a defect and keeps its traceback.
    """
