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

from trifold.modeling.errors import Refused
from trifold.pretrain.checkpoint.checkpoint import State
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.config.training import Training
from trifold.pretrain.data.loader import StepRows
from trifold.pretrain.engine.engine import Engine, Step
from trifold.pretrain.engine.optimizer import lr_factor
from trifold.pretrain.engine.spikes import give_up, limits, named_before, reason
from trifold.pretrain.evaluate import part_losses
from trifold.pretrain.monitor import heartbeat
from trifold.pretrain.monitor.metrics import Recorder
from trifold.pretrain.monitor.stop_request import StopRequest


@dataclass
class Progress:
    """Where a run stands: all that a resumed run needs besides weights and moments."""

    step: int = 0  # finished optimizer steps, skipped ones included
    tokens: int = 0  # read so far, padding left out
    bad: int = 0  # steps in a row that were skipped
    skips: list[tuple[int, int]] = field(
        default_factory=list
    )  # rows from first to last, both included, that are never read
    recent: list[tuple[float, float]] = field(
        default_factory=list
    )  # loss and gradient norm of the last steps that were applied

    @classmethod
    def of(cls, state: State) -> "Progress":
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
        return {"tokens": self.tokens, "bad": self.bad, "recent": self.recent}

    def took(self, step: Step, tokens: int, window: int) -> None:
        """A step is done, applied or skipped."""
        self.step, self.tokens, self.bad = (
            self.step + 1,
            self.tokens + tokens,
            0 if step.applied else self.bad + 1,
        )
        if step.applied:
            self.recent = [*self.recent, (step.loss, step.grad_norm)][-window:]

    def go_back(self, earlier: "Progress", skipped: tuple[int, int]) -> None:
        """To where a checkpoint stood, with all rows left out that were named since, and these."""
        vars(self).update(vars(replace(earlier, skips=[*self.skips, skipped])))


@dataclass(frozen=True)
class Work:
    """What a kind of run brings to the loop. Every rank calls each of these equally often."""

    load: Callable[[Progress], Iterable[StepRows]]  # the rows of each step from where the run stands
    score: Callable[[bool], dict[str, Any]]  # evaluates; True: completely
    describe: Callable[
        [Progress, dict[str, Any]], State
    ]  # progress and scores as the state that a checkpoint records
    restore: Callable[
        [], Progress | None
    ]  # the last verified checkpoint into the engine, and where it stood; None: there is none
    mfu: Callable[[int, float], float]  # of a step that took so many seconds
    enough: Callable[[], bool] = lambda: False  # ends training before its last step
    parts: Sequence[str] = ()  # of a mixture of objectives


def train(
    config: Training,
    engine: Engine,
    checkpointer: Checkpointer,
    recorder: Recorder,
    progress: Progress,
    work: Work,
) -> None:
    """Train from `progress.step` to `config.steps`, or until a stop is asked for (see StopRequest).

    Raises Refused where `config.spikes` says so, and once a save finds its storage full or refusing.
    """
    stop = StopRequest(Path(config.run))
    scores: dict[str, Any] = {}
    began = saved = progress.step
    for rows in _following(work.load, progress):
        start, start_cpu = time.perf_counter(), time.process_time()
        heartbeat.at("agreeing on a step", step=rows.step + 1, rows=(rows.first, rows.last))
        if checkpointer.lasting:
            _saved(checkpointer, progress)
        count, tokens, rows_hash, stopping = _agree(engine, rows, stop.asked())
        if stopping or work.enough():
            break
        factor = lr_factor(config.schedule, rows.step, config.steps)
        seeds = [micro_seed(config.seed, index) for index in rows.micro_indices]
        most = limits(config.spikes, progress.recent)
        step = engine.train_step(rows.micros, seeds, count, factor, most)
        heartbeat.at("recording")
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
            **_told(rows, step, work.parts),
        )
        recorder.join_scores()
        if rows.step == began:
            recorder.event("stepping", step=rows.step + 1)
        if not step.applied and _went_back(
            config,
            recorder,
            checkpointer,
            progress,
            rows,
            reason(step.loss, step.grad_norm, most),
            work.restore,
        ):
            scores = scores if progress.step == rows.step else {}
            continue
        progress.took(step, tokens, config.spikes.window)

        finished = progress.step == config.steps
        if finished or progress.step % config.evaluate_every == 0:
            scores = work.score(finished)
            recorder.metrics(progress.step, **scores)
        if finished or progress.step % config.checkpoints.every == 0:
            _save(checkpointer, engine, work.describe(progress, scores))
            scores, saved = {}, progress.step
        heartbeat.at("reading rows")
    if stop.terminated:
        recorder.event("terminated", rank=engine.place.rank, step=progress.step)
    if saved != progress.step:  # lower after a rollback
        _save(checkpointer, engine, work.describe(progress, scores))
    _saved(checkpointer, progress)
    recorder.event(
        "finished" if progress.step == config.steps or work.enough() else "stopped", step=progress.step
    )


def micro_seed(seed: int, micro: int) -> int:
    """The seed of the randomness inside the model (dropout) for one micro of the run, whichever rank computes
    it.
    """
    return int(np.random.SeedSequence([seed, micro]).generate_state(1, np.uint64)[0] >> 1)


def _following(load: Callable[[Progress], Iterable[StepRows]], progress: Progress) -> Iterator[StepRows]:
    """The rows of each step from where the run stands, also when it went back since the last one."""
    went_back = True
    while went_back:
        went_back = False
        for rows in load(progress):
            yield rows
            if went_back := progress.step != rows.step + 1:
                break


def _save(checkpointer: Checkpointer, engine: Engine, state: State) -> None:
    heartbeat.at("saving")
    checkpointer.wait()  # before the copy is made, so that memory never holds two
    checkpointer.save(state, engine.slices())


def _saved(checkpointer: Checkpointer, progress: Progress) -> None:
    """Wait for the last save. Raises Refused where it failed."""
    checkpointer.wait()
    if checkpointer.failed is not None:
        raise Refused(
            f"step {progress.step} was trained but not saved: {checkpointer.failed}. Mend that and run the"
            " same command again."
        )


def _agree(engine: Engine, rows: StepRows, stop: bool) -> tuple[int, int, int, bool]:
    """What all ranks must know before the first backward: valid targets, tokens and row hash of the whole
    step, and whether to stop.
    """
    mine = torch.tensor([rows.count, rows.tokens, rows.hash % 2**48, int(stop)], dtype=torch.int64)
    count, tokens, rows_hash, stopping = engine.sum_over_ranks(mine).tolist()
    return count, tokens, rows_hash % 2**48, stopping > 0


def _told(rows: StepRows, step: Step, parts: Sequence[str]) -> dict[str, Any]:
    """What a step's line says of its rows and its arithmetic."""
    return {
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "stage": rows.stage,
        "rows": [rows.first, rows.last],
        "skipped": not step.applied,
        **part_losses("", parts, step.part_sums, step.part_counts),
    }


def _went_back(
    config: Training,
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
    in_a_row = 1 + (named_before(progress.skips, rows.first) if rolls_back else progress.bad)
    facts = {
        "rows": [rows.first, rows.last],
        "reason": why,
        "policy": config.spikes.policy,
        "in_a_row": in_a_row,
    }
    recorder.event("bad_step", step=rows.step + 1, **facts)
    give_up(config, rows.step + 1, rows.first, rows.last, why, in_a_row)
    if rolls_back:
        progress.go_back(restore() or progress, (rows.first, rows.last))
    return rolls_back
