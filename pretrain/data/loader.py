"""One rank's share of every step, prepared ahead: Rows and the rank come in, StepRows go out, whose
micro-batches the engine takes as they are.

Micro-batch j of a step holds the rows from `j * micro_rows` of that step and goes to rank j % world in round
j // world. Every rank has as many rounds, with micro-batches of padding where no rows are left. So the rows
of a step, and the key of each micro-batch's dropout, do not depend on the number of ranks. A thread works at
most `prefetch` steps ahead, and on one more.

Example: steps of 10 rows in micro-batches of 4 on 2 ranks. Rank 0 has rows 0 to 3 and 8 to 9 (and two rows of
padding), rank 1 has rows 4 to 7 and a micro-batch of padding.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trifold.modeling.batch import Batch
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.row_order import row_at_cursor
from trifold.pretrain.data.rows import RowSource
from trifold.pretrain.data.stages import ResolvedStage, locate_step


@dataclass(frozen=True)
class StepRows:
    """One rank's share of an optimizer step, and the first and last row (included) of the full step.

    `count`, `tokens` and `hash` cover this rank's rows, except those that an earlier rank has as well.
    """

    step: int
    stage: int
    first: int
    last: int
    micros: list[Batch]
    micro_indices: list[int]  # counted over the run: keys of the randomness inside the model
    count: int  # targets
    tokens: int  # positions that are not padding
    hash: int  # the sum of the row hashes, modulo 2**63


class Loader:
    """Iterates over the steps from `start` up to `stop`. Each iteration has its own thread, which ends with
    the iteration.
    """

    def __init__(
        self,
        rows: Sequence[RowSource],
        stages: Sequence[ResolvedStage],
        *,
        start: int,
        stop: int,
        rank: int,
        world: int,
        prefetch: int,
        skips: Sequence[tuple[int, int]] = (),
        pin: bool = False,
        counts: bool = True,
    ) -> None:
        """`rows` of each of `stages`. `skips`: ranges of rows (first, last), last included, that are left
        out: later rows move up. `pin`: batches in pinned memory. `counts`: False where an earlier rank has
        the same rows.
        """
        self.rows, self.stages = rows, stages
        self.start, self.stop = start, stop
        self.rank, self.world = rank, world
        self.prefetch, self.skips = prefetch, skips
        self.pin, self.counts = pin, counts

    def __iter__(self) -> Iterator[StepRows]:
        """An error in the thread is raised here."""
        ready: queue.Queue[StepRows | BaseException | None] = queue.Queue(self.prefetch)
        closed = threading.Event()

        def offer(item: StepRows | BaseException | None) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in range(self.start, self.stop):
                    offer(self.share(step))
                    if closed.is_set():
                        return
                offer(None)
            except BaseException as error:
                offer(error)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()

    def share(self, step: int) -> StepRows:
        """This rank's share of a step: a pure function of the step."""
        stage, cursor, first_micro = locate_step(self.stages, step)
        rounds = -(-stage.micros // self.world)
        micro_numbers = range(self.rank, rounds * self.world, self.world)

        numbers: list[int] = []  # of this rank's rows in the run
        for micro in micro_numbers:
            stop = min((micro + 1) * stage.micro_rows, stage.step_rows)
            for row in range(micro * stage.micro_rows, stop):
                numbers.append(row_at_cursor(cursor + row, self.skips))

        source = self.rows[stage.stage]
        rows = source.rows(numbers)
        num_padding = len(micro_numbers) * stage.micro_rows - len(
            rows
        )  # at the end: only there rows are missing
        padded = rows + [source.empty_row()] * num_padding
        micros = []
        for first in range(0, len(padded), stage.micro_rows):
            micros.append(stack(padded[first : first + stage.micro_rows], self.pin))

        counted = rows if self.counts else []
        return StepRows(
            step=step,
            stage=stage.stage,
            first=row_at_cursor(cursor, self.skips),
            last=row_at_cursor(cursor + stage.step_rows - 1, self.skips),
            micros=micros,
            micro_indices=[first_micro + micro for micro in micro_numbers],
            count=sum(row.num_targets for row in counted),
            tokens=sum(row.num_tokens for row in counted),
            hash=sum(row.hash for row in counted) % 2**63,
        )
