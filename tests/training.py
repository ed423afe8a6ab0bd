"""Pretraining runs of tests: run them, kill them or stop them at a step, and read what they recorded.

The functions that take a RankInfo are for `run_processes`.
"""

import os
import signal
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
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


def train_until_killed(rank_info: RankInfo, config: PretrainConfig, step: int) -> None:
    """Train; the last rank is killed (SIGKILL, without a message to the others) when `step` begins."""
    train_step = Engine.train_step

    def step_or_die(self: Engine, micros: Any, *rest: Any) -> Any:
        if len(losses(config.run)) >= step and rank_info.rank == rank_info.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, micros, *rest)

    Engine.train_step = step_or_die
    train(config, rank_info)


def train_run(rank_info: RankInfo, config: PretrainConfig) -> None:
    train(config, rank_info)


def rejections(rank_info: RankInfo, configs: list[PretrainConfig]) -> list[str]:
    """Train one after another: the UserError of each, "" where it trained."""
    messages = []
    for config in configs:
        try:
            train(config, rank_info)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def train_until(rank_info: RankInfo, config: PretrainConfig, stop: int) -> None:
    """Train, and request a stop once step `stop` has been taken."""
    train_step = Engine.train_step

    def train_step_and_stop(self: Engine, *args: Any) -> Any:
        result = train_step(self, *args)
        if self.optimizer_step >= stop and rank_info.rank == 0:
            (Path(config.run) / "stop").touch()
        return result

    Engine.train_step = train_step_and_stop
    try:
        train(config, rank_info)
    finally:
        Engine.train_step = train_step
    (Path(config.run) / "stop").unlink(missing_ok=True)
