"""Runs on a cluster of several hosts, and the command line outside of it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.hosts import Hosts
from trifold.pretrain.storage.jsonl import read_lines

RECIPE = {
    "model": {
        "family": "decoder",
        "vocab_size": 400,
        "dim": 16,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
    }
    | {"head_dim": 16, "mlp_dim": 16, "max_positions": 32},
    "data": {"heldout_fraction": 0.05, "row_length": 32},
    "objective": {"kind": "causal"},
    "optimizer": {"lr": 0.01},
    "step_rows": 6,
    "micro_rows": 2,
    "evaluate_every": 1000,
    "evaluate_rows": 4,
    "checkpoints": {"every": 20},
}


def write_recipe(folder: Path, steps: int, **cluster: object) -> Path:
    """A recipe whose run is `folder`/run-NAME, and its text; names differ, because a cluster knows runs by
    name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(
        "\n\n".join(f"Row {i} of the text says {i * 7919 % 1000} and {i % 13}." for i in range(3000))
    )
    recipe = json.loads(json.dumps(RECIPE)) | {
        "run": str(folder / f"run-{folder.name}"),
        "steps": steps,
        "cluster": {"workers": 2, **cluster},
    }
    recipe["data"]["sources"] = [{"path": str(folder / "text.txt")}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def trifold(hosts: Hosts, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """The command line on this machine, which is no host of the cluster."""
    command = [sys.executable, "-m", "trifold.launch.cli", *arguments]
    return subprocess.run(
        command, env=hosts.environment | changed, capture_output=True, text=True, timeout=150
    )


@contextmanager
def following(hosts: Hosts, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that stays; killed at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trifold.launch.cli", *arguments],
        env=hosts.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def step(run: Path) -> int:
    return max((record["step"] for record in read_lines(run / "metrics.jsonl")), default=0)
