"""Beam search: the text of the highest score, the sum of its log-probabilities over a power of its length, of
the few that are followed.

It follows transformers' `_beam_search` (early_stopping=False) token for token: of 2 * beams candidates the
best that do not end go on; those among the first `beams` that end are kept while they are among the best; a
row is done when no running beam can beat its worst kept one at the present length. Shapes: B prompts, K
beams, V vocabulary.
"""

from collections.abc import Callable

import torch

from trifold.modeling.config import Generation
from trifold.modeling.generation.decoding import DecodingState

MINUS_INFINITY = -1e9  # a score that loses against every real one


def search(
    read: DecodingState, how: Generation, eos: int, pad: int, anyone: Callable[[bool], bool]
) -> list[list[tuple[list[int], float]]]:
    """The `num_best` best of every prompt's beams, best first: (tokens, score)."""
    rows, beams = len(read.tokens), how.beams
    first = (
        torch.arange(rows, device=read.tokens.device)[:, None] * beams
    )  # row b's beams are rows b * K to b * K + K - 1 of the batch
    running = torch.full((rows, beams), MINUS_INFINITY, device=read.tokens.device)
    running[:, 0] = 0  # at first all beams are the same: one of them counts
    kept: list[list[tuple[float, list[int]]]] = [[] for _ in range(rows)]
    going = [True] * rows
    while read.start < how.max_new and anyone(any(going)):
        scores = read.next_log_probs(eos)
        if not read.start:  # a prompt is read once for all its beams
            read.repeat(beams)
            scores = scores.repeat_interleave(beams, dim=0)
        scores_BKV = scores.unflatten(0, (rows, beams)) + running[:, :, None]
        best, index = scores_BKV.flatten(1).topk(2 * beams)
        beam, token = index // scores_BKV.shape[2], index % scores_BKV.shape[2]
        length = read.start + 1
        ends = (token == eos) | (length == how.max_new)
        for b, k in ends[:, :beams].nonzero().tolist():
            if going[b]:
                made = [*read.tokens[b * beams + int(beam[b, k]), read.begin :].tolist(), int(token[b, k])]
                kept[b].append((float(best[b, k]) / length**how.length_penalty, made))
        running, on = (best + ends * MINUS_INFINITY).topk(beams)
        read.reorder((first + beam.gather(1, on)).flatten())
        read.add(token.gather(1, on).flatten())
        for b, highest in enumerate(running[:, 0].tolist()):
            kept[b] = sorted(kept[b], key=lambda pair: -pair[0])[:beams]
            going[b] = going[b] and (
                len(kept[b]) < beams or highest / length**how.length_penalty > kept[b][-1][0]
            )
    return [[(tokens, score) for score, tokens in ended[: how.num_best]] for ended in kept]
