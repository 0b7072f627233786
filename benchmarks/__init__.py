"""Measurements of autopar, one module each: `python -m benchmarks.NAME [--quick] [--json FILE]`."""
