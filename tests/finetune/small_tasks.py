"""Tiny published folders and task files for the tests of finetune/: a tokenizer, random models of each
family, tags, pairs and questions; and models that know the right answer.
"""

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

from tests.published import MODELS
from trifold.finetune.config import FinetuneConfig
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.transformer import build
from trifold.pretrain.config.pretraining import TokenizerConfig
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, train
from trifold.pretrain.publish import published_folder

NAMES = "Ada Bob Cleo Dan Eve Finn Gus Hana".split()
VERBS = "sees calls knows likes".split()


@cache
def vocabulary(folder: Path) -> Tokenizer:
    texts = (f"Mr {a} {v} {b}. In {a} we {v} {b}, yes." for a in NAMES for b in NAMES for v in VERBS)
    return train([*texts], TokenizerConfig(), 395, folder / "vocabulary")


def folder_of(where: Path, family: str, **changes: Any) -> Path:
    """A published folder with new weights."""
    name = {"encoder": "modernbert", "decoder": "llama", "encoder-decoder": "t5gemma"}[family]
    tokenizer = vocabulary(where)
    config = ModelConfig(
        **MODELS[name].model_dump()
        | {
            "vocab_size": tokenizer.vocab_size,
            "dim": 48,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 4,
            "head_dim": 12,
            "mlp_dim": 96,
            "embed_scale": 48**0.5 if family == "encoder-decoder" else 1.0,
            "init_std": 0.1,
        }
        | changes
    )
    folder = where / f"published-{family}"
    folder.mkdir()
    published_folder.write_folder(folder, config, build(config, 5).state_dict(), tokenizer)
    published_folder.write_record(folder, config, tokenizer, "no data", {})
    return folder


def write_tags(path: Path, sentences: int, seed: int) -> None:
    """A name is a person after "Mr" and a place after "In": its usual tag is no help."""
    draw, lines = random.Random(seed), ["-DOCSTART- O", ""]
    for _ in range(sentences):
        a, b, verb = draw.choice(NAMES), draw.choice(NAMES), draw.choice(VERBS)
        lines += [
            f"Mr O\n{a} B-PER\n{verb} O\n{b} O"
            if draw.random() < 0.5
            else f"In O\n{a} B-LOC\nwe O\n{verb} O\n{b} O",
            "",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_pairs(path: Path, lines: int, seed: int) -> str:
    """A made-up language: the verb comes last, and names are written backwards."""
    draw, sources, targets = random.Random(seed), [], []
    for _ in range(lines):
        a, b, verb = draw.choice(NAMES), draw.choice(NAMES), draw.choice(VERBS)
        sources.append(f"Mr {a} {verb} {b}.")
        targets.append(f"{b} Mr {a} {verb}.")
    for name, texts in (("a", sources), ("b", targets)):
        path.with_suffix(f".{name}").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return f"{path.with_suffix('.a')},{path.with_suffix('.b')}"


def recipe(run: Path, folder: Path, task: dict[str, Any], **changes: Any) -> FinetuneConfig:
    values = {
        "run": str(run),
        "model": {"from": str(folder)},
        "task": task,
        "row_length": 64,
        "steps": 40,
        "step_rows": 6,
        "micro_rows": 2,
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 1},
        "evaluate_every": 20,
        "checkpoints": {"every": 20},
        "evaluate_examples": 40,
        "generation": {"max_new": 24},
    }
    return FinetuneConfig.model_validate_json(json.dumps(values | changes))


def write_lines(path: Path, text: str) -> str:
    """A file of this text, and its name as recipes have it."""
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


CONTEXT = (
    "Ada and Bob met by the river in town number 7. " * 6
    + "Then Éva came to 東京 by train. "
    + "Who knows why? " * 5
)


def write_squad(path: Path, context: str, *questions: tuple[str, list[tuple[int, str]]]) -> str:
    """A SQuAD file of one context; a question without answers is impossible."""
    entries = []
    for i, (question, answers) in enumerate(questions):
        spans = [{"answer_start": start, "text": text} for start, text in answers]
        entry = {"id": str(i), "question": question, "answers": spans, "is_impossible": not answers}
        entries.append(entry)
    content = {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": entries}]}]}
    return write_lines(path, json.dumps(content))


def question_vocabulary(folder: Path) -> Tokenizer:
    """A tokenizer with tokens of several letters that begin with a space."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abdeghiklmnorstuwy", k=5)) for _ in range(40)]
    words += [word for word in re.findall(r"\w+", CONTEXT) if word.isascii()]
    texts = [" ".join(draw.choices(words, k=8)) for _ in range(300)]
    return train(texts, TokenizerConfig(), 440, folder / "vocabulary")


def wordpiece(folder: Path, words: Sequence[str], uncased: bool) -> Tokenizer:
    """A WordPiece tokenizer as BERT has it, which drops invisible characters; uncased it strips accents."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = dict.fromkeys([*special, *words, *(f"##{word}" for word in words)])
    fast = tokenizers.Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    fast.normalizer = normalizers.BertNormalizer(lowercase=uncased, strip_accents=uncased)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    settings = {f"{role}_token": token for role, token in roles.items()} | {
        "tokenizer_class": "BertTokenizer"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.open(folder)


class OracleModel:
    """A model that knows the segments it was made with: `outputs` of a token's head are `answer`s."""

    rank, world = 0, 1

    def __init__(self, segments: Sequence[Segment], outputs: int) -> None:
        self.targets = {bytes(segment.tokens): segment.targets for segment in segments}
        self.outputs = outputs

    def logits(self, batch: Batch) -> torch.Tensor:
        assert batch.segments is not None
        out = torch.zeros(*batch.tokens.shape, self.outputs)
        for row, (tokens, segments) in enumerate(
            zip(batch.tokens.numpy(), batch.segments.numpy(), strict=True)
        ):
            for number in range(1, segments.max() + 1):
                positions = np.flatnonzero(segments == number)
                self.answer(out[row], positions, self.targets[bytes(tokens[positions])])
        return out

    def answer(self, out: torch.Tensor, positions: np.ndarray, targets: np.ndarray) -> None:
        raise NotImplementedError

    def generate(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise NotImplementedError

    def gather(self, values: list[Any]) -> list[list[Any]]:
        return [values]


class OracleTagger(OracleModel):
    """Gives labelled positions their label, and all others a wrong one."""

    def __init__(self, segments: Sequence[Segment], outputs: int, wrong: int) -> None:
        super().__init__(segments, outputs)
        self.wrong = wrong

    def answer(self, out: torch.Tensor, positions: np.ndarray, targets: np.ndarray) -> None:
        labels = np.where(targets < 0, self.wrong, targets)
        out[positions, labels] = 1


class OraclePointer(OracleModel):
    """Points where the targets of a span head are."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments, 2)

    def answer(self, out: torch.Tensor, positions: np.ndarray, targets: np.ndarray) -> None:
        out[positions[targets[0]], 0] = out[positions[targets[1]], 1] = 9
