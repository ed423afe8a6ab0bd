"""A rank's share of every step, made ahead of need: in, Rows and rank facts; out, StepRows whose micros go
straight to the engine.

Micro j of a step holds the rows from `j * micro_rows` of that step and goes to rank j % world in round j //
world; every rank has as many rounds, with micros of padding where there is nothing left. So the rows of a
step, and the key of each micro's dropout, do not depend on the world. A thread works at most `prefetch` steps
ahead (and on one more).
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
    """One rank's share of an optimizer step, and the first and last row (included) of the whole step."""

    step: int
    stage: int
    first: int
    last: int
    micros: list[Batch]
    micro_indices: list[int]  # of the run: keys of the randomness inside the model
    count: int  # targets, here (this and the next two: of rows that no rank before has)
    tokens: int  # positions that are not padding, here
    hash: int  # the sum of the hashes of the rows here, modulo 2**63


class Loader:
    """Iterates over the steps from `start` up to `stop`. Each iteration has its own thread, which ends when
    the iteration does.
    """

    def __init__(
        self,
        rows: Sequence[RowSource],
        parts: Sequence[ResolvedStage],
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
        """`rows` of each of `parts`. `skips`: rows first to last, both included, that are left out (later
        rows move up, and so each part takes as many beyond its last). `pin`: batches in pinned memory.
        `counts`: False where a rank before has the same rows.
        """
        self.rows, self.parts, self.start, self.stop = rows, parts, start, stop
        self.rank, self.world, self.prefetch, self.skips, self.pin, self.counts = (
            rank,
            world,
            prefetch,
            skips,
            pin,
            counts,
        )

    def __iter__(self) -> Iterator[StepRows]:
        """What fails in the thread is raised here."""
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
        part, cursor, first_micro = locate_step(self.parts, step)
        source = self.rows[part.stage]
        numbers = range(self.rank, -(-part.micros // self.world) * self.world, self.world)
        places = [
            place
            for n in numbers
            for place in range(n * part.micro_rows, min((n + 1) * part.micro_rows, part.step_rows))
        ]
        mine = source.rows([row_at_cursor(cursor + place, self.skips) for place in places])
        filled = mine + [source.empty_row()] * (
            len(numbers) * part.micro_rows - len(mine)
        )  # only the last micro has too few
        counted = mine if self.counts else []
        micros = [
            stack(filled[i : i + part.micro_rows], self.pin) for i in range(0, len(filled), part.micro_rows)
        ]
        return StepRows(
            step,
            part.stage,
            row_at_cursor(cursor, self.skips),
            row_at_cursor(cursor + part.step_rows - 1, self.skips),
            micros,
            [first_micro + n for n in numbers],
            sum(row.num_targets for row in counted),
            sum(row.num_tokens for row in counted),
            sum(row.hash for row in counted) % 2**63,
        )
