"""The facts of one node of a cluster as plain values: collected on every node by `trifold doctor`, on
the head by `submit`.

In: this machine, a folder that should be shared, peers to speak to. Out: numbers and text. The machine may
have another Trifold, or none: the top of this file imports the standard library alone, and Ray ships it by
value. Run as a program, `python facts.py PROBE` prints the quick part as one line of JSON (0.1 s).
"""

import fcntl
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

PACKAGES = ("trifold", "torch", "deepspeed", "ray")
SIZES = (2**16, 2**20, 2**24)  # bytes of the timed all-reduces
_WRITTEN = 64 * 2**20  # bytes of the timed write


class Quick(TypedDict):
    host: str
    versions: dict[str, str]  # of Python and PACKAGES; "none" where one is not installed
    shared: bool  # whether it reads the probe in the folder


class Facts(TypedDict):
    host: str
    address: str  # the one that Ray knows it by
    versions: dict[str, str]
    gpus: list[str]  # by nvidia-smi
    driver: str
    cuda_devices: int  # that torch can use
    asked: str  # GLOO_SOCKET_IFNAME, or NCCL_SOCKET_IFNAME on a machine with GPUs
    interface: str  # that collectives will use; "" where there is none
    mtu: int
    memory: tuple[float, float]  # bytes: available, all
    shm: float  # bytes that are free in /dev/shm


class Storage(TypedDict):
    error: str  # "" where the folder could be written
    free: float  # bytes
    rate: float  # bytes/s, forced to disk


class Node:
    """One machine of a cluster. An actor, so that its process is warm when clocks are read and collectives
    timed.
    """

    def facts(self, address: str) -> Facts:
        gpus, driver = _gpus()
        asked, interface = _interface(address, "NCCL" if gpus else "GLOO")
        return {
            "host": socket.gethostname(),
            "address": address,
            "versions": versions(),
            "gpus": gpus,
            "driver": driver,
            "cuda_devices": _cuda_devices() if gpus else 0,
            "asked": asked,
            "interface": interface,
            "mtu": int(Path(f"/sys/class/net/{interface}/mtu").read_text()) if interface else 0,
            "memory": _memory(),
            "shm": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0.0,
        }

    def now(self) -> float:
        return time.time()

    def listen(self, address: str) -> int:
        """A free port of that address, on which this machine listens from now on."""
        self.listener = socket.create_server((address, 0), backlog=4096)
        return self.listener.getsockname()[1]

    def reach(self, peers: list[tuple[str, int]]) -> list[str]:
        """For each (address, port): why it cannot be reached, or ""."""

        def why(peer: tuple[str, int]) -> str:
            try:
                socket.create_connection(peer, timeout=3).close()
            except OSError as error:
                return error.strerror or str(error)
            return ""

        with ThreadPoolExecutor(64) as threads:
            return list(threads.map(why, peers))

    def write(self, probe: str) -> str:
        """Write the probe; why that failed, or ""."""
        try:
            Path(probe).write_text(Path(probe).name)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def read(self, probe: str) -> bool:
        return sees(probe)

    def storage(self, folder: str) -> Storage:
        """How much fits into the folder, and how fast it is written to."""
        path = Path(folder) / f".trifold-speed-{socket.gethostname()}-{os.getpid()}"
        block = os.urandom(2**20)
        try:
            start = time.perf_counter()
            with path.open("wb") as file:
                for _ in range(_WRITTEN // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.perf_counter() - start
            return {"error": "", "free": shutil.disk_usage(folder).free, "rate": _WRITTEN / seconds}
        except OSError as error:
            return {"error": error.strerror or str(error), "free": 0.0, "rate": 0.0}
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def all_reduce(self, rank: int, world: int, meet: tuple[str, int], device: int | None) -> list[float]:
        """Seconds of an all-reduce of each of SIZES among `world` processes; over NCCL where there is a
        `device`.

        They meet where rank 0 listens, on that address alone: torch's own server would listen on all networks
        of its machine.
        """
        if device is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all GPUs from who reserves none
        import torch
        import torch.distributed as dist

        where = "cpu" if device is None else f"cuda:{device}"
        listening = self.listener.detach() if rank == 0 else None
        store = dist.TCPStore(*meet, world, rank == 0, timedelta(seconds=30), master_listen_fd=listening)
        how = "gloo" if device is None else "nccl"
        dist.init_process_group(how, store=store, timeout=timedelta(seconds=30), rank=rank, world_size=world)
        try:
            return [_timed(torch.ones(size // 4, device=where)) for size in SIZES]
        finally:
            dist.destroy_process_group()


def versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return versions


def nearest(folder: Path) -> Path:
    """The folder, or the first of those above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def sees(probe: str) -> bool:
    """Whether this machine reads what another one has written; a network file system may take seconds to show
    it.
    """
    for _ in range(30):
        with suppress(OSError):
            if Path(probe).read_text() == Path(probe).name:
                return True
        time.sleep(0.1)
    return False


def _gpus() -> tuple[list[str], str]:
    """The GPUs' names and the driver's version, by the driver's own program."""
    try:
        lines = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return [], ""
    return [line.split(", ")[0] for line in lines], lines[0].split(", ")[1] if lines else ""


def _cuda_devices() -> int:
    """How many GPUs torch can use, asked in a process of its own: from here Ray hides them."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    ask = [
        sys.executable,
        "-c",
        "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)",
    ]
    output = subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()
    return int(output) if output.isdigit() else 0


def _interface(address: str, library: str) -> tuple[str, str]:
    """What <library>_SOCKET_IFNAME asks for, and the network interface that gloo or NCCL will use.

    Not told, gloo takes the address that the machine's own name resolves to, and the loopback where it
    resolves to none (torch's createDefaultDevice); NCCL looks for one that is not the loopback, which is
    taken to be the node's own.
    """
    asked = os.environ.get(f"{library}_SOCKET_IFNAME", "")
    if asked.startswith("^"):  # NCCL's way to say which it must not take
        asked = ""
    names = {name: _address(name) for _, name in socket.if_nameindex()}
    if asked:
        first = asked.split(",")[0].lstrip("=")
        exact = library == "GLOO" or asked.startswith("=")  # else NCCL takes a prefix
        return asked, next(
            (name for name in names if name == first or (not exact and name.startswith(first))), ""
        )
    wanted = address
    if library == "GLOO":
        try:
            resolved = {
                str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
            }
        except OSError:
            resolved = set()
        wanted = next((ip for ip in names.values() if ip in resolved), "127.0.0.1")
    return "", next(
        (name for name, ip in names.items() if ip == wanted), "lo" if wanted.startswith("127.") else ""
    )


def _address(interface: str) -> str:
    """The IPv4 address of an interface, or ""."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, suppress(OSError):
        answer = fcntl.ioctl(asking, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    return ""


def _memory() -> tuple[float, float]:
    """Bytes that are available and all there are, of the machine or of the container that this runs in."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0]: float(words[1]) for words in lines}
    available, total = 1024 * kib["MemAvailable:"], 1024 * kib["MemTotal:"]
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        limit, used = (
            float(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current")
        )
        available, total = min(available, limit - used), min(total, limit)
    return available, total


def _timed(tensor: "torch.Tensor") -> float:  # type: ignore[name-defined]  # noqa: F821 (torch is imported where it is used)
    """The median of five, after one to warm up."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[2]


if __name__ == "__main__":
    quick: Quick = {"host": socket.gethostname(), "versions": versions(), "shared": sees(sys.argv[1])}
    print("facts " + json.dumps(quick))
