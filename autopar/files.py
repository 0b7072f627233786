"""Atomic writes of files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable(path: str | Path) -> None:
    """Refuse a path that cannot be written, before the work whose result goes there.

    Raises:
        OSError: naming the path.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, and a file is to be written there")
    folder = next(p for p in path.absolute().parents if p.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror} ({folder})") from error


def write_atomically(path: str | Path, text: str, *, durably: bool = False) -> None:
    """Write a file. On failure, a file that is already there does not change.

    Args:
        durably: it is on the drive when this returns, also if the machine loses power then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if durably:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
