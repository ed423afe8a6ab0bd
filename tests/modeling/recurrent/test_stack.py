"""Recurrent layers against loops written from their equations, in float64; what holds for every family stands
in test_transformer.py.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modeling.families import RECURRENT, documents, packed
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.recurrent.stack import Additive, AlignmentSources, CellState, RecurrentStack
from trifold.modeling.transformer import Transformer, build

LENGTHS = [(7, 6), (1, 3), (9, 10), (4, 1)]  # 21 target and 20 source tokens


def _with(config: ModelConfig, **updates: object) -> ModelConfig:
    return ModelConfig(**config.model_dump() | updates)


def _step(cell: str, x: Tensor, state: dict[str, Tensor], p: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step of one layer: Elman 1990; Hochreiter and Schmidhuber 1997, forget gate of Gers 2000; Cho et
    al. 2014 as cuDNN has it.
    """
    a, b = p["weight_ih"] @ x + p["bias_ih"], p["weight_hh"] @ state["h"] + p["bias_hh"]
    if cell == "rnn":
        return {"h": torch.tanh(a + b)}
    if cell == "lstm":
        i, f, g, o = (a + b).chunk(4)
        c = torch.sigmoid(f) * state["c"] + torch.sigmoid(i) * torch.tanh(g)
        return {"h": torch.sigmoid(o) * torch.tanh(c), "c": c}
    (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
    r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
    return {"h": (1 - z) * torch.tanh(an + r * bn) + z * state["h"]}


def _layer(stack: RecurrentStack, layer: int, suffix: str = "") -> dict[str, Tensor]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {name: getattr(stack.cells, f"{name}_l{layer}{suffix}") for name in names}


def _read(cell: str, xs: list[Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    """A whole document in one direction, from zeros."""
    width, hs = p["weight_hh"].shape[1], []
    state = {"h": torch.zeros(width).double(), "c": torch.zeros(width).double()}
    for x in xs:
        state = _step(cell, x, state, p)
        hs.append(state["h"])
    return hs


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_packed_row_is_what_the_equations_say_of_each_document(cell: str, family: str) -> None:
    model = build(_with(RECURRENT["lstm decoder"], cell=cell, family=family), seed=1).double()
    stack = model.encoder or model.decoder
    assert isinstance(stack, RecurrentStack)
    singles, expected = documents(model.config, LENGTHS), []
    for document in singles:
        xs = list(model.embedded(document.tokens)[0])
        for layer in range(2):
            hs = _read(cell, xs, _layer(stack, layer))
            if family == "encoder":
                back = _read(cell, xs[::-1], _layer(stack, layer, "_reverse"))[::-1]
                hs = [torch.cat(both) for both in zip(hs, back, strict=True)]
            xs = hs
        expected += xs
    result = model.hidden(packed(singles, length=26, source_length=0))[0, :21]
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-10)


def test_additive_attention_is_the_hand_computed_one() -> None:
    """W and U are the identity, v is (1, 2): two source states, scores 2 tanh(1) + tanh(0.5) and 3
    tanh(0.25).
    """
    score = Additive(2)
    for parameter, value in (
        (score.query.weight, torch.eye(2)),
        (score.key.weight, torch.eye(2)),
        (score.v.weight, torch.tensor([[1.0, 2.0]])),
    ):
        parameter.data = value
    memory = torch.tensor([[[0.25, 1.25], [0.0, 0.5]]])
    result = score(torch.tensor([[0.25, -0.25]]), score.key(memory))
    by_hand = [math.tanh(0.5) + 2 * math.tanh(1.0), math.tanh(0.25) + 2 * math.tanh(0.25)]
    torch.testing.assert_close(result, torch.tensor([by_hand]))


@pytest.mark.parametrize("alignment", ["none", "additive", "multiplicative"])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_decoder_reads_its_source_as_its_paper_says(cell: str, alignment: str) -> None:
    """One document, step by step: where the states begin, what is looked at with which state, and what is fed
    in.
    """
    model = build(_with(RECURRENT["lstm additive"], cell=cell, alignment=alignment), seed=2).double()
    (document,) = documents(model.config, [(5, 4)])
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, RecurrentStack) and isinstance(decoder, RecurrentStack)
    memory = encoder(model.embedded(document.source), document.source_segments)[0]
    context = torch.cat([memory[-1, :16], memory[0, 16:]])
    assert decoder.bridge is not None
    begin = torch.tanh(decoder.bridge.weight @ context + decoder.bridge.bias).view(-1, 2, 32)
    states = [{"h": begin[0, layer], "c": begin[-1, layer]} for layer in range(2)]

    def look(h: Tensor) -> Tensor:
        assert decoder.align is not None
        p = dict(decoder.align.score.named_parameters())
        if alignment == "additive":
            scores = [
                p["v.weight"][0] @ torch.tanh(p["query.weight"] @ h + p["key.weight"] @ m) for m in memory
            ]
        else:
            scores = [h @ p["key.weight"] @ m for m in memory]
        return torch.stack(scores).softmax(0) @ memory

    out, expected = torch.zeros(32).double(), []
    for y in model.embedded(document.tokens)[0]:
        seen = {
            "none": lambda: y[:0],  # noqa: B023
            "additive": lambda: look(states[-1]["h"]),
            "multiplicative": lambda: out,  # noqa: B023
        }[alignment]()
        x = torch.cat([y, seen])
        for layer in range(2):
            states[layer] = _step(cell, x, states[layer], _layer(decoder, layer))
            x = states[layer]["h"]
        out = x
        if decoder.combine is not None:
            seen = look(x) if alignment == "multiplicative" else seen
            out = torch.tanh(decoder.combine.weight @ torch.cat([seen, x]) + decoder.combine.bias)
        expected.append(out)
    torch.testing.assert_close(model.hidden(document)[0], torch.stack(expected), rtol=0, atol=1e-10)


def _hard(batch_size: int) -> tuple[Transformer, Batch]:
    model = build(
        _with(RECURRENT["gru hard"], num_layers=1, dim=4, vocab_size=5, init_std=1.0), seed=3
    ).double()
    (document,) = documents(model.config, [(2, 2)])
    document = replace(document, source=torch.tensor([[1, 3]]))
    assert document.source is not None and document.segments is not None
    tensors = (
        document.tokens,
        document.segments,
        document.targets,
        document.source,
        document.source_segments,
    )
    return model, Batch(*(t.repeat(batch_size, 1) for t in tensors))


def test_hard_attention_has_the_gradient_of_its_expected_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps that look at one of two places each: the expectation over the four ways is a sum, and
    autograd differentiates it.
    """
    model, one = _hard(1)
    assert isinstance(model.decoder, RecurrentStack) and model.decoder.align is not None
    expected: Any = 0.0
    for positions in itertools.product((0, 1), repeat=2):
        required = iter(positions)
        with monkeypatch.context() as forced:
            forced.setattr(
                torch, "multinomial", lambda p, n, required=required: torch.full((len(p), 1), next(required))
            )
            forced.setattr("trifold.modeling.transformer.score_function", lambda *_: 0.0)
            loss = model(one).total
        assert model.decoder.log_draws_BT is not None
        expected = expected + model.decoder.log_draws_BT.sum().exp() * loss
    exact = torch.autograd.grad(expected, list(model.parameters()))
    draws, sums, squares = 40_000, [torch.zeros_like(g) for g in exact], [torch.zeros_like(g) for g in exact]
    _, few = _hard(draws // 20)
    for seed in range(20):
        torch.manual_seed(seed)
        for total, square, g in zip(
            sums, squares, torch.autograd.grad(model(few).total, list(model.parameters())), strict=True
        ):
            total += g / draws
            square += (g * 20 / draws) ** 2 / 20
    for (name, _), mean, square, required in zip(model.named_parameters(), sums, squares, exact, strict=True):
        error = ((square - mean**2).clamp(min=0) / 20).sqrt()
        assert ((mean - required).abs() <= 5 * error + 1e-9).all(), name
    score = dict(zip([name for name, _ in model.named_parameters()], exact, strict=True))[
        "decoder.align.score.v.weight"
    ]
    assert score.abs().max() > 1e-3  # it is the draws alone that these weights learn from


def test_hard_attention_draws_by_the_generator_in_training_and_takes_the_likeliest_afterwards() -> None:
    model, batch = _hard(30)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(model(batch).total.detach())

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)
    assert isinstance(model.decoder, RecurrentStack) and model.decoder.align is not None
    states = torch.randn(1, 3, 4).double()
    _, _, weights = model.decoder.align(
        torch.zeros(1, 4).double(), AlignmentSources(states, states, torch.tensor([[True, True, False]]))
    )
    assert weights[0, 2] == 0


def test_a_fixed_vector_is_all_that_passes_without_an_alignment() -> None:
    for name, moved in (("rnn fixed vector", False), ("lstm additive", True)):
        model = build(RECURRENT[name], seed=1)
        (document,) = documents(model.config, [(5, 6)])
        assert model.encoder is not None and model.decoder is not None
        memory = model.encoder(model.embedded(document.source), document.source_segments)
        other = memory.clone()
        other[:, 1:5] += 1
        args = (model.embedded(document.tokens), document.segments)
        before, after = (model.decoder(*args, m, document.source_segments) for m in (memory, other))
        assert torch.equal(before, after) != moved


def test_what_generation_keeps_has_one_size_however_long_the_text_is() -> None:
    model = build(RECURRENT["lstm decoder"], seed=1).eval()
    assert isinstance(model.decoder, RecurrentStack)
    (cache,) = (caches := model.decoder.caches(10**9, 0))[0]
    for end in (5, 6):
        tokens = torch.zeros(2, end - cache.used, dtype=torch.long)
        model.decoder(model.embedded(tokens), torch.ones(2, end, dtype=torch.long), caches=caches)
        assert (
            cache.used == end
            and isinstance(cache.state, CellState)
            and [s.shape for s in cache.state.cells] == [(2, 2, 32)] * 2
        )


def test_dials_that_do_nothing_and_those_that_are_missing_are_refused() -> None:
    good: dict[str, Any] = RECURRENT["lstm additive"].model_dump()
    for change, message in (
        ({"num_heads": 4}, "num_heads: attention layers need each above 0"),
        (
            {"cell": "attention", "alignment": "none"},
            "num_heads, num_kv_heads, head_dim, mlp_dim: attention layers need",
        ),
        ({"position": "learned", "rope_theta": 5.0}, "cell lstm has no position, rope_theta"),
        ({"family": "decoder"}, r"alignment \(additive\) is for recurrent encoder-decoders"),
        ({"crf": True}, "crf is for label heads"),
        ({"dim": 31}, r"dim \(31\) must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**good | change)
    with pytest.raises(UserError, match=r"engine\.recompute recomputes transformer blocks"):
        build(RECURRENT["gru decoder"], 0).recompute(True)


def test_forget_gates_begin_open_and_other_biases_at_zero() -> None:
    state = build(RECURRENT["lstm decoder"], 1).state_dict()
    assert (
        state["decoder.cells.bias_ih_l1"].view(4, 32).mean(1).tolist() == [0, 1, 0, 0]
        and not state["decoder.cells.bias_hh_l1"].any()
    )
    assert not build(RECURRENT["gru decoder"], 1).state_dict()["decoder.cells.bias_ih_l0"].any()
    assert abs(state["decoder.cells.weight_hh_l1"].std() * 32**0.5 - 1) < 0.1
