"""Commands of autopar, run in this process."""

from click.testing import Result
from typer.testing import CliRunner

from autopar.cli.app import app


def run(*arguments: str, code: int = 0) -> Result:
    """Run a command, which ends with that exit code."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result
