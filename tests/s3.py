"""An S3-protocol server on loopback for tests: tests/s3_server.py in a Python environment of its own, because
it needs older packages.

`faults` make it misbehave, as that file says; `requests` is what was asked of it, a line each.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(sys.prefix) / "s3-server" / "bin" / "python"
PROGRAM = Path(__file__).with_name("s3_server.py")


class Server:
    """A running server; its client's settings are in this process's environment, where obstore reads them."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port, self.file, self.log = port, folder / "faults.json", folder / "requests.txt"
        self.faults()

    def faults(self, **facts: Any) -> None:
        fresh = self.file.with_suffix(".fresh")
        fresh.write_text(json.dumps(facts))
        fresh.replace(self.file)

    def requests(self) -> list[str]:
        return self.log.read_text().splitlines()

    def bucket(self, name: str) -> str:
        """The URL of a new bucket."""
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        ).close()
        return f"s3://{name}"


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """Start the server; skip the test where its environment was not made."""
    if not PYTHON.exists():
        pytest.skip(f"no S3 server in {PYTHON.parent.parent}: `make s3-server` installs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(folder, port)
    process = subprocess.Popen(
        [PYTHON, PROGRAM, str(port), server.file, server.log], stderr=(folder / "server.txt").open("w")
    )
    names = {
        "ENDPOINT": f"http://127.0.0.1:{port}",
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update({f"AWS_{name}": value for name, value in names.items()})
    try:
        _until_it_listens(process, port)
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.kill()
        process.wait()


def _until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    while process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server ended with {process.returncode}")
