import pytest

from tests.dist.pool import Pool


def pytest_collection_modifyitems(items):
    """All tests with processes run on one xdist worker, so that there is one pool."""
    for item in items:
        if "tests/dist" in str(item.path):
            item.add_marker(pytest.mark.dist)
            item.add_marker(pytest.mark.xdist_group("dist"))


@pytest.fixture(scope="session")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()
