"""The span head's loss by hand, packed or not, and label smoothing against torch's own."""

import torch
import torch.nn.functional as F

from tests.modeling.families import CONFIGS
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.heads import loss_sum, span_losses
from trifold.modeling.transformer import build


def test_a_span_is_a_choice_of_two_places_among_its_segments_positions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 2, requires_grad=True)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2]])
    targets = torch.full((2, 9), IGNORE)
    spans = {
        (0, 1): (0, 4, 1, 3),
        (0, 2): (4, 7, 2, 2),
        (1, 2): (2, 9, 0, 6),
    }  # row, segment: from, to, start, end; (1, 1) is not asked
    for (row, _), (begin, _, start, end) in spans.items():
        targets[row, begin], targets[row, begin + 1] = start, end
    nll, correct = span_losses(logits, segments, targets)
    expected = torch.zeros(2, 9)
    for (row, _), (begin, stop, start, end) in spans.items():
        document = logits[row, begin:stop]
        for index, (which, answer) in enumerate(((0, start), (1, end))):
            expected[row, begin + index] = F.cross_entropy(document[:, which], torch.tensor(answer))
            assert bool(correct[row, begin + index]) == (int(document[:, which].argmax()) == answer)
    assert torch.allclose(nll, expected, atol=1e-6) and int(correct.sum()) <= 6
    nll.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert not logits.grad[0, 7:].any() and not logits.grad[1, :2].any()
    assert torch.allclose(logits.grad[0, :4].sum(0), torch.zeros(2), atol=1e-6)


def test_the_model_sums_what_it_says_per_token_and_trains_its_task_heads() -> None:
    for change in ({"spans": True}, {"labels": ("O", "B-X", "I-X")}):
        model = build(CONFIGS["modernbert"].model_copy(update=change), 0)
        targets = torch.full((1, 8), IGNORE)
        targets[0, :2] = torch.tensor([1, 2])
        batch = Batch(torch.arange(8)[None], torch.ones(1, 8, dtype=torch.long), targets)
        loss = model(batch).total
        loss.backward()
        with torch.no_grad():
            nll = model(batch).nll
        assert (
            torch.allclose(loss, nll.sum())
            and int((nll > 0).sum()) == 2
            and model.logits(batch).shape[-1] == (2 if "spans" in change else 3)
        )
        assert (
            model.head.labels is not None
            and model.head.labels.weight.grad is not None
            and model.head.labels.weight.grad.any()
        )


def test_label_smoothing_is_torchs_with_its_gradients_and_evaluation_goes_without() -> None:
    torch.manual_seed(0)
    h, weight, bias = torch.randn(40, 16), torch.randn(30, 16), torch.randn(30)
    targets = torch.randint(0, 30, (40,))
    targets[::3] = IGNORE
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    ours, _ = loss_sum(h, weight, bias, targets, smoothing=0.1)
    grads = torch.autograd.grad(ours, leaves)
    theirs = F.cross_entropy(
        F.linear(h, weight, bias), targets, ignore_index=IGNORE, label_smoothing=0.1, reduction="sum"
    )
    assert torch.allclose(ours, theirs)
    assert all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(grads, torch.autograd.grad(theirs, leaves), strict=True)
    )
    model = build(CONFIGS["llama"].model_copy(update={"label_smoothing": 0.1}), 0)
    tokens = torch.arange(8)[None]
    batch = Batch(tokens, None, tokens)
    with torch.no_grad():
        plain = F.cross_entropy(model.logits(batch)[0], tokens[0], reduction="sum")
        assert torch.allclose(model(batch).total, plain)
