"""What `autopar serve` refuses before it starts processes and reads a model."""

import json

import pytest

from tests.commands import run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").touch()
    return str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "99999999"), "--port 99999999 is no port: they are 1 to 65535"),
        (("--port", "-1"), "--port -1 is no port: they are 1 to 65535"),
        (("--mesh", "pipe=2"), "mesh pipe=2 has 2 pipeline stages, which are of training"),
        (("--mesh", "pipe=2,gpu=2"), "give the axis another name than pipe"),
        (("--mesh", "99999999999"), "has 99,999,999,999 devices, and one host starts a process"),
        (("--mesh", "2xx"), "cannot read mesh '2xx'"),
        (("--quantize", "int3"), "int3"),
    ],
)
def test_bad_options(folder, arguments, message):
    assert message in run("serve", folder, *arguments, code=2).stderr


def test_folders_without_a_model(tmp_path):
    assert "is no folder" in run("serve", str(tmp_path / "no"), code=2).stderr
    assert "has no config.json: give" in run("serve", str(tmp_path), "--mesh", "2", code=2).stderr
    (tmp_path / "config.json").touch()
    assert "no weights in safetensors" in run("serve", str(tmp_path), code=2).stderr
