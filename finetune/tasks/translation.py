"""Translation: pairs of sentences come in, translations go out, scored by BLEU and chrF as sacrebleu computes
them. Baseline: copy the source.
"""

from collections.abc import Sequence

import numpy as np

from trifold.finetune.config import Split, SummarizationConfig, TranslationConfig
from trifold.finetune.examples.pairs import Pair, read_pairs
from trifold.finetune.tasks.languages import moses_note
from trifold.finetune.tasks.scores import SacreBleu
from trifold.finetune.tasks.task import TextToText
from trifold.modeling.config import Family
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

_BLEU_STATISTICS = 10  # two lengths, and 4 + 4 counts of n-grams


class Translation(TextToText):
    """Text to text with sacrebleu's scores."""

    best = "bleu"
    decoder_prompt = "{source}\n=>\n"

    def __init__(
        self, config: TranslationConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        super().__init__(tokenizer, family, row_length, config.prompt, config.truncate)
        self.notes: list[str] = []
        self.train = read_split(config, "train", self.notes)
        self.dev = read_split(config, "dev", self.notes)
        self.test = read_split(config, "test", self.notes)
        self.bleu = SacreBleu("BLEU", config.tokenize, config.language)
        self.chrf = SacreBleu("CHRF")
        # All dev references choose the tokenizer, so that every evaluation of the run has the same
        self.bleu.prepare([pair.targets for pair in self.dev])
        self.notes += self.bleu.notes
        texts = [text for pair in self.dev for text in (pair.source, *pair.targets)]
        if note := moses_note(texts, "task.dev"):
            self.notes.append(note)

    def statistics(self, predictions: Sequence[str], examples: Sequence[Pair]) -> np.ndarray:
        references = [pair.targets for pair in examples]
        statistics = [metric.statistics(predictions, references) for metric in (self.bleu, self.chrf)]
        return np.concatenate(statistics, axis=1)

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return {
            "bleu": self.bleu.score(total[:_BLEU_STATISTICS]),
            "chrf": self.chrf.score(total[_BLEU_STATISTICS:]),
        }

    def signatures(self) -> dict[str, str]:
        return {"bleu": self.bleu.signature, "chrf": self.chrf.signature}

    def baseline(self, examples: Sequence[Pair]) -> tuple[str, list[str]]:
        return "copy", [pair.source for pair in examples]


def read_split(config: TranslationConfig | SummarizationConfig, split: Split, notes: list[str]) -> list[Pair]:
    """The pairs of a split. Notes what was left out."""
    source, target = config.columns.of(split)
    return read_pairs(config.files(split), source, target, notes.append if config.skip_empty else None)
