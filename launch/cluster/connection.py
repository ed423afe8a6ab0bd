"""Joining a Ray cluster, or starting one on this machine."""

import logging
import math
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

from trifold.modeling.errors import UserError

START_TRIES = 2  # of a cluster on this machine: at high load Ray's own start fails after 30 s
TOKEN_FILE = "~/.ray/auth_token"
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}


def join(address: str | None = None, cpus: float = 0) -> None:
    """Join the cluster at `address` (HOST:PORT), or start one of at least `cpus` on this machine's loopback
    interface, at free ports (5 s).
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    _protect_token()
    try:
        with _keep_signal_handlers():
            if address is not None:
                host, _, port = address.removeprefix("ray://").rpartition(":")
                _probe_head(host, int(port))
                ray.init(address=address, ignore_reinit_error=True, **QUIET)
            elif not ray.is_initialized():
                _start_here(cpus)
    except Exception as error:  # Ray raises all kinds of exceptions, even plain Exception
        where = (
            f"no Ray cluster answers at {address} (HOST:PORT)"
            if address
            else "Ray could not start on this machine"
        )
        raise UserError(f"{where}: {_reason(error)}.") from error
    _protect_token()  # it was created now, if Ray had none


def _start_here(cpus: float) -> None:
    """Start a cluster that only this machine reaches; once more where the first start fails."""
    # Ray's own switch for "loopback only", which is on by default on Linux
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    num_cpus = max(os.cpu_count() or 1, math.ceil(cpus))
    for remaining in reversed(range(START_TRIES)):
        try:
            ray.init(
                "local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=100 * 2**20, **QUIET
            )
            return
        except Exception:
            ray.shutdown()
            if not remaining:
                raise
            time.sleep(1)


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Ray installs a SIGTERM handler that would exit without a save; put ours back. Ray's processes inherit
    that SIGHUP is ignored: a closed terminal must not end them before the run is saved.
    """
    try:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def _protect_token() -> None:
    """The token lets its reader run code on the cluster: its file is readable by this user alone."""
    file = os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE)
    with suppress(OSError):  # not there, or another user's
        if os.stat(file).st_uid == os.getuid() and os.stat(file).st_mode & 0o077:
            os.chmod(file, 0o600)


def _probe_head(host: str, port: int) -> None:
    """Check that a Ray head listens there and accepts our token; Ray itself would try for 20 s to minutes."""
    with socket.create_connection((host, port), timeout=5) as connection, suppress(TimeoutError):
        connection.settimeout(1)
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        if connection.recv(5) == b"HTTP/":
            raise ValueError(
                "that is a web server, such as the job server (trifold submit); a head listens at port"
                " 6379 by"
                " default"
            )
    with _silence():
        ray._raylet.GcsClient(address=f"{host}:{port}")


@contextmanager
def _silence() -> Iterator[None]:
    """Discard stderr, where Ray's C++ writes warnings under any setting."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _reason(error: BaseException) -> str:
    """A Ray error in one phrase."""
    text = str(error)
    if text.startswith("Version mismatch"):
        versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", text)
        there, here = (" and Python ".join(version) for version in versions)
        return f"it runs Ray {there}, and here are Ray {here}: install the same releases on both sides"
    if isinstance(error, ray.exceptions.AuthenticationError):
        return f"it does not accept this token ({TOKEN_FILE}, or the file in RAY_AUTH_TOKEN_PATH)"
    if isinstance(error, ray.exceptions.RpcError):  # although the port was open
        return "what listens there is not a Ray head"
    return getattr(error, "strerror", None) or first_line(error).partition(". ")[0].removesuffix(".")


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
