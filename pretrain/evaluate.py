"""Held-out loss, the same at any world size.

In: an engine and the held-out rows. Out: {"heldout_loss" nats per target, "perplexity", "bits_per_byte"
(causal), "accuracy"}, the loss of each part of a mixture ("heldout_loss_PART"), and beside them what a
unigram scores on the same targets. Rows are dealt out round by round, so that all ranks make the same number
of forward passes (ZeRO-3 gathers weights in each).
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trifold.modeling.batch import Batch
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.rows import Rows, RowSource


class EvaluationEngine(Protocol):
    """What scores rows: the engine in the middle of training, or a model by itself. `counts`: whether no rank
    before has the same rows.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def counts(self) -> bool: ...
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]: ...
    def sum_over_ranks(self, values: Tensor) -> Tensor: ...


def evaluate(engine: EvaluationEngine, rows: RowSource, *, num_rows: int, micro_rows: int) -> dict[str, Any]:
    """Score the first `num_rows` held-out rows. Bits per byte are exact when those are all of them, else an
    estimate from them.
    """
    num_rows = min(num_rows, rows.num_rows)
    totals = torch.zeros(
        3 + 2 * len(rows.member_names), dtype=torch.float64
    )  # sum of losses, targets, correct ones; losses, targets by part
    for first in range(0, num_rows, micro_rows * engine.world):
        mine = range(first + engine.rank * micro_rows, first + (engine.rank + 1) * micro_rows)
        known = rows.rows([i for i in mine if i < num_rows])
        batch = stack(known + [rows.empty_row()] * (micro_rows - len(known)))
        nll_BT, correct_BT = (scored.cpu() for scored in engine.evaluate(batch))
        totals[:3] += torch.stack(
            [nll_BT.double().sum(), (batch.targets >= 0).sum().double(), correct_BT.double().sum()]
        )
        if rows.member_names:
            totals[3:] += batch.by_part(nll_BT, len(rows.member_names)).flatten()
    if engine.world > 1:
        totals = engine.sum_over_ranks(totals if engine.counts else torch.zeros_like(totals))
    loss_sum, count, correct = totals[:3].tolist()
    loss = loss_sum / count
    scores = {
        "heldout_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "accuracy": correct / count,
        "heldout_targets": int(count),
    }
    if rows.targets_per_byte is not None:
        scores["bits_per_byte"] = loss / math.log(2) * rows.targets_per_byte
    sums, counts = totals[3:].view(2, len(rows.member_names)).tolist()
    return scores | part_losses("heldout_", rows.member_names, sums, counts)


def part_losses(
    prefix: str, parts: Sequence[str], sums: Sequence[float], counts: Sequence[float]
) -> dict[str, Any]:
    """Nats per target of each part of a mixture, and its targets, by name; a part without targets has no
    loss.
    """
    found: dict[str, Any] = {}
    for part, loss_sum, count in zip(parts, sums, counts, strict=True):
        found |= {f"{prefix}loss_{part}": loss_sum / count} if count else {}
        found[f"{prefix}targets_{part}"] = int(count)
    return found


def unigram_loss(rows: Rows, heldout: RowSource, vocab_size: int, *, sample: int = 2000) -> float:
    """Nats per target of the simplest model there is: each token's share (add one) among the targets of the
    first `sample` training rows.

    The whole held-out set is scored. Cost: a row in 0.1 to 0.3 ms.
    """
    counts = np.ones(vocab_size) + _target_counts(rows, range(rows.first, rows.first + sample), vocab_size)
    found = _target_counts(heldout, range(heldout.num_rows), vocab_size)
    return float(-(found * np.log(counts / counts.sum())).sum() / found.sum())


def _target_counts(rows: RowSource, numbers: range, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size)
    for number in numbers:
        targets = rows.row(number).targets
        counts += np.bincount(targets[targets >= 0], minlength=vocab_size)
    return counts
