"""The only training loop: step, record, evaluate, save.

In: an engine, a loader of packed rows, a checkpointer, a recorder. Out: metrics, events and checkpoints in the run folder. Fine-tuning runs
this same loop. The loop knows no Ray and no DeepSpeed, and nothing in it depends on the number of ranks beyond rounding.
"""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from modeling.config import Refused
from pretrain.checkpoint import State
from pretrain.config import Training
from pretrain.engine import Engine
from pretrain.evaluate import part_losses
from pretrain.loader import Loader, StepRows
from pretrain.metrics import Recorder
from pretrain.optimizer import lr_factor
from pretrain.saving import Checkpointer


@dataclass
class Progress:
    """Where a run stands: all that a resumed run needs besides weights and moments."""

    step: int = 0  # finished optimizer steps, skipped ones included
    tokens: int = 0  # read so far, padding left out
    nonfinite: int = 0  # skipped steps in a row


def train(
    config: Training,
    engine: Engine,
    loader: Loader,
    checkpointer: Checkpointer,
    recorder: Recorder,
    progress: Progress,
    *,
    score: Callable[[bool], dict[str, Any]],
    describe: Callable[[Progress, dict[str, Any]], State],
    flops: Callable[[int], float],
    peak_flops: float,
    enough: Callable[[], bool] = lambda: False,
    parts: Sequence[str] = (),
) -> None:
    """Train from `progress.step` to `config.steps`, or until a stop is asked for (SIGTERM, or a file `stop` in the run folder).

    `score(complete)` evaluates; `describe(progress, scores)` makes the state a checkpoint records; `flops(step)` are those of all ranks;
    `enough()` ends training before its last step, on all ranks alike; `parts` names those of a mixture of objectives.
    Raises Refused after `nonfinite_limit` steps in a row whose loss or gradient was not finite.
    """
    stop = StopRequest(Path(config.run))
    scores: dict[str, Any] = {}
    saved = progress.step
    for rows in loader:
        start = time.perf_counter()
        count, tokens, rows_hash, stopping = _agree(engine, rows, stop.asked())
        if stopping or enough():
            break
        factor = lr_factor(config.schedule, rows.step, config.steps)
        seeds = [micro_seed(config.seed, index) for index in rows.micro_indices]
        step = engine.train_step(rows.micros, seeds, count, factor)

        progress.step, progress.tokens = rows.step + 1, progress.tokens + tokens
        progress.nonfinite = 0 if step.finite else progress.nonfinite + 1
        seconds = time.perf_counter() - start
        recorder.metrics(
            progress.step,
            loss=step.loss,
            lr=config.optimizer.lr * factor,
            grad_norm=step.grad_norm,
            tokens=progress.tokens,
            tokens_per_s=tokens / seconds,
            mfu=flops(rows.step) / seconds / peak_flops,
            seconds=seconds,
            peak_bytes=engine.meter.peak(),
            stage=rows.stage,
            rows=[rows.first, rows.last],
            rows_hash=f"{rows_hash:012x}",
            skipped=not step.finite,
            **part_losses("", parts, step.part_sums, step.part_counts),
        )
        if not step.finite:
            _refuse_nonfinite(config, recorder, progress, rows)

        finished = progress.step == config.steps
        if finished or progress.step % config.evaluate_every == 0:
            scores = score(finished)
            recorder.metrics(progress.step, **scores)
        if finished or progress.step % config.checkpoints.every == 0:
            _save(checkpointer, engine, describe(progress, scores))
            scores, saved = {}, progress.step
    if saved < progress.step:
        _save(checkpointer, engine, describe(progress, scores))
    checkpointer.wait()
    if checkpointer.failed is not None:
        raise Refused(f"step {progress.step} was trained but not saved: {checkpointer.failed}. Make room and run the same command again.")
    recorder.event("finished" if progress.step == config.steps or enough() else "stopped", step=progress.step)


def micro_seed(seed: int, micro: int) -> int:
    """The seed of the randomness inside the model (dropout) for one micro of the run, whichever rank computes it."""
    return int(np.random.SeedSequence([seed, micro]).generate_state(1, np.uint64)[0] >> 1)


def _save(checkpointer: Checkpointer, engine: Engine, state: State) -> None:
    checkpointer.wait()  # before the copy is made, so that memory never holds two
    checkpointer.save(state, engine.slices())


class StopRequest:
    """Somebody asked this run to save and stop: SIGTERM to this process, or a file `stop` in the run folder."""

    def __init__(self, run: Path) -> None:
        self.file, self.terminated = run / "stop", False
        try:
            signal.signal(signal.SIGTERM, self._terminate)
        except ValueError:  # not the main thread of its process (Ray's worker threads): the file remains
            self.terminated = False

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

    def asked(self) -> bool:
        return self.terminated or self.file.exists()


def _agree(engine: Engine, rows: StepRows, stop: bool) -> tuple[int, int, int, bool]:
    """What all ranks must know before the first backward: valid targets, tokens and row hash of the whole step, and whether to stop."""
    mine = torch.tensor([rows.count, rows.tokens, rows.hash % 2**48, int(stop)], dtype=torch.int64)
    count, tokens, rows_hash, stopping = engine.sum_over_ranks(mine).tolist()
    return count, tokens, rows_hash % 2**48, stopping > 0


def _refuse_nonfinite(config: Training, recorder: Recorder, progress: Progress, rows: StepRows) -> None:
    """Record a step that no rank applied; give up after too many in a row."""
    recorder.event("skipped", step=progress.step, rows=[rows.first, rows.last], in_a_row=progress.nonfinite)
    if progress.nonfinite >= config.nonfinite_limit:
        raise Refused(
            f"step {progress.step} (rows {rows.first} to {rows.last}) is the {progress.nonfinite}th in a row whose loss or gradient is"
            f" not finite (nonfinite_limit is {config.nonfinite_limit}). Lower optimizer.lr, or train in fp32, and continue from the"
            f" newest checkpoint in {config.run}."
        )
