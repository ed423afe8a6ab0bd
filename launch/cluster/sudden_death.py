"""A report when the driver's own process is ended from outside.

Ray's C++ code ends the driver without an exception when its raylet or GCS was killed; kill -9 does the same.
A small forked process waits for that: it writes the failure report and the command that resumes the run to
stderr and failures.log.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trifold.launch.cluster.failure_report import Cause, last_lines, render
from trifold.launch.recipe.schema import AnyRecipe, resume_command
from trifold.launch.terminal import visible
from trifold.pretrain.monitor.heartbeat import RankStatus
from trifold.pretrain.monitor.run_folder import log_event

REASON = "the driver was ended from outside: it was killed, or Ray's raylet or GCS was"
TIME_LIMIT = 30  # seconds for the report


@contextmanager
def reported_if_killed(config: AnyRecipe) -> Iterator[None]:
    """While inside, the sudden end of this process leaves a report."""
    read, write = os.pipe()  # not inherited by programs that this process starts
    watcher = os.fork()
    if watcher == 0:
        os.close(write)
        _watch(config, read)
    os.close(read)
    try:
        yield
    finally:
        os.write(write, b"returned")
        os.close(write)
        os.waitpid(watcher, 0)


def _watch(config: AnyRecipe, read: int) -> None:
    """The forked process. It uses no lock that another thread may have held at the fork."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # sockets to Ray among them: it must see that the driver is gone
    os.closerange(3, read)
    os.closerange(read + 1, os.sysconf("SC_OPEN_MAX"))
    status = 0
    try:
        if not os.read(read, 1):  # the end of the pipe: the driver is gone
            _report(config)
    except BaseException as error:
        os.write(2, f"trifold: {REASON}; the report failed: {error!r}\n".encode())
        status = 1
    finally:
        os._exit(status)


def _report(config: AnyRecipe) -> None:
    folder = Path(config.run)
    signal.alarm(TIME_LIMIT)
    if config.checkpoints.storage is None:
        report = render(config, config.cluster.workers, Cause(None, REASON), None, _log_of)
    else:  # a client of an object store does not work after a fork
        report = f"the run failed: {REASON}. Continue with: {resume_command(config)}"
    log_event(folder, "failed", rank=None, error=REASON, workers=config.cluster.workers)
    with (folder / "failures.log").open("a", encoding="utf-8") as log:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {report}\n\n")
    os.write(2, f"trifold: {visible(report)}\n".encode())


def _log_of(status: RankStatus) -> list[str]:
    return last_lines(status.log) if os.path.exists(status.log) else []
