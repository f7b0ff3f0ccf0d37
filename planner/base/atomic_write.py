"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

_LONGEST_NAME = 180  # bytes; what stands around it must fit into a file's name, too


def write_whole(path: Path, content: str | bytes) -> None:
    """Write to a file next to ``path`` and move it there once complete; text as UTF-8.

    A symbolic link stays, and its target is written. An existing file passes its
    permissions on. What a killed process left behind is removed when the same file is
    written again.

    Raises
    ------
    OSError
        When it cannot be written; the previous content is still there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    _clear_partials(target)
    try:
        with _partial(target) as (handle, partial):
            with os.fdopen(handle, "wb", closefd=False) as stream:
                stream.write(data)
            if mode is not None:
                os.chmod(partial, mode)
            os.fsync(handle)
            os.replace(partial, target)
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        # The user named the file, not the partial file next to it.
        raise OSError(error.errno, f"{error.strerror}; nothing was written", str(path)) from error


def _mode_of(target: Path) -> int | None:
    """Return the permissions of the file that will be replaced; ``None`` where there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file, so it is not replaced", str(target))
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is write-protected", str(target))
    return stat.S_IMODE(mode)


def _stem(target: Path) -> str:
    """Return the stem of a target's partial files; hashed where it is too long."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[tuple[int, Path]]:
    """Open a new file next to the target, locked while it is written and removed on failure."""
    while True:
        partial = target.with_name(f".{_stem(target)}.{secrets.token_hex(8)}.partial")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        handle = os.open(partial, flags, 0o666)  # less the umask
        if _lock(handle) and _still_there(handle, partial):
            break
        os.close(handle)  # another writer took it for a killed process's file
    try:
        yield handle, partial
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    finally:
        os.close(handle)


def _clear_partials(target: Path) -> None:
    """Remove what killed writers of a target left: files that nobody holds locked."""
    prefix, suffix = f".{_stem(target)}.", ".partial"
    try:
        names = os.listdir(target.parent)
    except OSError:
        return  # reported where the file is written
    for name in names:
        token = name[len(prefix) : -len(suffix)]
        if name.startswith(prefix) and name.endswith(suffix) and _is_token(token):
            with contextlib.suppress(OSError):  # it belongs to another process, or is gone
                _unlink_unlocked(target.with_name(name))


def _unlink_unlocked(partial: Path) -> None:
    handle = os.open(partial, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if _lock(handle, without_locks=False) and _still_there(handle, partial):
            os.unlink(partial)
    finally:
        os.close(handle)


def _lock(handle: int, *, without_locks: bool = True) -> bool:
    """Lock a file until it is closed; return ``without_locks`` where there are no locks."""
    if fcntl is None:
        return without_locks
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks  # of this file system
    return True


def _still_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _is_token(text: str) -> bool:
    return len(text) == 16 and all(c in "0123456789abcdef" for c in text)
