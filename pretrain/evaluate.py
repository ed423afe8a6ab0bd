"""Held-out loss, the same at any world size.

`evaluate` scores the first held-out rows: {"heldout_loss" nats per target, "perplexity", "bits_per_byte"
(causal), "accuracy"}, and for a mixture of objectives the loss of each member ("heldout_loss_NAME").
`unigram_loss` is what a unigram model scores on the same targets. Rows are distributed in rounds, so that all
ranks make the same number of forward passes (ZeRO-3 gathers weights in each).
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
    """What scores rows: the engine in the middle of training, or a model by itself. `counts` is False where
    an earlier rank has the same rows.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def counts(self) -> bool: ...
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]: ...
    def sum_over_ranks(self, tensor: Tensor) -> Tensor: ...


def evaluate(engine: EvaluationEngine, rows: RowSource, *, num_rows: int, micro_rows: int) -> dict[str, Any]:
    """Score the first `num_rows` held-out rows. Bits per byte are exact when those are all rows, else an
    estimate from them.
    """
    num_rows = min(num_rows, rows.num_rows)
    num_members = len(rows.member_names)
    # the sum of all losses, the targets, the correct ones; the losses of each member; the targets of each
    totals = torch.zeros(3 + 2 * num_members, dtype=torch.float64)
    for first in range(0, num_rows, micro_rows * engine.world):
        start = first + engine.rank * micro_rows
        known = rows.rows([i for i in range(start, start + micro_rows) if i < num_rows])
        batch = stack(known + [rows.empty_row()] * (micro_rows - len(known)))
        nll_BT, correct_BT = (values.cpu() for values in engine.evaluate(batch))
        totals[:3] += torch.stack(
            [nll_BT.double().sum(), (batch.targets >= 0).sum().double(), correct_BT.double().sum()]
        )
        if num_members:
            totals[3:] += batch.by_part(nll_BT, num_members).flatten()
    if engine.world > 1:
        totals = engine.sum_over_ranks(totals if engine.counts else torch.zeros_like(totals))

    loss_sum, num_targets, num_correct = totals[:3].tolist()
    loss = loss_sum / num_targets
    scores = {
        "heldout_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "accuracy": num_correct / num_targets,
        "heldout_targets": int(num_targets),
    }
    if rows.targets_per_byte is not None:
        scores["bits_per_byte"] = loss / math.log(2) * rows.targets_per_byte
    sums, targets = totals[3:].view(2, num_members).tolist()
    return scores | member_losses("heldout_", rows.member_names, sums, targets)


def member_losses(
    prefix: str, names: Sequence[str], loss_sums: Sequence[float], num_targets: Sequence[float]
) -> dict[str, Any]:
    """Nats per target of each member of a mixture, and its number of targets, by name. A member without
    targets has no loss.
    """
    losses: dict[str, Any] = {}
    for name, loss_sum, targets in zip(names, loss_sums, num_targets, strict=True):
        if targets:
            losses[f"{prefix}loss_{name}"] = loss_sum / targets
        losses[f"{prefix}targets_{name}"] = int(targets)
    return losses


def unigram_loss(rows: Rows, heldout: RowSource, vocab_size: int, *, sample: int = 2000) -> float:
    """Nats per held-out target of a unigram model: each token's share (add one) among the targets of the
    first `sample` training rows.

    All held-out rows are scored. Cost: 0.1 to 0.3 ms a row.
    """
    counts = np.ones(vocab_size) + _target_counts(rows, range(rows.first, rows.first + sample), vocab_size)
    heldout_counts = _target_counts(heldout, range(heldout.num_rows), vocab_size)
    return float(-(heldout_counts * np.log(counts / counts.sum())).sum() / heldout_counts.sum())


def _target_counts(rows: RowSource, numbers: range, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size)
    for number in numbers:
        targets = rows.row(number).targets
        counts += np.bincount(targets[targets >= 0], minlength=vocab_size)
    return counts
