"""Pretraining runs of tests: run them, kill them or stop them at a step, and read what they recorded.

The functions that take a RankInfo are for `run_processes`.
"""

import os
import signal
from pathlib import Path
from typing import Any

from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.run import train
from trifold.pretrain.storage.jsonl import read_lines


def quiet(what: str, done: int) -> None:
    """No progress to show."""


def losses(run: str) -> dict[int, tuple[float, str]]:
    """The loss and the row hash of each step; the last line of a step counts."""
    return {
        r["step"]: (r["loss"], r["rows_hash"]) for r in read_lines(Path(run) / "metrics.jsonl") if "loss" in r
    }


def train_until_killed(place: RankInfo, config: PretrainConfig, step: int) -> None:
    """Train, and let this process's last rank be gone (SIGKILL, no word to anyone) when the step begins."""
    train_step = Engine.train_step

    def step_or_die(self: Engine, micros: Any, *rest: Any) -> Any:
        if len(losses(config.run)) >= step and place.rank == place.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, micros, *rest)

    Engine.train_step = step_or_die
    train(config, place)


def train_run(place: RankInfo, config: PretrainConfig) -> None:
    train(config, place)


def train_until(place: RankInfo, config: PretrainConfig, stop: int) -> None:
    """Train, and ask the run to stop once the step was recorded."""
    record = Engine.train_step

    def ask(self: Engine, *given: Any) -> Any:
        result = record(self, *given)
        if self.optimizer_step >= stop and place.rank == 0:
            (Path(config.run) / "stop").touch()
        return result

    Engine.train_step = ask
    try:
        train(config, place)
    finally:
        Engine.train_step = record
    (Path(config.run) / "stop").unlink(missing_ok=True)
