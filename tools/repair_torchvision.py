"""Make torchvision importable beside a CPU build of torch. `make venv` runs this in its own .venv.

PyPI's torchvision for Linux is linked against CUDA. Beside a CPU torch its operators cannot load,
and its import then fails where it gives two of them a shape rule; timm and transformers fail with
it. Declaring the two is enough: what is plain Python works, and calling an operator says that it is
missing.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARATIONS = """

# Added by autopar's tools/repair_torchvision.py.
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
"""


def import_error() -> str:
    """The last line that importing torchvision in a fresh interpreter says; empty if it works."""
    run = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False
    )
    return run.stderr.strip().rpartition("\n")[2] if run.returncode else ""


def main() -> None:
    if "operator torchvision::nms does not exist" in import_error():
        package = find_spec("torchvision")
        assert package is not None and package.origin is not None
        with Path(package.origin).with_name("extension.py").open("a") as file:
            file.write(DECLARATIONS)
    if error := import_error():
        sys.exit(f"torchvision does not import beside this torch: {error}")


if __name__ == "__main__":
    main()
