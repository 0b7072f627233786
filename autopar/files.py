"""Atomic writes of files, and YAML."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import yaml


def check_writable(path: str | Path) -> None:
    """Refuse a path that cannot be written, before the work whose result goes there.

    Raises:
        OSError: naming the path.
    """
    path = Path(path)
    if (handle := _written_directly(path)) is not None:
        os.close(handle)
        return
    if _is_other(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"cannot write {path}: permission denied")
        return
    folder = next(p for p in Path(os.path.realpath(path)).parents if p.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror} ({folder})") from error


def write_atomically(path: str | Path, text: str, *, durably: bool = False) -> None:
    """Write a file. On failure, a file that is already there does not change. Devices and pipes are
    written to, and stay what they are.

    Args:
        durably: it is on the drive when this returns, also if the machine loses power then.

    Raises:
        OSError: naming the path.
    """
    path = Path(path)
    try:
        handle = _written_directly(path)
        if handle is not None or _is_other(path):
            with open(path if handle is None else handle, "w", encoding="utf-8") as file:
                file.write(text)
            return
        _replace(Path(os.path.realpath(path)), text, durably)  # what a link names, not the link
    except IsADirectoryError:
        raise
    except FileExistsError as error:  # a file where a folder should be
        raise OSError(f"cannot write {path}: Not a directory") from error
    except OSError as error:  # may name the temporary file, or nothing
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def _written_directly(path: Path) -> int | None:
    """A handle of stdout or stderr if the path names one (`/dev/stdout`), also where it goes to a
    file: what is printed later must come after what is written now."""
    try:
        found = path.stat()
    except OSError:
        return None
    for number in (1, 2):
        try:
            if os.path.samestat(found, os.fstat(number)):
                return os.dup(number)
        except OSError:  # closed
            continue
    return None


def _is_other(path: Path) -> bool:
    """Whether there is a device or a pipe, which a file must not replace.

    Raises:
        IsADirectoryError: there is a directory.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a directory, and a file is to be written there")
    return not stat.S_ISREG(mode)


def _replace(path: Path, text: str, durably: bool) -> None:
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


def read_yaml(path: str | Path) -> Any:
    """The data of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML; names the line.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = str(getattr(error, "problem", error)).partition("\n")[0]
        raise ValueError(f"{path} is not YAML ({where}{problem})") from error
