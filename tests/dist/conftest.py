import pytest

from tests.dist.pool import Pool


@pytest.fixture(scope="session")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair():
    """For what is not about the mesh: half the time."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture
def two():
    """Two processes of a test's own, which it may end."""
    pool = Pool(2)
    yield pool
    pool.close()
