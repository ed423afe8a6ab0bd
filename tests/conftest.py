"""What several tests share: one Ray cluster for the whole session (about 5 s to start)."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The local cluster that the first `cluster.run` starts serves all later ones (three CPUs); stopped when the session ends."""
    yield
    import ray

    ray.shutdown()
