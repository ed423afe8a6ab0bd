"""The only training loop: step, record, judge, evaluate, save.

`train` takes one rank of a run (session.py), of pretraining or fine-tuning, from where the run is to its
last step. It writes metrics, events and checkpoints into the run folder. The loop knows no Ray and no
DeepSpeed, and nothing in it depends on the number of ranks beyond rounding.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trifold.modeling.errors import UserError
from trifold.pretrain.data.loader import StepRows
from trifold.pretrain.engine.engine import Engine, StepResult
from trifold.pretrain.engine.optimizer import lr_factor
from trifold.pretrain.engine.spikes import consecutive_skips, limit_exceeded, raise_if_stopping, step_limits
from trifold.pretrain.evaluate import member_losses
from trifold.pretrain.monitor.stop_request import StopRequest
from trifold.pretrain.progress import Progress
from trifold.pretrain.session import Run


def train(run: Run) -> None:
    """Train from the newest checkpoint to `config.steps`, or until a stop is requested (see StopRequest).

    Raises UserError where `config.spikes` stops the run at a bad step, and once a save finds its storage
    full or read-only.
    """
    with closing(run.recorder):
        progress = run.restore() or Progress()
        if progress.step == 0:
            run.recorder.metrics(0, **run.evaluate(progress, complete=False))
        _train_steps(run, progress)
        run.finish(progress)


def _train_steps(run: Run, progress: Progress) -> None:
    config, engine, recorder, checkpointer = run.config, run.engine, run.recorder, run.checkpointer
    stop = StopRequest(Path(config.run))
    first_step = saved_step = progress.step
    scores: dict[str, Any] = {}  # of the last evaluation since the last save

    for rows in _iterate_steps(run, progress):
        timer = _Timer()
        run.rank_info.reporter.set_phase(
            "agreeing on a step", step=rows.step + 1, rows=(rows.first, rows.last)
        )
        if checkpointer.permanent_failure:
            _wait_for_save(run, progress)
        counts = _all_reduce_step_counts(engine, rows, stop.asked())
        if counts.stop or run.should_stop_early():
            break

        # Step: one optimizer update with the mean over all ranks' targets, or none where it exceeds the
        # limits.
        factor = lr_factor(config.schedule, rows.step, config.steps)
        seeds = [micro_seed(config.seed, index) for index in rows.micro_indices]
        limits = step_limits(config.spikes, progress.recent)
        step = engine.train_step(rows.micros, seeds, counts.targets, factor, limits)

        # Record: also a step that was not applied.
        run.rank_info.reporter.set_phase("recording")
        seconds, cpu_seconds = timer.elapsed()
        recorder.metrics(
            rows.step + 1,
            lr=config.optimizer.lr * factor,
            tokens=progress.tokens + counts.tokens,
            tokens_per_s=counts.tokens / seconds,
            mfu=run.mfu(rows.step, seconds),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            peak_bytes=engine.meter.peak(),
            rows_hash=f"{counts.rows_hash:012x}",
            **_step_metrics(rows, step, run.member_names),
        )
        recorder.take_queued_scores()
        if rows.step == first_step:
            recorder.event("stepping", step=rows.step + 1)

        # Judge: a bad step stops the run, or is skipped, or the run rolls back and takes it with later rows.
        if not step.applied:
            _record_bad_step(run, progress, rows, limit_exceeded(step.loss, step.grad_norm, limits))
            if config.spikes.policy == "rollback":
                # Without a checkpoint the run stays: its steps so far, taken again, would lead here.
                progress.rewind(run.restore() or progress, skip=(rows.first, rows.last))
                if progress.step < rows.step:
                    scores = {}  # they are of a step that is undone
                continue
        progress.advance(step, counts.tokens, config.spikes.window)

        # Evaluate: on some held-out rows, at the last step on all.
        finished = progress.step == config.steps
        if finished or progress.step % config.evaluate_every == 0:
            scores = run.evaluate(progress, complete=finished)
            recorder.metrics(progress.step, **scores)

        # Save: in the background.
        if finished or progress.step % config.checkpoints.every == 0:
            _save(run, progress, scores)
            scores, saved_step = {}, progress.step
        run.rank_info.reporter.set_phase("reading rows")

    if stop.terminated:
        recorder.event("terminated", rank=run.rank_info.rank, step=progress.step)
    if saved_step != progress.step:  # also where it is lower, after a rollback
        _save(run, progress, scores)
    _wait_for_save(run, progress)
    finished = progress.step == config.steps or run.should_stop_early()
    recorder.event("finished" if finished else "stopped", step=progress.step)


def micro_seed(seed: int, micro: int) -> int:
    """The seed of the randomness inside the model (dropout) for one micro batch of the run, whichever rank
    computes it.
    """
    return int(np.random.SeedSequence([seed, micro]).generate_state(1, np.uint64)[0] >> 1)


def _iterate_steps(run: Run, progress: Progress) -> Iterator[StepRows]:
    """The rows of each step from where the run is. After a rollback they are loaded from the new position."""
    rolled_back = True
    while rolled_back:
        rolled_back = False
        for rows in run.load(progress):
            yield rows
            rolled_back = progress.step != rows.step + 1
            if rolled_back:
                break


class _StepCounts(NamedTuple):
    """Of a step's rows, over all ranks."""

    targets: int
    tokens: int
    rows_hash: int
    stop: bool  # a stop is requested on some rank


def _all_reduce_step_counts(engine: Engine, rows: StepRows, stop: bool) -> _StepCounts:
    """What all ranks must know before the first backward."""
    local = torch.tensor([rows.count, rows.tokens, rows.hash % 2**48, int(stop)], dtype=torch.int64)
    targets, tokens, rows_hash, stops = engine.sum_over_ranks(local).tolist()
    return _StepCounts(targets, tokens, rows_hash % 2**48, stops > 0)


def _step_metrics(rows: StepRows, step: StepResult, member_names: Sequence[str]) -> dict[str, Any]:
    """The metrics of a step that come from its rows and its arithmetic."""
    return {
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "stage": rows.stage,
        "rows": [rows.first, rows.last],
        "skipped": not step.applied,
        **member_losses("", member_names, step.member_losses, step.member_targets),
    }


def _record_bad_step(run: Run, progress: Progress, rows: StepRows, reason: str) -> None:
    """Record a step that no rank applied. Raises UserError where the recipe stops the run here."""
    run.checkpointer.wait()  # a save in flight has good steps, whether the run resumes from it or ends here
    policy = run.config.spikes.policy
    earlier = (
        consecutive_skips(progress.skips, rows.first) if policy == "rollback" else progress.skipped_in_a_row
    )
    in_a_row = earlier + 1
    run.recorder.event(
        "bad_step",
        step=rows.step + 1,
        rows=[rows.first, rows.last],
        reason=reason,
        policy=policy,
        in_a_row=in_a_row,
    )
    raise_if_stopping(run.config, rows.step + 1, rows.first, rows.last, reason, in_a_row)


def _save(run: Run, progress: Progress, scores: dict[str, Any]) -> None:
    run.rank_info.reporter.set_phase("saving")
    state = run.describe(progress, scores)
    run.checkpointer.wait()  # before the copy is made, so that memory never holds two
    run.checkpointer.save(state, run.engine.slices())


def _wait_for_save(run: Run, progress: Progress) -> None:
    """Wait for the last save. Raises UserError where it failed."""
    run.checkpointer.wait()
    if run.checkpointer.failed is not None:
        raise UserError(
            f"step {progress.step} was trained but could not be saved: {run.checkpointer.failed}. Fix this"
            " and rerun the same command."
        )


class _Timer:
    """Seconds since it was made: of the clock, and of this process's CPUs."""

    def __init__(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def elapsed(self) -> tuple[float, float]:
        return time.perf_counter() - self._start, time.process_time() - self._cpu_start
