"""Writing a small file so that a reader, or the next start, finds the old one or the new one and never half of it."""

import os
import tempfile

from etils import epath


def write_atomically(path: epath.Path, text: str) -> None:
    """Replace `path` by `text`. A local file is written beside it and renamed; object stores do so by themselves."""
    if "://" in str(path):
        path.write_text(text)
        return
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_UMASK)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


_UMASK = os.umask(0)  # mkstemp gives its files to their owner alone; there is no way but this to read the umask
os.umask(_UMASK)
