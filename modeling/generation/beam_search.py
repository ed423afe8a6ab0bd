"""Beam search: of the K texts that are followed, the one of the highest score.

A text's score is the sum of its log-probabilities over a power of its length. It follows transformers'
`_beam_search` (early_stopping=False) token for token: of the 2 * K best candidates the K best that do not end
are followed; those among the first K that end are finished texts, of which each row keeps its K best; a row
is done when no followed text can beat its worst finished one at the present length. Shapes: B prompts, K
beams, V vocabulary.
"""

from collections.abc import Callable

import torch

from trifold.modeling.generation.decoding import DecodingState

MINUS_INFINITY = -1e9  # a score below every real one


def beam_search(
    state: DecodingState, any_rank_unfinished: Callable[[bool], bool]
) -> list[list[tuple[list[int], float]]]:
    """The `num_best` best texts of each prompt, best first: (tokens, score)."""
    generation = state.generation
    rows, beams = len(state.tokens), generation.beams
    device = state.tokens.device
    # The beams of row b are the rows b * K to b * K + K - 1 of the batch.
    first_beam = torch.arange(rows, device=device)[:, None] * beams
    # At first all beams of a row are equal, so only one of them counts.
    running = torch.full((rows, beams), MINUS_INFINITY, device=device)
    running[:, 0] = 0
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(rows)]
    unfinished = [True] * rows

    while state.num_new < generation.max_new and any_rank_unfinished(any(unfinished)):
        scores = state.next_log_probs()
        if not state.num_new:  # the prompt is read once for all its beams
            state.repeat(beams)
            scores = scores.repeat_interleave(beams, dim=0)
        scores_BKV = scores.unflatten(0, (rows, beams)) + running[:, :, None]
        best, index = scores_BKV.flatten(1).topk(2 * beams)
        beam, token = index // scores_BKV.shape[2], index % scores_BKV.shape[2]

        length = state.num_new + 1
        penalty = length**generation.length_penalty
        ends = state.is_end(token) | (length == generation.max_new)
        for b, k in ends[:, :beams].nonzero().tolist():
            if unfinished[b]:
                text = state.tokens[b * beams + int(beam[b, k]), state.prompt_length :].tolist()
                finished[b].append((float(best[b, k]) / penalty, [*text, int(token[b, k])]))

        running, kept = (best + ends * MINUS_INFINITY).topk(beams)
        state.reorder((first_beam + beam.gather(1, kept)).flatten())
        state.append(token.gather(1, kept).flatten())
        for b, highest in enumerate(running[:, 0].tolist()):
            finished[b] = sorted(finished[b], key=lambda text: -text[0])[:beams]
            can_improve = len(finished[b]) < beams or highest / penalty > finished[b][-1][0]
            unfinished[b] = unfinished[b] and can_improve

    return [[(tokens, score) for score, tokens in texts[: generation.num_best]] for texts in finished]
