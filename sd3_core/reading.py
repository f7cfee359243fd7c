"""Opening what others gave: a regular file, and no more of it than such a file can have.

A pipe never ends or never begins, /dev/zero fills the memory, to open a device may set it going.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import cut

# Bytes of a file.  Pictures: 179 million pixels, the most that Pillow decodes, stored as they are.
LARGEST_PICTURE = 600 * 10**6
LARGEST_TEXT = 2**28  # a line for each of a million pictures


def open_regular(path: str | Path) -> BinaryIO:
    """The file, opened to be read; only if it is a regular one.  Raises OSError."""
    _check(path, os.stat(path))
    # Between the two looks it may have become a pipe, which must not be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb")
    try:
        _check(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file.  Raises OSError, also for a file of more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > most else file.read(most + 1)  # it may grow meanwhile
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {most:,} are read", str(path))
    return data


def _check(path: str | Path, state: os.stat_result) -> None:
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, socket or device, no regular file", str(path))


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, for a message that names the file itself."""
    return cut(getattr(error, "strerror", None) or error)
