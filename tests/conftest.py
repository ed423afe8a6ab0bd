"""What several tests share: one Ray cluster for the whole session (about 5 s to start), and several hosts for a file of tests (20 s)."""

import os
from collections.abc import Iterator

import pytest

from tests.hosts import Hosts, missing

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The local cluster that the first `cluster.run` starts serves all later ones (three CPUs); stopped when the session ends."""
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head and three hosts."""
    if why := missing():
        pytest.skip(why)
    with Hosts(3) as made:
        yield made
