"""Translation: pairs of sentences in, translations out, scored by BLEU and chrF as sacrebleu computes them.
Trivial: copy the source.
"""

from collections.abc import Sequence

import numpy as np

from trifold.finetune import config
from trifold.finetune.examples.pairs import Pair, read_pairs
from trifold.finetune.tasks.scores import SacreBleu
from trifold.finetune.tasks.task import TextToText
from trifold.modeling.config import Family
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer


class Translation(TextToText):
    best = "bleu"
    decoder_prompt = "{source}\n=>\n"

    def __init__(
        self, dials: config.TranslationConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        super().__init__(tokenizer, family, row_length, dials.prompt, dials.truncate)
        self.train, self.dev = (
            read_pairs(places, dials.columns.source, dials.columns.target)
            for places in (dials.train, dials.dev)
        )
        self.bleu, self.chrf = SacreBleu("BLEU"), SacreBleu("CHRF")

    def statistics(self, predictions: Sequence[str], examples: Sequence[Pair]) -> np.ndarray:
        references = [pair.targets for pair in examples]
        return np.concatenate(
            [metric.statistics(predictions, references) for metric in (self.bleu, self.chrf)], axis=1
        )

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return {
            "bleu": self.bleu.score(total[:10]),
            "chrf": self.chrf.score(total[10:]),
        }  # BLEU has two lengths and 4 + 4 counts

    def signatures(self) -> dict[str, str]:
        return {"bleu": self.bleu.signature, "chrf": self.chrf.signature}

    def baseline(self) -> tuple[str, list[str]]:
        return "copy", [pair.source for pair in self.dev]
