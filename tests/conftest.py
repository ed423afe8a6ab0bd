"""What several tests share: one Ray cluster for the whole session (about 5 s to start), several hosts for a
file of tests (20 s). And which proofs run: those that have not passed at this commit, or a slice that each
commit begins elsewhere.
"""

import os
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Hosts, missing

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The local cluster that the first `cluster.run` starts serves all later ones (its CPUs: what that
    wanted); stopped at the end.
    """
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--unproven",
        action="store_true",
        help="leave out what has passed at this commit, where no file differs from it",
    )
    parser.addoption(
        "--seconds", type=float, help="begin where this commit says, and start no test after so many seconds"
    )


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--unproven"):
        passed = set(config.cache.get(f"passed/{_git('rev-parse', 'HEAD')}", [])) if config.cache else set()
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]
    if config.getoption("--seconds") and items:
        first = int(_git("rev-parse", "HEAD")[:8] or "0", 16) % len(items)
        items[:] = items[first:] + items[:first]
        config.stash[BEGAN] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if BEGAN in item.config.stash and time.monotonic() - item.config.stash[BEGAN] > item.config.getoption(
        "--seconds"
    ):
        pytest.skip("the seconds of this slice are over: another commit begins elsewhere")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: Any
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        item.config.getoption("--unproven")
        and item.config.cache
        and report.when == "call"
        and report.passed
        and not _git("status", "-s")
    ):
        key = f"passed/{_git('rev-parse', 'HEAD')}"
        item.config.cache.set(key, [*item.config.cache.get(key, []), item.nodeid])
    return report


BEGAN = pytest.StashKey[float]()


def _git(*arguments: str) -> str:
    """What git says; nothing where this is no clone."""
    return subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True
    ).stdout.strip()
