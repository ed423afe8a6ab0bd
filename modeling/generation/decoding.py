"""A batch under generation: in, prompts; out, step by step, the log-probabilities of each row's next token.

Prompts of unequal length are padded on the left, sources on the right; padding is segment 0 and nobody sees
it.
"""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trifold.modeling.config import Generation
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import Transformer


class DecodingState:
    """A batch under generation: takes each row's newest tokens, gives the log-probabilities of the next."""

    def __init__(
        self, model: Transformer, prompts: list[list[int]], how: Generation, bos: int, pad: int
    ) -> None:
        assert model.decoder is not None
        self.model, self.decoder, self.how = model, model.decoder, how
        self.memory = self.sources = None
        if model.encoder is not None:
            tokens, segments = _padded(model, prompts, pad, left=False)
            self.sources = None if segments.all() else segments
            self.memory = model.encoder(model.embedded(tokens), self.sources)
            prompts = [[bos if how.start is None else how.start]] * len(prompts)
        self.tokens, segments = _padded(model, [prompt or [bos] for prompt in prompts], pad, left=True)
        self.begin, end = self.tokens.shape[1], self.tokens.shape[1] + how.max_new
        _fits(model, end)
        self.segments = F.pad(segments, (0, how.max_new), value=1)
        self.padded = (
            self.sources is not None or not segments.all()
        )  # without padding the kernels need no masks
        self.caches: list[Any] = self.decoder.caches(end, 0 if self.memory is None else self.memory.shape[1])

    @property
    def start(self) -> int:
        """New tokens so far."""
        return self.tokens.shape[1] - self.begin

    def next_log_probs(self, eos: int) -> Tensor:
        """Log-probabilities (B, V) fp32 of the next token; -inf where `how` forbids it."""
        used, length = self.caches[0][0].used, self.tokens.shape[1]
        segments = self.segments[:, :length] if self.padded else None
        h = self.decoder(
            self.model.embedded(self.tokens[:, used:]), segments, self.memory, self.sources, self.caches
        )
        scores = self.model.head(h[:, -1:], self.model.embed)[:, 0].float().log_softmax(-1)
        if self.start < self.how.min_new:
            scores[:, eos] = float("-inf")
        if self.how.no_repeat:
            scores = _forbid_repeats(scores, self.tokens, self.segments, self.how.no_repeat)
        last = self.how.end and self.start == self.how.max_new - 1
        forced = eos if last else self.how.first if self.start == 0 else None
        if (
            forced is not None
        ):  # at no cost in the score, as transformers' forced_bos_token_id and forced_eos_token_id
            scores = torch.full_like(scores, float("-inf"))
            scores[:, forced] = 0
        return scores

    def add(self, tokens_B: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens_B[:, None]], dim=1)

    def repeat(self, times: int) -> None:
        """Go on with as many copies of each row, side by side."""
        self.tokens, self.segments = (x.repeat_interleave(times, dim=0) for x in (self.tokens, self.segments))
        self.memory, self.sources = (
            None if x is None else x.repeat_interleave(times, dim=0) for x in (self.memory, self.sources)
        )
        for cache in chain.from_iterable(self.caches):
            cache.repeat(times)

    def reorder(self, rows_B: Tensor) -> None:
        """Go on with these rows, in this order, each of the same prompt as the one whose place it takes: what
        was read stays.
        """
        self.tokens = self.tokens[rows_B]
        for own, *_ in self.caches:
            own.reorder(rows_B, self.begin)


def _forbid_repeats(scores_BV: Tensor, tokens_BT: Tensor, segments_BT: Tensor, n: int) -> Tensor:
    """Forbid each token that would complete an n-gram which its row holds already (Paulus et al. 2018)."""
    for row, (tokens, segments) in enumerate(zip(tokens_BT.tolist(), segments_BT.tolist(), strict=True)):
        known = [token for token, segment in zip(tokens, segments, strict=False) if segment]
        last = known[len(known) - n + 1 :]
        again = [known[i + n - 1] for i in range(len(known) - n + 1) if known[i : i + n - 1] == last]
        scores_BV[row, again] = float("-inf")
    return scores_BV


def _padded(model: Transformer, rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of equal length, and their segments: 1, and 0 where padded."""
    width = max(1, *map(len, rows))
    _fits(model, width)
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    device = next(model.parameters()).device
    segments = torch.tensor(
        [f + o if left else o + f for f, o in zip(fill, ones, strict=True)], device=device
    )
    tokens = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    return torch.tensor(tokens, device=device).where(segments > 0, pad), segments


def _fits(model: Transformer, length: int) -> None:
    if model.config.position == "learned" and length > model.config.max_positions:
        raise UserError(
            f"Generation needs {length} positions, and this model has learned {model.config.max_positions}:"
            " shorten the prompt or ask for fewer new tokens."
        )
