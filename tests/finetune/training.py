"""Fine-tuning runs of tests: run them, kill them at a step, and read what they recorded.

The functions that take a RankInfo are for `run_processes`.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.finetune.small_tasks import write_tags
from trifold.finetune.config import FinetuneConfig
from trifold.finetune.run import train
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.storage.jsonl import read_lines


def fail_on_event(event: str, **facts: object) -> None:
    raise AssertionError(f"{event}: {facts}")


def train_run(rank_info: RankInfo, config: FinetuneConfig) -> None:
    train(config, rank_info)


def train_until_killed(rank_info: RankInfo, config: FinetuneConfig, step: int) -> None:
    """Train; the last rank is killed (SIGKILL) when `step` begins."""
    train_step = Engine.train_step

    def step_or_die(self: Engine, *args: Any) -> Any:
        done = [
            record["step"] for record in read_lines(Path(config.run) / "metrics.jsonl") if "loss" in record
        ]
        if max(done, default=0) >= step and rank_info.rank == rank_info.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, *args)

    Engine.train_step = step_or_die
    train(config, rank_info)


def scores_of(config: FinetuneConfig) -> dict[str, Any]:
    return dict(json.loads((Path(config.run) / "scores.json").read_text()))


def metrics(config: FinetuneConfig) -> dict[str, Any]:
    """The last value of each step's loss, rows and scores."""
    names = ("loss", "rows", "rows_hash", "heldout_loss", "f1")
    return {
        f"{name} {line['step']}": line[name]
        for line in read_lines(Path(config.run) / "metrics.jsonl")
        for name in names
        if name in line
    }


def tags(folder: Path) -> dict[str, Any]:
    write_tags(folder / "train.conll", 300, seed=1)
    write_tags(folder / "dev.conll", 60, seed=2)
    return {"kind": "ner", "train": [str(folder / "train.conll")], "dev": [str(folder / "dev.conll")]}
