"""What needs a GPU is skipped where there is none, and long tables of cases are sampled."""

import gc
import random
from collections import defaultdict

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run all cases of sampled tests")


def pytest_configure() -> None:
    # Full collections scan all that a worker has kept, for 0.9 s each: a sixth of all tests' time.
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1000)


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether samples are to be large."""
    return bool(pytestconfig.getoption("--thorough"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
    by_name = any("[" in argument for argument in config.args)
    if not (by_name or config.getoption("--thorough")):
        _sample(config, items)


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases of tests that are marked `sample(share)`.

    Which stay depends on the test's name and its number of cases alone, so all workers and all runs
    have the same ones.
    """
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            tests[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for test, cases in tests.items():
        (share,) = cases[0].get_closest_marker("sample").args
        kept = random.Random(test).sample(cases, max(1, round(share * len(cases))))
        left_out |= set(cases) - set(kept)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
