"""The command line for tests: inside the test's process, which saves the seconds of importing torch, or as a
process of its own, to which signals can be sent.
"""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from trifold.launch.cli import main
from trifold.launch.demo.world import write_world

TINY = """
model: {family: decoder, vocab_size: 500, dim: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2,
  head_dim: 16, mlp_dim: 64, max_positions: 64}
data: {sources: [{path: world/train.txt}], heldout: [{path: world/heldout.txt}], row_length: 64}
objective: {kind: causal}
optimizer: {lr: 1e-3}
schedule: {kind: wsd}
run: run
steps: 4000
step_rows: 2
micro_rows: 1
evaluate_every: 4000
evaluate_rows: 2
cluster: {workers: 0, threads_per_worker: 1}
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


def trifold(folder: Path, *arguments: str) -> Result:
    """Run a command in `folder`: its exit code, stdout and stderr."""
    out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os.environ.clear()
            os.environ.update(environment)
    return Result(code, out.getvalue(), err.getvalue())


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trifold.launch.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_tiny(folder: Path) -> Path:
    """A small recipe, tiny.yaml, and its corpus; returns the folder."""
    write_world(folder / "world", train=300, heldout=20)
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def until(holds: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait while a process runs until `holds()`."""
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
