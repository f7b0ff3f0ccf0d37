"""Read a whole file of limited size, without ever blocking."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class UnreadableFileError(ValueError):
    """The path is not a regular file, or the file is too large."""


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file.

    A named pipe could block, and a device may have no end: neither is opened. The limit
    holds for the bytes that are read, whatever size the system reports.

    Raises
    ------
    OSError
        When the file cannot be opened or read.
    UnreadableFileError
        When it is not a regular file, or larger than ``max_bytes``.
    """
    _refuse_special(path, os.stat(path).st_mode)
    # The file may have become a pipe meanwhile: open without waiting for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as stream:
        _refuse_special(path, os.fstat(stream.fileno()).st_mode)
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnreadableFileError(f"{path} is too large: at most {max_bytes} bytes are read")
    return data


def _refuse_special(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise UnreadableFileError(f"{path} is not a regular file (a pipe, a socket or a device)")
