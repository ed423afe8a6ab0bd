"""The only training loop: step, record, judge, evaluate, save.

In: an engine, the packed rows of each step, a checkpointer, a recorder. Out: metrics, events and checkpoints
in the run folder. Fine-tuning runs this same loop. The loop knows no Ray and no DeepSpeed, and nothing in it
depends on the number of ranks beyond rounding.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import CheckpointState
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.data.loader import StepRows
from trifold.pretrain.engine.engine import Engine, StepResult
from trifold.pretrain.engine.optimizer import lr_factor
from trifold.pretrain.engine.spikes import consecutive_skips, limit_exceeded, raise_if_stopping, step_limits
from trifold.pretrain.evaluate import part_losses
from trifold.pretrain.monitor.metrics import Recorder
from trifold.pretrain.monitor.stop_request import StopRequest


@dataclass
class Progress:
    """Where a run stands: all that a resumed run needs besides weights and moments."""

    step: int = 0  # finished optimizer steps, skipped ones included
    tokens: int = 0  # read so far, padding left out
    skipped_in_a_row: int = 0  # steps in a row that were skipped
    skips: list[tuple[int, int]] = field(
        default_factory=list
    )  # rows from first to last, both included, that are never read
    recent: list[tuple[float, float]] = field(
        default_factory=list
    )  # loss and gradient norm of the last steps that were applied

    @classmethod
    def of(cls, state: CheckpointState) -> "Progress":
        """Where a checkpoint's run stood; of before there was a rule for spikes, with nothing to judge by
        yet.
        """
        kept = state.extra
        return cls(
            state.step,
            kept["tokens"],
            kept.get("bad", 0),
            list(state.skips),
            [(loss, norm) for loss, norm in kept.get("recent", [])],
        )

    @property
    def kept(self) -> dict[str, Any]:
        """What goes to a checkpoint's `extra`."""
        return {"tokens": self.tokens, "bad": self.skipped_in_a_row, "recent": self.recent}

    def advance(self, step: StepResult, tokens: int, window: int) -> None:
        """A step is done, applied or skipped."""
        self.step, self.tokens, self.skipped_in_a_row = (
            self.step + 1,
            self.tokens + tokens,
            0 if step.applied else self.skipped_in_a_row + 1,
        )
        if step.applied:
            self.recent = [*self.recent, (step.loss, step.grad_norm)][-window:]

    def rewind(self, earlier: "Progress", skipped: tuple[int, int]) -> None:
        """To where a checkpoint stood, with all rows left out that were named since, and these."""
        vars(self).update(vars(replace(earlier, skips=[*self.skips, skipped])))


@dataclass(frozen=True)
class RunHooks:
    """What a kind of run brings to the loop. Every rank calls each of these equally often."""

    load: Callable[[Progress], Iterable[StepRows]]  # the rows of each step from where the run stands
    score: Callable[[bool], dict[str, Any]]  # evaluates; True: completely
    describe: Callable[
        [Progress, dict[str, Any]], CheckpointState
    ]  # progress and scores as the state that a checkpoint records
    restore: Callable[
        [], Progress | None
    ]  # the last verified checkpoint into the engine, and where it stood; None: there is none
    mfu: Callable[[int, float], float]  # of a step that took so many seconds
    should_stop_early: Callable[[], bool] = lambda: False  # ends training before its last step
    parts: Sequence[str] = ()  # of a mixture of objectives


def train(
    config: TrainingConfig,
    engine: Engine,
    checkpointer: Checkpointer,
    recorder: Recorder,
    progress: Progress,
    work: RunHooks,
) -> None:
    """Train from `progress.step` to `config.steps`, or until a stop is asked for (see StopRequest).

    Raises UserError where `config.spikes` says so, and once a save finds its storage full or refusing.
    """
    stop = StopRequest(Path(config.run))
    scores: dict[str, Any] = {}
    began = saved = progress.step
    for rows in _iterate_steps(work.load, progress):
        start, start_cpu = time.perf_counter(), time.process_time()
        engine.place.reporter.set_phase(
            "agreeing on a step", step=rows.step + 1, rows=(rows.first, rows.last)
        )
        if checkpointer.permanent_failure:
            _wait_for_save(checkpointer, progress)
        count, tokens, rows_hash, stopping = _all_reduce_step_counts(engine, rows, stop.asked())
        if stopping or work.should_stop_early():
            break
        factor = lr_factor(config.schedule, rows.step, config.steps)
        seeds = [micro_seed(config.seed, index) for index in rows.micro_indices]
        most = step_limits(config.spikes, progress.recent)
        step = engine.train_step(rows.micros, seeds, count, factor, most)
        engine.place.reporter.set_phase("recording")
        seconds = time.perf_counter() - start
        recorder.metrics(
            rows.step + 1,
            lr=config.optimizer.lr * factor,
            tokens=progress.tokens + tokens,
            tokens_per_s=tokens / seconds,
            mfu=work.mfu(rows.step, seconds),
            seconds=seconds,
            cpu_seconds=time.process_time() - start_cpu,
            peak_bytes=engine.meter.peak(),
            rows_hash=f"{rows_hash:012x}",
            **_step_metrics(rows, step, work.parts),
        )
        recorder.take_queued_scores()
        if rows.step == began:
            recorder.event("stepping", step=rows.step + 1)
        if not step.applied and _handle_bad_step(
            config,
            recorder,
            checkpointer,
            progress,
            rows,
            limit_exceeded(step.loss, step.grad_norm, most),
            work.restore,
        ):
            scores = scores if progress.step == rows.step else {}
            continue
        progress.advance(step, tokens, config.spikes.window)

        finished = progress.step == config.steps
        if finished or progress.step % config.evaluate_every == 0:
            scores = work.score(finished)
            recorder.metrics(progress.step, **scores)
        if finished or progress.step % config.checkpoints.every == 0:
            _save(checkpointer, engine, work.describe(progress, scores))
            scores, saved = {}, progress.step
        engine.place.reporter.set_phase("reading rows")
    if stop.terminated:
        recorder.event("terminated", rank=engine.place.rank, step=progress.step)
    if saved != progress.step:  # lower after a rollback
        _save(checkpointer, engine, work.describe(progress, scores))
    _wait_for_save(checkpointer, progress)
    recorder.event(
        "finished" if progress.step == config.steps or work.should_stop_early() else "stopped",
        step=progress.step,
    )


def micro_seed(seed: int, micro: int) -> int:
    """The seed of the randomness inside the model (dropout) for one micro of the run, whichever rank computes
    it.
    """
    return int(np.random.SeedSequence([seed, micro]).generate_state(1, np.uint64)[0] >> 1)


def _iterate_steps(load: Callable[[Progress], Iterable[StepRows]], progress: Progress) -> Iterator[StepRows]:
    """The rows of each step from where the run stands, also when it went back since the last one."""
    went_back = True
    while went_back:
        went_back = False
        for rows in load(progress):
            yield rows
            if went_back := progress.step != rows.step + 1:
                break


def _save(checkpointer: Checkpointer, engine: Engine, state: CheckpointState) -> None:
    engine.place.reporter.set_phase("saving")
    checkpointer.wait()  # before the copy is made, so that memory never holds two
    checkpointer.save(state, engine.slices())


def _wait_for_save(checkpointer: Checkpointer, progress: Progress) -> None:
    """Wait for the last save. Raises UserError where it failed."""
    checkpointer.wait()
    if checkpointer.failed is not None:
        raise UserError(
            f"step {progress.step} was trained but not saved: {checkpointer.failed}. Mend that and run the"
            " same command again."
        )


def _all_reduce_step_counts(engine: Engine, rows: StepRows, stop: bool) -> tuple[int, int, int, bool]:
    """What all ranks must know before the first backward: valid targets, tokens and row hash of the whole
    step, and whether to stop.
    """
    mine = torch.tensor([rows.count, rows.tokens, rows.hash % 2**48, int(stop)], dtype=torch.int64)
    count, tokens, rows_hash, stopping = engine.sum_over_ranks(mine).tolist()
    return count, tokens, rows_hash % 2**48, stopping > 0


def _step_metrics(rows: StepRows, step: StepResult, parts: Sequence[str]) -> dict[str, Any]:
    """What a step's line says of its rows and its arithmetic."""
    return {
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "stage": rows.stage,
        "rows": [rows.first, rows.last],
        "skipped": not step.applied,
        **part_losses("", parts, step.part_sums, step.part_counts),
    }


def _handle_bad_step(
    config: TrainingConfig,
    recorder: Recorder,
    checkpointer: Checkpointer,
    progress: Progress,
    rows: StepRows,
    why: str,
    restore: Callable[[], Progress | None],
) -> bool:
    """Do with a step that no rank applied as `spikes.policy` says; whether the run went back, for the step to
    be taken with other rows.

    Without a checkpoint it stays where it is, and takes the step with other rows there: the steps so far,
    taken again, would lead here.
    """
    checkpointer.wait()  # a save in flight holds good steps, whether the run goes back to it or ends here
    rolls_back = config.spikes.policy == "rollback"
    in_a_row = 1 + (
        consecutive_skips(progress.skips, rows.first) if rolls_back else progress.skipped_in_a_row
    )
    facts = {
        "rows": [rows.first, rows.last],
        "reason": why,
        "policy": config.spikes.policy,
        "in_a_row": in_a_row,
    }
    recorder.event("bad_step", step=rows.step + 1, **facts)
    raise_if_stopping(config, rows.step + 1, rows.first, rows.last, why, in_a_row)
    if rolls_back:
        progress.rewind(restore() or progress, (rows.first, rows.last))
    return rolls_back
