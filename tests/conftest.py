"""What tests share: one Ray cluster for the session (about 5 s to start), several hosts for a file (20 s).

It also says which tests run. The marks `slow` and `processes` are set here, not by hand, from the names that
a test reaches: what starts a process, loads a stock class, or trains. Of the proofs, --unproven runs those
that have not passed at this commit, and --seconds a slice that starts at another test for each commit.
"""

import inspect
import os
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from hypothesis import settings

from tests.hosts import Hosts, missing

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A test that reaches one of these names starts a process, ...
STARTS_PROCESSES = frozenset(
    {"run_processes", "subprocess", "multiprocessing", "ray", "ray_cluster", "hosts", "verify_resume"}
)
# ... loads a class of transformers, reads the large schemas of KubeRay, or trains a run.
SLOW_NAMES = STARTS_PROCESSES | {"transformers", "jsonschema"}
TRAINS = ("trifold.pretrain.run.train", "trifold.finetune.run.train")


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


@pytest.hookimpl(tryfirst=True)  # before -m
def pytest_itemcollected(item: pytest.Item) -> None:
    if not isinstance(item, pytest.Function):
        return
    reached: set[str] = set()
    for function in _functions_of(item):
        reached |= _slow_names(function)
    if reached:
        item.add_marker("slow")
    if reached & STARTS_PROCESSES:
        item.add_marker("processes")


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


def _functions_of(item: pytest.Function) -> Iterator[Callable[..., Any]]:
    """The test and its fixtures."""
    yield item.function
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield from (definition.func for definition in definitions)


@cache
def _slow_names(function: Callable[..., Any], callers: tuple[str, ...] = ()) -> frozenset[str]:
    """Which of SLOW_NAMES a function uses, itself or through functions and classes of tests/; "train" where
    it trains a run.
    """
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function.__qualname__ in callers:
        return frozenset()
    names = _names(function.__code__)
    reached = names & SLOW_NAMES

    for name in names:
        value = function.__globals__.get(name)
        module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
        reached |= {module.split(".")[0]} & SLOW_NAMES
        if f"{module}.{name}" in TRAINS:
            reached |= {"train"}
        if not module.startswith("tests."):
            continue
        if isinstance(value, ModuleType):
            members = [vars(value).get(name) for name in names]
        else:
            members = [value, *vars(value).values()] if isinstance(value, type) else [value]
        for member in members:
            member = inspect.unwrap(member) if callable(member) else member  # a cached function, for one
            if isinstance(member, FunctionType):
                reached |= _slow_names(member, (*callers, function.__qualname__))
    return frozenset(reached)


def _names(code: CodeType) -> set[str]:
    """Every name that a function uses, in its inner functions too."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names, *code.co_varnames[: code.co_argcount]}.union(*map(_names, inner))
