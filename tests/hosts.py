"""Several hosts with addresses of their own on this machine, each a node of one Ray cluster: network
namespaces on one bridge.

    10.213.77.1       host 0, the head: no CPUs, jobs at http://10.213.77.1:8265
    10.213.77.2 ...   host 1 to 3: one CPU each
    10.213.77.254     this machine, which looks at the cluster from outside

All share this machine's disk, as hosts of a cluster share their storage. A host can be killed, cut off,
mended and started again. Needs root and iproute2. `python -m tests.hosts` is the undertaker: it waits until
the process that made the hosts lets go of it or dies, and removes them. Cost: a head and three hosts in about
20 s.
"""

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from trifold.launch.recipe.reader import CLONE

SUBNET, BRIDGE, LINK, HOST = "10.213.77", "trifold0", "trifold-v", "trifold-host"
STATE = Path("/tmp/trifold-hosts")  # short: Ray keeps sockets below it, whose paths may have 107 characters
HEALTH = {
    "initial_delay_ms": 2000,
    "period_ms": 1000,
    "timeout_ms": 2000,
    "failure_threshold": 3,
}  # as in configs/cluster/


class Hosts:
    """`with Hosts(3) as hosts:` a head and three hosts, each a Ray node behind the token in
    `hosts.environment`.
    """

    def __init__(self, number: int) -> None:
        self.number, self.jobs, self.address = number, f"http://{SUBNET}.1:8265", f"{SUBNET}.1:6379"
        self.environment = dict(os.environ) | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(CLONE),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "*",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(STATE / "token"),
            "RAY_API_SERVER_ADDRESS": self.jobs,
            "RAY_USAGE_STATS_ENABLED": "0",
            # else workers stand behind whatever this machine does besides, as they would not on their own
            # host
            "RAY_worker_niceness": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            **{f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()},
        }

    def __enter__(self) -> "Hosts":
        self._lock = open("/tmp/trifold-hosts.lock", "w")  # one cluster at a time
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        remove()  # what a killed machine left
        self._undertaker = subprocess.Popen(
            [sys.executable, "-m", "tests.hosts"],
            cwd=CLONE,
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[self._lock.fileno()],
        )
        try:
            STATE.mkdir(mode=0o700)
            (STATE / "token").write_text(secrets.token_hex(32))
            _do(
                f"ip link add {BRIDGE} type bridge",
                f"ip addr add {SUBNET}.254/24 dev {BRIDGE}",
                f"ip link set {BRIDGE} up",
            )
            for host in range(self.number + 1):
                self._make(host)
            self.start(0)
            for host in range(1, self.number + 1):
                self.start(host)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._undertaker.stdin
        self._undertaker.stdin.close()
        self._undertaker.wait(60)
        self._lock.close()

    def start(self, host: int, alone: Path | None = None, **changed: str) -> None:
        """Start (again) the Ray node of a host, under its own host name and session folder; RuntimeError with
        its last words.

        `alone`: a folder of which this host sees an empty one of its own; `changed`: environment variables of
        its Ray.
        """
        head = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--dashboard-port=8265", "--num-cpus=0"]
        which = [f"--address={self.address}", "--num-cpus=1"] if host else head
        ray = [
            "ray",
            "start",
            *which,
            f"--node-ip-address={SUBNET}.{host + 1}",
            f"--temp-dir={STATE}/{host}",
            "--disable-usage-stats",
        ]
        ray += ["--object-store-memory=100000000", "--memory=3000000000"]
        own = (
            f"mount -t tmpfs none {alone} && " if alone else ""
        )  # `ip netns exec` has made a mount namespace too
        named = ["unshare", "-u", "sh", "-c", f'hostname host-{host} && {own}exec "$@"', "sh"]
        done = subprocess.run(
            ["timeout", "90", "ip", "netns", "exec", f"{HOST}{host}", *named, *ray],
            env=self.environment | changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"host {host} did not start: {done.stdout[-2000:]}")

    def kill(self, host: int) -> None:
        """The machine loses power: every process of it is killed at once."""
        _kill(f"{HOST}{host}")

    def cut(self, host: int) -> None:
        """Take its link away: it lives on, and nobody hears of it."""
        _do(f"ip link set {LINK}{host} down")

    def mend(self, host: int) -> None:
        """Give its link back."""
        _do(f"ip link set {LINK}{host} up")

    def on(self, host: int, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end."""
        return subprocess.run(
            ["ip", "netns", "exec", f"{HOST}{host}", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def _make(self, host: int) -> None:
        _do(
            f"ip netns add {HOST}{host}",
            f"ip link add {LINK}{host} type veth peer name eth0 netns {HOST}{host}",
            f"ip link set {LINK}{host} master {BRIDGE} up",
            f"ip -n {HOST}{host} addr add {SUBNET}.{host + 1}/24 dev eth0",
            f"ip -n {HOST}{host} link set eth0 up",
            f"ip -n {HOST}{host} link set lo up",
        )


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "hosts are network namespaces, which only root makes"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "hosts need iproute2 and util-linux (the commands ip and unshare)"
    probe = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    return f"no network namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def remove() -> None:
    """Remove all hosts with their processes, the bridge, and their folder; links first, so that no goodbye is
    waited for.
    """
    links = subprocess.run(
        ["ip", "-o", "link", "show", "type", "veth"], capture_output=True, text=True
    ).stdout
    for name in (line.split(": ")[1].split("@")[0] for line in links.splitlines()):
        if name.startswith(LINK):
            _do(f"ip link del {name}")
    for name in (
        line.split()[0]
        for line in subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True
        ).stdout.splitlines()
    ):
        if name.startswith(HOST):
            _kill(name)
            _do(f"ip netns del {name}")
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        _do(f"ip link del {BRIDGE}")
    shutil.rmtree(STATE, ignore_errors=True)


def _kill(namespace: str) -> None:
    """Every process of a namespace, until none is left (one may be starting another)."""
    deadline = time.monotonic() + 20
    while pids := subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True
    ).stdout.split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{namespace} keeps processes: {pids}")
        time.sleep(0.05)


def _do(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.read()
    remove()
