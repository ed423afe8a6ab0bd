"""What holds for every family: isolation of packed documents, causality, precision, checkpointing,
initialisation.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.modeling.families import CONFIGS, RECURRENT, documents, packed
from trifold.modeling.attention import Visibility
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.block import AttentionContext
from trifold.modeling.config import ModelConfig
from trifold.modeling.transformer import Stack, Transformer, build, initialise

EVERY = CONFIGS | {
    name: config for name, config in RECURRENT.items() if config.alignment != "hard"
}  # which draws: test_recurrent.py
LENGTHS = [(7, 6), (1, 3), (9, 10), (4, 1)]  # 21 target and 20 source tokens


def _with(config: ModelConfig, **updates: object) -> ModelConfig:
    return ModelConfig(**config.model_dump() | updates)


@pytest.mark.parametrize("name", EVERY)
def test_a_packed_document_has_the_losses_it_has_alone(name: str) -> None:
    model = build(EVERY[name], seed=1)
    singles = documents(EVERY[name], LENGTHS)
    row = packed(singles, length=26, source_length=24)
    with torch.no_grad():
        together, alone = model(row), [model(document) for document in singles]
    nll, correct = (torch.cat([losses[i] for losses in alone], dim=1) for i in (1, 2))
    torch.testing.assert_close(together.nll[:, :21], nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.total, nll.sum())
    assert torch.equal(together.correct[:, :21], correct)
    assert torch.equal(together.nll[:, 21:], torch.zeros(1, 5)) and not together.correct[:, 21:].any()


@pytest.mark.parametrize("name", EVERY)
def test_a_packed_row_has_the_gradients_of_its_documents(name: str) -> None:
    model = build(EVERY[name], seed=1)
    singles = documents(EVERY[name], LENGTHS)
    together = _gradients(model, [packed(singles, length=26, source_length=24)])
    for key, gradient in _gradients(model, singles).items():
        torch.testing.assert_close(
            together[key], gradient, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", EVERY)
def test_rows_without_segments_are_whole_documents(name: str) -> None:
    model = build(EVERY[name], seed=1)
    (document,) = documents(EVERY[name], [(9, 7)])
    plain = replace(document, segments=None, source_segments=None)
    torch.testing.assert_close(model.logits(plain), model.logits(document), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_padding_tokens_have_no_influence_and_a_row_of_padding_no_nan(name: str) -> None:
    model = build(EVERY[name], seed=1)
    row = packed(documents(EVERY[name], LENGTHS[:2]), length=16, source_length=12)
    assert row.segments is not None
    other = replace(row, tokens=torch.where(row.segments == 0, 50, row.tokens))
    if row.source is not None and row.source_segments is not None:
        other = replace(other, source=torch.where(row.source_segments == 0, 50, row.source))
    torch.testing.assert_close(_gradients(model, [row]), _gradients(model, [other]))

    zeros = torch.zeros_like(row.tokens)
    empty = Batch(zeros, zeros, torch.full_like(zeros, IGNORE), row.source, row.source_segments)
    assert model(empty).total == 0
    for key, gradient in _gradients(model, [empty]).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), key


@pytest.mark.parametrize("name", [name for name, config in EVERY.items() if config.family != "encoder"])
def test_a_later_token_changes_no_earlier_logit(name: str) -> None:
    model = build(EVERY[name], seed=1)
    (document,) = documents(EVERY[name], [(12, 7)])
    changed = document.tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 61
    before, after = model.logits(document), model.logits(replace(document, tokens=changed))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-4


def test_a_local_layer_reaches_exactly_its_window() -> None:
    config = _with(CONFIGS["modernbert"], num_layers=2, global_every=2)
    model = build(config, seed=1)
    (document,) = documents(config, [(16, 0)])
    assert isinstance(model.encoder, Stack)
    contexts = model.encoder._contexts(model.embedded(document.tokens), document.segments, 0, None, None)
    x = model.embedded(document.tokens).detach().requires_grad_()
    full, local = (block(x, contexts)[0, 8].sum() for block in model.encoder.blocks)
    assert torch.autograd.grad(full, x)[0][0].abs().sum(-1).nonzero()[:, 0].tolist() == list(range(16))
    assert torch.autograd.grad(local, x)[0][0].abs().sum(-1).nonzero()[:, 0].tolist() == list(range(5, 12))


def test_local_layers_turn_by_their_own_theta() -> None:
    (document,) = documents(CONFIGS["modernbert"], [(16, 0)])
    other = _with(CONFIGS["modernbert"], local_rope_theta=777.0)
    assert not torch.equal(build(CONFIGS["modernbert"], 1).logits(document), build(other, 1).logits(document))


@pytest.mark.parametrize("name", ["llama", "modernbert", "t5"])
def test_picked_positions_give_the_loss_of_their_targets(name: str) -> None:
    model = build(CONFIGS[name], seed=1)
    row = packed(documents(CONFIGS[name], LENGTHS), length=26, source_length=24)
    picked = torch.tensor([[0, 2, 3, 7, 12, 20, -1, -1]])
    targets = torch.full_like(row.targets, IGNORE).scatter(
        1, picked[:, :6], row.targets.gather(1, picked[:, :6])
    )
    masked = replace(row, targets=targets)
    few = replace(masked, picked=picked)
    torch.testing.assert_close(_gradients(model, [few]), _gradients(model, [masked]))
    with torch.no_grad():
        torch.testing.assert_close(tuple(model(few)), tuple(model(masked)))


def test_the_head_runs_on_the_picked_positions_alone() -> None:
    model = build(CONFIGS["modernbert"], seed=1)
    row = replace(
        packed(documents(CONFIGS["modernbert"], LENGTHS), 26, 0), picked=torch.tensor([[0, 2, 3, -1]])
    )
    seen: list[torch.Size] = []
    assert model.head.dense is not None
    model.head.dense.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(row)
    assert seen == [(1, 4, 32)]


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_gives_the_same_gradients_dropout_included(name: str) -> None:
    model = build(_with(CONFIGS[name], dropout=0.2), seed=1).train()
    row = packed(documents(CONFIGS[name], LENGTHS), length=26, source_length=24)
    recorded = _gradients(model, [row])
    model.recompute(True)
    for key, gradient in _gradients(model, [row]).items():
        assert torch.equal(gradient, recorded[key]), key


def test_recomputation_runs_each_block_twice() -> None:
    model = build(CONFIGS["llama"], seed=1)
    model.recompute(True)
    assert isinstance(model.decoder, Stack)
    calls: list[int] = []
    model.decoder.blocks[0].register_forward_pre_hook(lambda module, inputs: calls.append(1))
    model(documents(CONFIGS["llama"], [(7, 0)])[0]).total.backward()
    assert len(calls) == 2


def test_dropout_follows_the_global_generator_and_stops_in_evaluation() -> None:
    model = build(_with(CONFIGS["t5gemma"], dropout=0.3), seed=1).train()
    row = packed(documents(CONFIGS["t5gemma"], LENGTHS), length=26, source_length=24)

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(row).total

    assert loss(5) == loss(5) and loss(5) != loss(6)
    model.eval()
    assert loss(5) == loss(6) == build(CONFIGS["t5gemma"], seed=1)(row).total


def test_the_scales_multiply_embeddings_scores_and_logits() -> None:
    plain = build(_with(CONFIGS["llama"], tie_embeddings=False), seed=1)
    (document,) = documents(CONFIGS["llama"], [(9, 0)])
    scaled = build(_with(plain.config, embed_scale=2.0, attention_scale=4 * 8**-0.5, logit_scale=0.5), seed=1)
    state = plain.state_dict()
    halves = (
        {"embed.weight": 0.5}
        | {f"decoder.blocks.{i}.attn.f.q.weight": 0.25 for i in range(3)}
        | {"head.weight": 2.0}
    )
    scaled.load_state_dict({key: value * halves.get(key, 1.0) for key, value in state.items()})
    torch.testing.assert_close(scaled.logits(document), plain.logits(document))
    torch.testing.assert_close(scaled(document).total, plain(document).total)


def test_a_tied_table_collects_both_gradients() -> None:
    """Against two separate tables that hold the same values."""
    tied = build(CONFIGS["llama"], seed=1)
    untied = build(_with(CONFIGS["llama"], tie_embeddings=False), seed=1)
    assert untied.head.weight is not None
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.embed.weight.detach().clone()})
    row = packed(documents(CONFIGS["llama"], LENGTHS), length=26, source_length=0)
    singles = _gradients(untied, [row])
    torch.testing.assert_close(
        _gradients(tied, [row])["embed.weight"], singles["embed.weight"] + singles["head.weight"]
    )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_low_precision_runs_forward_and_backward_close_to_fp32(name: str, mode: str) -> None:
    exact = build(EVERY[name], seed=1)
    model = copy.deepcopy(exact).bfloat16() if mode == "bf16" else exact
    row = packed(documents(EVERY[name], LENGTHS), length=26, source_length=24)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss = model(row).total
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - exact(row).total) < 0.05 * loss
    for key, parameter in model.named_parameters():
        assert (
            parameter.grad is not None
            and parameter.grad.isfinite().all()
            and parameter.grad.dtype == parameter.dtype
        ), key


@pytest.mark.parametrize("name", EVERY)
def test_labels_take_the_place_of_the_vocabulary(name: str) -> None:
    config = _with(EVERY[name], labels=("a", "b", "c", "d", "e"))
    model = build(config, seed=1)
    row = packed(documents(config, LENGTHS), length=26, source_length=24)
    row = replace(row, targets=torch.where(row.targets == IGNORE, IGNORE, row.targets % 5))
    expected = F.cross_entropy(model.logits(row).flatten(0, 1), row.targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(row).total, expected)
    assert model.logits(row).shape == (1, 26, 5)


@pytest.mark.parametrize("name", EVERY)
def test_the_loss_is_cross_entropy_of_the_logits(name: str) -> None:
    model = build(EVERY[name], seed=1)
    row = packed(documents(EVERY[name], LENGTHS), length=26, source_length=24)
    expected = F.cross_entropy(model.logits(row).flatten(0, 1), row.targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(row).total, expected)


def test_initial_values_are_keyed_by_seed_and_name_alone() -> None:
    first, again, other = (build(CONFIGS["t5"], seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert not torch.equal(
        first["encoder.blocks.0.attn.f.q.weight"], first["encoder.blocks.0.attn.f.k.weight"]
    )
    deeper = build(_with(CONFIGS["t5"], num_layers=5, vocab_size=90), 1).state_dict()
    assert torch.equal(
        first["decoder.blocks.2.cross.f.q.weight"], deeper["decoder.blocks.2.cross.f.q.weight"]
    )

    torch.manual_seed(9)
    backwards = build(CONFIGS["t5"], 1)
    listed = list(backwards.named_parameters())[::-1]
    with torch.no_grad():
        for _, parameter in listed:
            parameter.fill_(float("nan"))
    backwards.named_parameters = lambda *args, **kwargs: iter(listed)
    initialise(backwards, 1)
    assert all(torch.equal(first[key], value) for key, value in backwards.state_dict().items())


def test_initial_scales_are_the_documented_ones() -> None:
    config = _with(CONFIGS["t5gemma"], vocab_size=4000, init_std=0.02, tie_embeddings=False)
    state = build(config, seed=1).state_dict()
    assert abs(state["embed.weight"].std() * config.embed_scale - 1) < 0.02
    assert abs(state["head.weight"].std() / 0.02 - 1) < 0.02
    assert abs(state["decoder.blocks.1.mlp.f.up.weight"].std() / 0.02 - 1) < 0.1
    for name in (
        "decoder.blocks.1.mlp.f.down.weight",
        "decoder.blocks.1.cross.f.o.weight",
        "encoder.blocks.1.attn.f.o.weight",
    ):
        assert abs(state[name].std() / 0.02 * (2 * config.num_layers) ** 0.5 - 1) < 0.1
    nllb = build(CONFIGS["nllb"], seed=1).state_dict()
    assert all((nllb[key] == 0).all() for key in nllb if key.endswith("bias"))
    assert all((nllb[key] == 1).all() for key in nllb if "norm" in key and key.endswith("weight"))


def test_mimetic_global_layers_begin_by_looking_at_equal_tokens() -> None:
    config = _with(
        CONFIGS["modernbert"],
        dim=64,
        head_dim=16,
        num_heads=4,
        num_kv_heads=2,
        local_window=2,
        global_every=2,
        mimetic=True,
    )
    model, plain = build(config, 1), build(_with(config, mimetic=False), 1).state_dict()
    assert isinstance(model.encoder, Stack)
    tokens = torch.arange(1, 21).repeat(2)[None]
    x = model.encoder.embed_norm(model.embedded(tokens))
    for layer, block in enumerate(model.encoder.blocks):
        q, k = block.attn.f.q.weight, block.attn.f.k.weight
        assert torch.equal(q.unflatten(0, (2, 2, 16))[:, 1], k.unflatten(0, (2, 16))) == (layer % 2 == 0)
    probabilities = model.encoder.blocks[0].attn.f.weights(
        x, AttentionContext(Visibility(False, torch.ones_like(tokens), torch.ones_like(tokens)))
    )
    equal = (tokens[0, :, None] == tokens[0]).float()
    assert (probabilities * equal).sum(-1).mean() > 0.4  # of 40 places 2: by chance 0.05
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed == {
        f"encoder.blocks.{layer}.attn.f.{projection}.weight" for layer in (0, 2) for projection in "qk"
    }


def test_parameters_have_the_names_that_the_tables_read() -> None:
    names = {key: set(build(config, 0).state_dict()) for key, config in CONFIGS.items()}
    assert {n for n in names["llama"] if "blocks" not in n} == {"embed.weight", "decoder.norm.weight"}
    assert {n.removeprefix("decoder.blocks.1.") for n in names["llama"] if ".1." in n} == {
        "attn.pre.weight",
        "attn.f.q.weight",
        "attn.f.k.weight",
        "attn.f.v.weight",
        "attn.f.o.weight",
        "mlp.pre.weight",
        "mlp.f.gate.weight",
        "mlp.f.up.weight",
        "mlp.f.down.weight",
    }
    assert (
        "encoder.blocks.0.attn.pre.weight" not in names["modernbert"]
        and "encoder.blocks.1.attn.pre.weight" in names["modernbert"]
    )
    assert {n for n in names["modernbert"] if "blocks" not in n} == {
        "embed.weight",
        "encoder.embed_norm.weight",
        "encoder.norm.weight",
        "head.dense.weight",
        "head.norm.weight",
        "head.bias",
    }
    assert {"encoder.position.table.weight", "decoder.position.table.weight"} <= names["t5"]
    assert {"decoder.position.weight", "decoder.blocks.0.attn.f.q.bias"} <= names[
        "gpt2"
    ] and "head.weight" in names["nllb"]
    assert {"decoder.blocks.0.cross.inner.weight", "decoder.blocks.0.cross.pre.weight"} <= names["t5gemma"]
    labels = set(build(_with(CONFIGS["modernbert"], labels=("a", "b", "c")), 0).state_dict())
    assert {"head.labels.weight", "head.labels.bias"} <= labels and "head.bias" not in labels


def _gradients(model: Transformer, batches: list[Batch]) -> dict[str, Tensor]:
    """Summed over the batches, on the same dropout each time; zeros where there is none."""
    model.zero_grad()
    torch.manual_seed(0)
    for batch in batches:
        model(batch).total.backward()
    return {
        key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in model.named_parameters()
    }
