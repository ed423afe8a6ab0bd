"""Generation: prompts in, continuations out, batched, with cached keys and values.

Greedy and sampled generation are here, beams in beam_search.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trifold.modeling.errors import UserError
from trifold.modeling.generation.beam_search import beam_search
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.decoding import DecodingState
from trifold.modeling.transformer import Transformer


def generate(
    model: Transformer,
    prompts: list[list[int]],
    generation: Generation = Generation(),  # noqa: B008 (frozen)
    *,
    bos: int,
    eos: int,
    pad: int,
    any_rank_unfinished: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """At most `max_new` new tokens for each prompt; the last one is an end token where the model ended the
    text.

    A decoder continues its prompt (an empty one becomes `bos`). An encoder-decoder reads it as the source and
    starts from `bos`, or from `generation.start`. A text ends at `eos`, or at one of `generation.more_ends`.
    Ranks that generate in lockstep pass `any_rank_unfinished(unfinished)`, whether any of them has unfinished
    rows: all then take equally many steps. Raises UserError for an encoder, and where a prompt is longer than
    the model's positions.
    """
    best = hypotheses(
        model, prompts, generation, bos=bos, eos=eos, pad=pad, any_rank_unfinished=any_rank_unfinished
    )
    return [texts[0][0] for texts in best]


@torch.no_grad()
def hypotheses(
    model: Transformer,
    prompts: list[list[int]],
    generation: Generation,
    *,
    bos: int,
    eos: int,
    pad: int,
    any_rank_unfinished: Callable[[bool], bool] = bool,
) -> list[list[tuple[list[int], float]]]:
    """Each prompt's `num_best` best beams with their scores, best first; without beams one text, and 0."""
    _check(model, generation)
    if not prompts:
        return []
    training = model.training
    model.eval()
    try:
        state = DecodingState(model, prompts, generation, bos=bos, eos=eos, pad=pad)
        if generation.beams > 1:
            return beam_search(state, any_rank_unfinished)
        rows = _sample_or_greedy(state, pad, any_rank_unfinished)
        return [[(_up_to_end(row, state.ends), 0.0)] for row in rows]
    finally:
        model.train(training)


def _check(model: Transformer, generation: Generation) -> None:
    if model.decoder is None or model.config.outputs:
        kind = f"family {model.config.family}" + (" with a task's head" if model.config.outputs else "")
        raise UserError(f"A model of {kind} does not generate text: use a decoder or an encoder-decoder.")
    if model.encoder is None and (generation.first is not None or generation.start is not None):
        raise UserError(
            f"generation.first ({generation.first}) and generation.start ({generation.start}) are for"
            " encoder-decoders, and this model is a decoder: remove them, or begin the prompt with the token."
        )
    if generation.beams > 1 and (generation.sample or generation.num_best > generation.beams):
        raise UserError(
            f"{generation.beams} beams cannot give {generation.num_best} texts or be sampled: raise beams, or"
            " set beams to 1 for sampling."
        )


def _up_to_end(row: list[int], ends: list[int]) -> list[int]:
    length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:length]


def _sample_or_greedy(
    state: DecodingState, pad: int, any_rank_unfinished: Callable[[bool], bool]
) -> list[list[int]]:
    """Token after token, the most likely or a drawn one, until all rows have ended; `pad` after an end."""
    generation = state.generation
    rng = torch.Generator(state.tokens.device).manual_seed(generation.seed)
    unfinished = torch.ones_like(state.tokens[:, 0], dtype=torch.bool)
    while state.num_new < generation.max_new and any_rank_unfinished(bool(unfinished.any())):
        scores = state.next_log_probs()
        token = _sample(scores, generation, rng) if generation.sample else scores.argmax(-1)
        state.append(torch.where(unfinished, token, pad))
        unfinished = unfinished & ~state.is_end(token)
    return state.tokens[:, state.prompt_length :].tolist()


def _sample(scores_BV: Tensor, generation: Generation, rng: torch.Generator) -> Tensor:
    """Temperature, then top-k, then top-p (nucleus: Holtzman et al. 2020), then a draw."""
    scores = scores_BV / generation.temperature
    if generation.top_k:
        k = min(generation.top_k, scores.shape[1])
        smallest = scores.topk(k)[0][:, -1:]
        scores = scores.masked_fill(scores < smallest, float("-inf"))
    ordered, index = scores.softmax(-1).sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= generation.top_p, 0)  # the most likely token always remains
    return index.gather(1, torch.multinomial(ordered, 1, generator=rng))[:, 0]
