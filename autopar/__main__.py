"""`python -m autopar` is the `autopar` command."""

from autopar.cli.app import app

app(prog_name="autopar")
