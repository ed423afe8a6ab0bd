"""200 steps on real books from one folder, in Trifold and in stock transformers with torch's AdamW: the two
curves lie on each other.

Writes docs/images/curves.svg. About 2 minutes of one core for each of the three kinds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.modeling.huggingface import stock
from tests.paths import ROOT
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.transformer import Transformer
from trifold.pretrain.config.objectives import CausalConfig, MaskedConfig, SpansConfig
from trifold.pretrain.config.training import OptimizerConfig
from trifold.pretrain.data import keyed_random
from trifold.pretrain.data.objectives import Chunk, ObjectiveMixture
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.engine.optimizer import make_optimizer
from trifold.pretrain.publish import published_folder

pytest.importorskip("transformers")
from tests.runtimes import books

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not books.BOOKS.exists(), reason=f"no {books.BOOKS} (set TRIFOLD_DATA)"),
]
FIGURE = ROOT / "docs" / "images" / "curves.svg"
OBJECTIVES: dict[str, Any] = {"BERT": MaskedConfig(rate=0.15), "GPT-2": CausalConfig(), "T5": SpansConfig()}
# In fp32 rounding grows with the steps, most where scores are not scaled (T5).
# tests/modeling/huggingface/test_architectures.py bounds it in fp64.
GAPS = {"BERT": 0.01, "GPT-2": 0.01, "T5": 0.1}
STEPS, WARMUP, ROWS, LENGTH = 200, 20, 8, 128
ADAM = OptimizerConfig(
    lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6
)  # above rounding, which must not become a step
CURVES: dict[str, np.ndarray] = {}  # (2, steps): stock, Trifold


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_two_hundred_steps_have_the_losses_of_stock_and_torch(kind: str, tmp_path: Path) -> None:
    theirs = books.make(kind, tmp_path).train()
    config, state = published_folder.load_model(tmp_path)
    ours = Transformer(config).train()
    ours.load_state_dict(state)
    matrices, rest = ([p for p in theirs.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": ADAM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizers = (
        torch.optim.AdamW(groups, lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps),
        make_optimizer(ours, ADAM, torch.float32),
    )

    losses = []
    for step, batch in enumerate(_batches(kind, Tokenizer.open(tmp_path))):
        both = stock.loss(theirs, batch), ours(batch).total / (batch.targets != IGNORE).sum()
        for model, optimizer, loss in zip((theirs, ours), optimizers, both, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = ADAM.lr * min(1, (step + 1) / WARMUP)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append([loss.item() for loss in both])
    CURVES[kind] = np.array(losses).T
    first, last, gap = losses[0][0], np.mean(losses[-10:]), np.abs(np.diff(losses)).max()
    print(f"{kind}: {first:.3f} -> {last:.3f} nats, largest gap {gap:.1e}")
    assert last < first - 1 and gap < GAPS[kind]


def _batches(kind: str, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Rows that are each one document: as many tokens of the books as fit, under the objective of the
    kind.
    """
    objective = ObjectiveMixture(OBJECTIVES[kind], tokenizer, LENGTH)
    marks = objective.members[0].specials.count
    size = objective.max_chunk_length - marks
    ids = np.concatenate(tokenizer.encode_batch(books.text(STEPS * ROWS * size * 6).split("\n")))
    for step in range(STEPS):
        documents = ids[step * ROWS * size :][: ROWS * size].reshape(ROWS, size)
        pieces = [Chunk(text, 0, size + marks) for text in documents]
        keys = keyed_random.nth_random(np.full(ROWS, step, np.uint64), np.arange(ROWS))
        [(_, _, made)] = objective.segments(np.zeros(ROWS), pieces, keys)
        tokens, targets = (torch.from_numpy(array.reshape(ROWS, -1)) for array in (made.tokens, made.targets))
        yield Batch(
            tokens, None, targets, torch.from_numpy(made.source.reshape(ROWS, -1)) if kind == "T5" else None
        )


def test_the_figure_shows_both_curves_of_each_kind() -> None:
    if CURVES.keys() != OBJECTIVES.keys():
        pytest.skip("the curves above were not all made")
    FIGURE.parent.mkdir(exist_ok=True)
    panels = "".join(_panel(kind, losses, 40 + 250 * i) for i, (kind, losses) in enumerate(CURVES.items()))
    style = (
        "<style>text{font:12px sans-serif;fill:#333}polyline{fill:none}</style>"
        '<rect width="100%" height="100%" fill="white"/>'
    )
    FIGURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 260">{style}{panels}</svg>\n'
    )


def _panel(kind: str, losses: np.ndarray, left: int) -> str:
    """Stock as a broad pale line, Trifold as a thin dark one on it; nats over steps."""
    low, high, width, height, top = np.floor(losses.min()), np.ceil(losses.max()), 200, 160, 40

    def line(values: np.ndarray, look: str) -> str:
        points = (
            f"{left + width * i / STEPS:.1f},{top + height * (high - v) / (high - low):.1f}"
            for i, v in enumerate(values)
        )
        return f'<polyline {look} points="{" ".join(points)}"/>'

    gap = np.abs(losses[0] - losses[1]).max()
    return (
        f'<text x="{left}" y="22">{kind}: largest gap {gap:.0e} nats</text>'
        f'<path d="M{left} {top}v{height}h{width}" fill="none" stroke="#999"/>'
        f'<text x="{left - 22}" y="{top + 8}">{high:.0f}</text><text x="{left - 22}"'
        f' y="{top + height}">{low:.0f}</text>'
        f'<text x="{left}" y="{top + height + 18}">0</text><text x="{left + width - 24}"'
        f' y="{top + height + 18}">{STEPS} steps</text>'
        + line(losses[0], 'stroke="#f4b183" stroke-width="6"')
        + line(losses[1], 'stroke="#1f3864" stroke-width="1.2"')
        + f'<text x="{left}" y="{top + height + 44}">broad: transformers, thin: Trifold</text>'
    )
