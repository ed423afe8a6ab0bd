"""A batch under generation: prompts in; step by step, the log-probabilities of each row's next token out.

Prompts of unequal length are padded on the left, sources on the right; padding is segment 0, and no token
attends to it. Shapes: B rows, T tokens so far, V vocabulary.
"""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.transformer import Transformer


class DecodingState:
    """The rows so far, and the caches of the model that continues them."""

    def __init__(
        self,
        model: Transformer,
        prompts: list[list[int]],
        generation: Generation,
        *,
        bos: int,
        eos: int,
        pad: int,
    ) -> None:
        """Encodes the sources. Raises UserError where a prompt is longer than the model's positions."""
        assert model.decoder is not None
        self.model, self.decoder, self.generation = model, model.decoder, generation
        self.eos = eos
        self.ends = [eos, *generation.more_ends]
        prompts = fit_prompts(model.config, prompts, generation)
        self.memory = self.source_segments = None
        if model.encoder is not None:
            sources, segments = _padded(model, prompts, pad, left=False)
            self.source_segments = None if segments.all() else segments
            self.memory = model.encoder(model.embedded(sources), self.source_segments)
            start = bos if generation.start is None else generation.start
            prompts = [[start]] * len(prompts)

        self.tokens, segments = _padded(model, [prompt or [bos] for prompt in prompts], pad, left=True)
        self.prompt_length = self.tokens.shape[1]
        length = self.prompt_length + generation.max_new
        self.segments = F.pad(segments, (0, generation.max_new), value=1)
        # Without padding the kernels need no masks.
        self.padded = self.source_segments is not None or not segments.all()
        memory_length = 0 if self.memory is None else self.memory.shape[1]
        self.caches: list[Any] = self.decoder.caches(length, memory_length)

    @property
    def num_new(self) -> int:
        """How many new tokens each row has so far."""
        return self.tokens.shape[1] - self.prompt_length

    def is_end(self, tokens: Tensor) -> Tensor:
        """Which tokens end a text, bool."""
        return torch.isin(tokens, torch.tensor(self.ends, device=tokens.device))

    def next_log_probs(self) -> Tensor:
        """Log-probabilities (B, V) fp32 of the next token; -inf where the settings forbid it."""
        generation = self.generation
        used, length = self.caches[0][0].used, self.tokens.shape[1]
        segments = self.segments[:, :length] if self.padded else None
        x = self.model.embedded(self.tokens[:, used:])
        h = self.decoder(x, segments, self.memory, self.source_segments, self.caches)
        logits = self.model.head.logits(h[:, -1:], self.model.embed)[:, 0]
        scores = logits.float().log_softmax(-1)

        if self.num_new < generation.min_new:
            scores[:, self.ends] = float("-inf")
        if generation.no_repeat:
            scores = _forbid_repeats(scores, self.tokens, self.segments, generation.no_repeat)
        forced = self._forced_token()
        if forced is not None:  # at no cost in the score, as in transformers
            scores = torch.full_like(scores, float("-inf"))
            scores[:, forced] = 0
        return scores

    def _forced_token(self) -> int | None:
        """As transformers' forced_bos_token_id and forced_eos_token_id."""
        if self.generation.end and self.num_new == self.generation.max_new - 1:
            return self.eos
        return self.generation.first if self.num_new == 0 else None

    def append(self, tokens_B: Tensor) -> None:
        """The next token of each row."""
        self.tokens = torch.cat([self.tokens, tokens_B[:, None]], dim=1)

    def repeat(self, times: int) -> None:
        """Copy each row `times` times; the copies are adjacent."""
        self.tokens = self.tokens.repeat_interleave(times, dim=0)
        self.segments = self.segments.repeat_interleave(times, dim=0)
        if self.memory is not None:
            self.memory = self.memory.repeat_interleave(times, dim=0)
        if self.source_segments is not None:
            self.source_segments = self.source_segments.repeat_interleave(times, dim=0)
        for cache in chain.from_iterable(self.caches):
            cache.repeat(times)

    def reorder(self, rows_B: Tensor) -> None:
        """Select these rows, in this order. Each must have the prompt of the row that it replaces."""
        self.tokens = self.tokens[rows_B]
        for self_attention, *_ in self.caches:
            self_attention.reorder(rows_B, self.prompt_length)


def _forbid_repeats(scores_BV: Tensor, tokens_BT: Tensor, segments_BT: Tensor, n: int) -> Tensor:
    """Forbid each token that would complete an n-gram that its row already contains (Paulus et al. 2018)."""
    for row, (tokens, segments) in enumerate(zip(tokens_BT.tolist(), segments_BT.tolist(), strict=True)):
        text = [token for token, segment in zip(tokens, segments, strict=False) if segment]
        prefix = text[len(text) - n + 1 :]
        starts = range(len(text) - n + 1)
        repeated = [text[i + n - 1] for i in starts if text[i : i + n - 1] == prefix]
        scores_BV[row, repeated] = float("-inf")
    return scores_BV


def _padded(model: Transformer, rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of equal length, and their segments: 1, and 0 where padded."""
    width = max(1, *map(len, rows))
    tokens, segments = [], []
    for row in rows:
        zeros, ones = [0] * (width - len(row)), [1] * len(row)
        tokens.append(zeros + row if left else row + zeros)
        segments.append(zeros + ones if left else ones + zeros)
    device = next(model.parameters()).device
    segments_BT = torch.tensor(segments, device=device)
    return torch.tensor(tokens, device=device).where(segments_BT > 0, pad), segments_BT


def fit_prompts(config: ModelConfig, prompts: list[list[int]], generation: Generation) -> list[list[int]]:
    """The prompts; with `generation.cut_prompt` without what exceeds the model's positions.

    A source keeps its beginning, a decoder's prompt its end. Learned positions must also be enough for the
    new tokens; other models may generate past `max_positions`, and recurrent models have no limit. Raises
    UserError, before anything is computed.
    """
    if config.cell != "attention":
        return prompts
    limit, learned = config.max_positions, config.position == "learned"
    if config.family == "decoder" and learned:
        limit -= generation.max_new
    if learned and config.max_positions < generation.max_new + 1:
        raise UserError(
            f"Generation needs {generation.max_new + 1} positions for new tokens, and this model has learned"
            f" {config.max_positions}: request fewer (generation.max_new)."
        )
    longest = max(map(len, prompts), default=0)
    if longest > limit and not generation.cut_prompt:
        new = f" and {generation.max_new} new ones" if limit < config.max_positions else ""
        raise UserError(
            f"A prompt has {longest} tokens{new}, and this model has {config.max_positions} positions:"
            " shorten it, or set generation.cut_prompt to cut what is longer."
        )
    if config.family == "decoder":
        return [prompt[-limit:] for prompt in prompts]
    return [prompt[:limit] for prompt in prompts]
