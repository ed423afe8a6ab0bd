"""Cached, batched, padded generation against one prompt at a time without any cache."""

import pytest
import torch

from tests.modeling.families import CONFIGS, RECURRENT
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.transformer import Transformer, build

BOS, EOS, PAD = 1, 2, 0
PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [11, 12], [40, 41, 42, 43, 44]]
EVERY = CONFIGS | RECURRENT
GENERATORS = [name for name, config in EVERY.items() if config.family != "encoder"]


def _varied(name: str) -> Transformer:
    """Untied: a tied model of random weights repeats its last token."""
    return build(ModelConfig(**EVERY[name].model_dump() | {"tie_embeddings": False}), seed=4).eval()


def _uncached(model: Transformer, prompt: list[int], max_new: int, eos: int) -> list[int]:
    """The whole row again for each new token."""
    sources = model.config.family == "encoder-decoder"
    row = [BOS] if sources else list(prompt)
    new: list[int] = []
    while len(new) < max_new and eos not in new:
        tokens = torch.tensor([row + new])
        source = (
            (torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long))
            if sources
            else (None, None)
        )
        with torch.no_grad():
            logits = model.logits(Batch(tokens, torch.ones_like(tokens), tokens, *source))
        new.append(int(logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("name", GENERATORS)
def test_cached_equals_uncached_token_for_token(name: str) -> None:
    model = _varied(name)
    expected = [_uncached(model, prompt, 12, eos=-1) for prompt in PROMPTS]
    assert generate(model, PROMPTS, Generation(max_new=12), bos=BOS, eos=-1, pad=PAD) == expected
    assert len({tuple(row) for row in expected}) > 1 and any(
        len(set(row)) > 4 for row in expected
    )  # prompts and steps matter


@pytest.mark.parametrize("name", ["llama", "t5gemma"])
def test_each_row_ends_with_its_own_eos(name: str) -> None:
    model = _varied(name)
    free = generate(model, PROMPTS, Generation(max_new=12), bos=BOS, eos=-1, pad=PAD)
    eos = free[0][2]
    ended = generate(model, PROMPTS, Generation(max_new=12), bos=BOS, eos=eos, pad=PAD)
    assert ended == [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert ended[0] == free[0][: free[0].index(eos) + 1]


def test_the_batch_stops_when_its_last_row_has_ended() -> None:
    model = _varied("local decoder")
    first, *_, eos = generate(model, PROMPTS[:1], Generation(max_new=3), bos=BOS, eos=-1, pad=PAD)[0]
    assert eos != first
    ahead = [*PROMPTS[0], first]  # the same text, one token further: it ends one step earlier
    assert model.decoder is not None
    steps: list[int] = []
    model.decoder.register_forward_hook(lambda module, inputs, output: steps.append(1))
    rows = generate(model, [PROMPTS[0], ahead], Generation(max_new=20), bos=BOS, eos=eos, pad=PAD)
    assert len(steps) == len(rows[0]) == len(rows[1]) + 1 == 3


@pytest.mark.parametrize("name", ["gpt2", "lstm decoder", "gru multiplicative"])
def test_padding_tokens_have_no_influence(name: str) -> None:
    model = _varied(name)
    one, other = (
        generate(model, PROMPTS, Generation(max_new=6), bos=BOS, eos=-1, pad=pad) for pad in (0, 33)
    )
    assert one == other


def test_generation_switches_dropout_off_and_leaves_the_mode_as_it_was() -> None:
    model = build(ModelConfig(**CONFIGS["llama"].model_dump() | {"dropout": 0.5}), seed=3).train()
    first, second = (
        generate(model, PROMPTS, Generation(max_new=8), bos=BOS, eos=-1, pad=PAD) for _ in range(2)
    )
    assert first == second and model.training


def test_empty_prompts_begin_with_bos_and_empty_sources_are_read() -> None:
    for name in ("llama", "t5gemma", "lstm additive"):
        model = _varied(name)
        alone, beside = (
            generate(model, prompts, Generation(max_new=4), bos=BOS, eos=-1, pad=PAD)[0]
            for prompts in ([[]], [[], [5, 6]])
        )
        assert alone == beside and len(alone) == 4
    decoder = _varied("llama")
    empty, begun = (
        generate(decoder, [prompt], Generation(max_new=4), bos=BOS, eos=-1, pad=PAD) for prompt in ([], [BOS])
    )
    assert empty == begun
    assert generate(decoder, [], Generation(max_new=4), bos=BOS, eos=-1, pad=PAD) == []


def test_an_encoder_and_a_full_table_of_positions_are_refused() -> None:
    with pytest.raises(UserError, match="encoder does not generate"):
        generate(build(CONFIGS["modernbert"], 0), PROMPTS, Generation(max_new=2), bos=BOS, eos=EOS, pad=PAD)
    with pytest.raises(UserError, match="7 tokens and 28 new ones, and this model has 32 positions"):
        generate(build(CONFIGS["gpt2"], 0), PROMPTS, Generation(max_new=28), bos=BOS, eos=EOS, pad=PAD)


@pytest.mark.parametrize(("name", "limit"), [("gpt2", 26), ("llama", 32), ("t5", 32), ("nllb", 32)])
def test_a_prompt_beyond_the_models_positions_is_rejected_with_both_numbers_or_cut(
    name: str, limit: int
) -> None:
    """A decoder keeps the end of its prompt, an encoder-decoder the beginning of its source."""
    model = _varied(name)
    prompt = [5 + i % 50 for i in range(40)]
    expected_prompt = prompt[-limit:] if model.encoder is None else prompt[:limit]
    cut = Generation(max_new=6, cut_prompt=True)
    expected = generate(model, [expected_prompt], Generation(max_new=6), bos=BOS, eos=-1, pad=PAD)
    assert generate(model, [prompt], cut, bos=BOS, eos=-1, pad=PAD) == expected
    with pytest.raises(UserError, match=r"A prompt has 40 tokens.* this model has 32 positions.*cut_prompt"):
        generate(model, [[5], prompt], Generation(max_new=6), bos=BOS, eos=-1, pad=PAD)


def test_a_prompt_of_a_million_tokens_is_rejected_before_anything_is_computed() -> None:
    model = build(CONFIGS["llama"], 0)
    with pytest.raises(UserError, match="1000000 tokens"):
        generate(model, [[5] * 1_000_000], bos=BOS, eos=EOS, pad=PAD)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_ends_at_each_of_several_end_tokens(beams: int) -> None:
    model = _varied("llama")
    settings = Generation(max_new=12, beams=beams)
    free = generate(model, PROMPTS, settings, bos=BOS, eos=-1, pad=PAD)
    first, second = free[0][2], free[1][1]
    several = settings.model_copy(update={"more_ends": (second,)})
    ended = generate(model, PROMPTS, several, bos=BOS, eos=first, pad=PAD)
    for row in ended:
        assert not {first, second} & set(row[:-1]) and (len(row) == 12 or row[-1] in (first, second))
    assert len(ended[0]) < 12 and len(ended[1]) < 12
    longer = several.model_copy(update={"min_new": 5})
    assert min(map(len, generate(model, PROMPTS, longer, bos=BOS, eos=first, pad=PAD))) >= 5


def test_what_only_a_decoder_with_a_source_has_is_rejected_for_other_decoders() -> None:
    with pytest.raises(UserError, match=r"generation\.first \(9\).*this model is a decoder"):
        generate(_varied("llama"), PROMPTS, Generation(first=9), bos=BOS, eos=EOS, pad=PAD)
