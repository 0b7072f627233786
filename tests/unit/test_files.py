"""What is written to a path: files whole or not at all, devices and pipes directly."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from autopar.files import check_writable, write_atomically


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    check_writable(pipe)
    write_atomically(pipe, "text")
    reader.join(10)
    assert read == ["text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("to_file", [False, True])
def test_stdout_is_written_to_in_order(tmp_path, to_file):
    code = (
        "from autopar.files import check_writable, write_atomically\n"
        "check_writable('/dev/stdout')\n"
        "write_atomically('/dev/stdout', 'plan\\n')\n"
        "print('report')\n"
    )
    path = tmp_path / "out"
    command = [sys.executable, "-c", code]
    if to_file:
        with path.open("w") as file:
            subprocess.run(command, stdout=file, check=True)
        text = path.read_text()
    else:
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert text == "plan\nreport\n"


def test_what_a_link_names_is_replaced(tmp_path):
    target, link, loose = tmp_path / "target", tmp_path / "link", tmp_path / "loose"
    target.write_text("old")
    link.symlink_to(target)
    loose.symlink_to("new/target")
    for path in (link, loose):
        check_writable(path)
        write_atomically(path, "text")
        assert path.is_symlink()
        assert path.read_text() == "text"
    assert target.read_text() == "text"


def test_paths_that_cannot_be_written_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for write in (check_writable, lambda path: write_atomically(path, "text")):
        with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a directory, and a file"):
            write(tmp_path)
        with pytest.raises(OSError, match=f"cannot write {file}/plan.json: Not a directory"):
            write(file / "plan.json")
        with pytest.raises(OSError, match=r"cannot write /proc/plan\.json: ") as error:
            write("/proc/plan.json")
        assert ".part" not in str(error.value)
