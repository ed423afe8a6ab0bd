"""Beam search against transformers' own, token for token; sampling and the other dials against what they
promise.
"""

import json
from itertools import pairwise

import pytest
import torch

from tests.modeling.families import RECURRENT
from tests.published import MODELS, SPECIAL, random_model
from trifold.modeling.batch import Batch
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate, hypotheses
from trifold.modeling.huggingface import export
from trifold.modeling.transformer import build

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["llama, own head, other theta", "t5gemma, own head, own scale"])
def test_beams_equal_the_stock_class_on_forty_inputs(name: str) -> None:
    config = MODELS[name]
    ours = random_model(config, seed=3)
    hf, tensors = export(config, ours.state_dict(), SPECIAL)
    stock_class = getattr(transformers, hf["architectures"][0])
    stock = stock_class(
        stock_class.config_class.from_dict(json.loads(json.dumps(hf)), attn_implementation="eager")
    ).eval()
    stock.load_state_dict(tensors, strict=False)
    draw = torch.Generator().manual_seed(0)
    ended = set()
    for penalty, no_repeat, length in ((1.0, 0, 5), (0.0, 2, 3), (2.0, 0, 8), (1.0, 3, 6)):
        prompts = torch.randint(3, config.vocab_size, (10, length), generator=draw)
        other = stock.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=10,
            num_beams=4,
            do_sample=False,
            length_penalty=penalty,
            no_repeat_ngram_size=no_repeat,
            early_stopping=False,
        )
        other = other[:, length:] if config.family == "decoder" else other[:, 1:]
        settings = Generation(max_new=10, beams=4, length_penalty=penalty, no_repeat=no_repeat)
        mine = generate(ours, prompts.tolist(), settings, **SPECIAL)
        assert [
            row + [SPECIAL["eos"]] * (other.shape[1] - len(row)) for row in mine
        ] == other.tolist()  # it fills up with eos
        ended |= {len(row) for row in mine}
    assert len(ended) > 1  # some end early


def test_the_best_beams_come_in_order_with_their_true_scores() -> None:
    model = random_model(MODELS["llama"])
    [beams] = hypotheses(model, [[5, 6]], Generation(max_new=4, beams=3, num_best=3), **SPECIAL)
    scores = [score for _, score in beams]
    assert len({tuple(tokens) for tokens, _ in beams}) == 3 and scores == sorted(scores, reverse=True)
    assert [beams[0][0]] == generate(model, [[5, 6]], Generation(max_new=4, beams=3), **SPECIAL)
    with pytest.raises(UserError, match="3 beams cannot give 4 texts"):
        hypotheses(model, [[5]], Generation(beams=3, num_best=4), **SPECIAL)


@pytest.mark.parametrize("name", ["lstm decoder", "lstm additive", "gru multiplicative", "rnn fixed vector"])
def test_beams_of_recurrent_models_find_the_best_of_all_texts(name: str) -> None:
    """As many beams as there are tokens lose nothing in two steps, so the best text is the best of all pairs,
    scored without a cache.
    """
    model = build(RECURRENT[name], seed=5).eval()
    prompt, size = [5, 6, 7], model.config.vocab_size
    row = [1] if model.encoder is not None else prompt
    tokens = torch.tensor([[*row, first] for first in range(size)])
    source = (torch.tensor([prompt] * size), None) if model.encoder is not None else (None, None)
    logp = model.logits(Batch(tokens, None, tokens, *source)).log_softmax(-1)[:, -2:]
    scores = logp[:, 0].diagonal()[:, None] + logp[:, 1]
    [best] = hypotheses(
        model,
        [prompt],
        Generation(max_new=2, beams=size, num_best=5, length_penalty=0.0),
        bos=1,
        eos=-1,
        pad=0,
    )
    values, index = scores.flatten().topk(5)
    assert [tokens for tokens, _ in best] == [[i // size, i % size] for i in index.tolist()]
    torch.testing.assert_close(torch.tensor([score for _, score in best]), values.detach())
    [best] = hypotheses(
        model, [prompt], Generation(max_new=6, beams=4, num_best=4, length_penalty=0.0), bos=1, eos=-1, pad=0
    )
    tokens = torch.tensor(
        [[*row, *created] for created, _ in best]
    )  # beams that change places take their states along
    source = (torch.tensor([prompt] * 4), None) if model.encoder is not None else (None, None)
    logp = model.logits(Batch(tokens, None, tokens, *source)).log_softmax(-1)[:, -7:-1]
    sums = logp.gather(2, tokens[:, -6:, None]).sum((1, 2)).detach()
    torch.testing.assert_close(torch.tensor([score for _, score in best]), sums)


def test_sampling_draws_among_the_likely_tokens_by_their_probability() -> None:
    model = random_model(MODELS["llama"])
    prompts = [[5, 6]] * 4000
    tokens = torch.tensor([[5, 6]])
    probabilities = (model.logits(Batch(tokens, None, tokens))[0, -1] / 2).softmax(-1).detach()
    order = probabilities.argsort(descending=True)
    drawn = torch.tensor(
        generate(model, prompts, Generation(max_new=1, sample=True, temperature=2.0), **SPECIAL)
    )[:, 0]
    assert (torch.bincount(drawn, minlength=97) / len(prompts) - probabilities).abs().max() < 0.03
    for settings, allowed in (
        (Generation(max_new=1, sample=True, temperature=2.0, top_k=3), 3),
        (
            Generation(max_new=1, sample=True, temperature=2.0, top_p=0.3),
            int((probabilities[order].cumsum(0) < 0.3).sum()) + 1,
        ),
        (Generation(max_new=1, sample=True, temperature=0.01), 1),
    ):
        seen = {row[0] for row in generate(model, prompts, settings, **SPECIAL)}
        assert seen == set(order[:allowed].tolist())
    one, two = (
        generate(model, prompts[:50], Generation(max_new=5, sample=True, seed=seed), **SPECIAL)
        for seed in (1, 2)
    )
    assert one != two and one == generate(
        model, prompts[:50], Generation(max_new=5, sample=True, seed=1), **SPECIAL
    )


def test_texts_are_as_long_as_asked_and_repeat_no_ngram() -> None:
    model = random_model(MODELS["t5gemma, own head, own scale"])
    free = generate(model, [[7, 8]], Generation(max_new=30), **{**SPECIAL, "eos": -1})[0]
    at, eos = next((i, token) for i, token in enumerate(free) if i and token not in free[:i])
    none, one, two = (
        generate(model, [[7, 8]], Generation(max_new=30, min_new=n), **{**SPECIAL, "eos": eos})[0]
        for n in (0, at, at + 1)
    )
    assert none == one == free[: at + 1] and eos not in two[: at + 1] and len(two) > at + 1
    text = generate(model, [[7, 8]], Generation(max_new=30, no_repeat=2), **{**SPECIAL, "eos": -1})[0]
    pairs = list(pairwise(text))
    assert len(pairs) == len(set(pairs)) == 29
