"""A context with questions, its tokenizer, and a model that knows the answers."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trifold.pretrain.config.pretraining import TokenizerConfig
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, train

CONTEXT = (
    "Ada and Bob met by the river in town number 7. " * 6
    + "Then Éva came to 東京 by train. "
    + "Who knows why? " * 5
)


def squad(path: Path, context: str, *questions: tuple[str, list[tuple[int, str]]]) -> str:
    asked = [
        {
            "id": str(i),
            "question": q,
            "answers": [{"answer_start": at, "text": t} for at, t in answers],
            "is_impossible": not answers,
        }
        for i, (q, answers) in enumerate(questions)
    ]
    path.write_text(
        json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": asked}]}]}),
        encoding="utf-8",
    )
    return str(path)


def vocabulary(folder: Path) -> Tokenizer:
    """One with pieces of several letters, that begin with a space."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abdeghiklmnorstuwy", k=5)) for _ in range(40)]
    words += [word for word in re.findall(r"\w+", CONTEXT) if word.isascii()]
    return train(
        [*(" ".join(draw.choices(words, k=8)) for _ in range(300))],
        TokenizerConfig(),
        440,
        folder / "vocabulary",
    )


class Knowing:
    """A model that points where its targets say, in rows packed as `labelled` packs them."""

    rank, world = 0, 1

    def __init__(self, segments: list[Segment]) -> None:
        self.known = {bytes(s.tokens): s.targets for s in segments}

    def logits(self, batch: Any) -> torch.Tensor:
        out = torch.zeros(*batch.tokens.shape, 2)
        for b, (tokens, segments) in enumerate(
            zip(batch.tokens.numpy(), batch.segments.numpy(), strict=True)
        ):
            for n in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == n)
                start, end = self.known[bytes(tokens[at])][:2]
                out[b, at[start], 0] = out[b, at[end], 1] = 9
        return out

    def gather(self, mine: list[Any]) -> list[Any]:
        return [mine]
