"""The CRF against all sequences of labels, written out."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.modeling.families import RECURRENT, documents, packed
from trifold.modeling.batch import IGNORE
from trifold.modeling.recurrent.crf import CRF
from trifold.modeling.transformer import build

C = 3
SEGMENTS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
TARGETS = torch.tensor(
    [[2, IGNORE, 0, 1, IGNORE, 1, 1, IGNORE, IGNORE], [IGNORE, 0, 2, IGNORE, IGNORE, IGNORE, 1, 1, 0]]
)
CHAINS = [(0, [0, 2, 3]), (0, [5, 6]), (1, [1, 2, 6, 7, 8])]  # row, places: the targets of one segment


@pytest.fixture
def crf() -> CRF:
    torch.manual_seed(0)
    created = CRF(C).double()
    torch.nn.init.normal_(created.between)
    return created


def _score(crf: CRF, scores: Tensor, labels: tuple[int, ...]) -> Tensor:
    neighbours = zip((C, *labels), (*labels, C), strict=True)
    return sum(crf.between[a, b] for a, b in neighbours) + sum(
        s[label] for s, label in zip(scores, labels, strict=True)
    )


def test_losses_of_a_chain_sum_to_minus_its_log_probability_among_all_sequences(crf: CRF) -> None:
    scores = torch.randn(2, 9, C).double().requires_grad_()
    nll = crf(scores, TARGETS, SEGMENTS)
    total = torch.zeros(()).double()
    for row, positions in CHAINS:
        every = torch.stack(
            [
                _score(crf, scores[row, positions], labels)
                for labels in itertools.product(range(C), repeat=len(positions))
            ]
        )
        expected = every.logsumexp(0) - _score(
            crf, scores[row, positions], tuple(TARGETS[row, positions].tolist())
        )
        torch.testing.assert_close(nll[row, positions].sum(), expected, rtol=0, atol=1e-10)
        total = total + expected
    assert not nll[TARGETS == IGNORE].any()
    result, required = (
        torch.autograd.grad(x, (scores, crf.between), retain_graph=True) for x in (nll.sum(), total)
    )
    torch.testing.assert_close(result, required, rtol=0, atol=1e-10)


def test_the_best_labels_are_those_of_the_best_sequence(crf: CRF) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        scores = torch.randn(2, 9, C).double()
        best = crf(scores, TARGETS, SEGMENTS, best=True)
        for row, positions in CHAINS:
            every = list(itertools.product(range(C), repeat=len(positions)))
            values = torch.stack([_score(crf, scores[row, positions], labels) for labels in every])
            assert tuple(best[row, positions].argmax(-1).tolist()) == every[int(values.argmax())]
            torch.testing.assert_close(best[row, positions].amax(-1), values.max().expand(len(positions)))


def test_a_tagger_sums_what_it_says_per_token_and_learns_its_transitions() -> None:
    config = RECURRENT["lstm encoder"].model_copy(update={"labels": ("O", "B-X", "I-X"), "crf": True})
    model = build(config, 0)
    row = packed(documents(config, [(7, 0), (1, 0), (9, 0)]), length=20, source_length=0)
    row = replace(
        row, targets=torch.where((row.targets == IGNORE) | (row.tokens % 4 == 0), IGNORE, row.targets % 3)
    )
    loss = model(row).total
    loss.backward()
    with torch.no_grad():
        _, nll, correct = model(row)
    torch.testing.assert_close(nll.sum(), loss)
    assert (
        model.head.crf is not None
        and model.head.crf.between.grad is not None
        and model.head.crf.between.grad.any()
    )
    assert torch.equal(correct, (model.logits(row).argmax(-1) == row.targets))
    model.zero_grad()
    filler = replace(row, targets=torch.full_like(row.targets, IGNORE))  # a row that fills up a micro batch
    model(filler).total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
