"""Labels on words under tokenizers that drop characters, and in texts longer than a row."""

from pathlib import Path

import pytest
import torch

from tests.finetune.small_tasks import OracleTagger, folder_of, wordpiece, write_lines
from tests.published import tokenizer
from trifold.finetune.config import NerConfig
from trifold.finetune.evaluation.evaluate import LoadedModel
from trifold.finetune.evaluation.predict import predict
from trifold.finetune.tasks.ner import Ner
from trifold.modeling.batch import IGNORE
from trifold.modeling.generation.config import Generation

INVISIBLE = ["\u200d", "\u200b", "\u00ad", "\ufe0f", "\u0301"]


@pytest.mark.parametrize("word", INVISIBLE)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_word_that_the_tokenizer_drops_takes_no_label_of_another(
    word: str, index: int, tmp_path: Path
) -> None:
    words, tags = ["ada", "met", "oslo"], ["B-PER", "O", "B-LOC"]
    words.insert(index, word)
    tags.insert(index, "O")
    text = "".join(f"{w}\t{t}\n" for w, t in zip(words, tags, strict=True))
    path = write_lines(tmp_path / "train", text)
    bert = wordpiece(tmp_path / "bert", ["ada", "met", "oslo"], uncased=True)
    ner = Ner(NerConfig(train=(path,), dev=(path,)), bert, "encoder", 16)
    [segment] = ner.segments(ner.train)
    labelled = [ner.labels[label] for label in segment.targets if label != IGNORE]
    assert labelled == ["B-PER", "O", "B-LOC"]
    oracle = OracleTagger([segment], len(ner.labels), ner.labels.index("I-LOC"))
    assert ner.predict(oracle, ner.train, Generation(), 64) == [tuple(tags)]


@pytest.mark.parametrize("length", [14, 40, 100])
def test_windows_label_each_word_of_a_long_sentence_once(length: int, tmp_path: Path) -> None:
    words = [f"{word}{i}" for i in range(30) for word in ("Ada", "met", "Bob", "in", "Oslo")]
    tags = ["B-PER", "O", "B-PER", "I-PER", "B-LOC"] * 30
    text = "".join(f"{w}\t{t}\n" for w, t in zip(words, tags, strict=True))
    path = write_lines(tmp_path / "train", text + "\nOslo\tB-LOC\n")
    ner = Ner(NerConfig(train=(path,), dev=(path,)), tokenizer(), "encoder", length)
    segments = ner.segments(ner.train)
    assert len(segments) > 2 and all(len(segment.tokens) <= length for segment in segments)
    heads = sum(int((segment.targets == ner.labels.index("B-LOC")).sum()) for segment in segments)
    assert heads == 31
    oracle = OracleTagger(segments, len(ner.labels), ner.labels.index("I-LOC"))
    assert ner.predict(oracle, ner.train, Generation(), 2 * length) == [tuple(tags), ("B-LOC",)]


def test_a_text_longer_than_the_learned_positions_is_tagged_in_windows(tmp_path: Path) -> None:
    labels = ("O", "B-PER", "I-PER")
    model = LoadedModel(folder_of(tmp_path, "encoder", labels=labels, max_positions=64))
    text = "Ada sees Bob. " * 200
    [output] = predict(model, [text], Generation())
    for entity in output["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]


def test_tokens_of_several_graphemes_make_one_entity(tmp_path: Path) -> None:
    model = LoadedModel(folder_of(tmp_path, "encoder", labels=("O", "B-PER", "I-PER")))
    text = "दिल्ली Jose\u0301,Bob"
    every_token_begins_one = torch.eye(3)[1]
    model.logits = lambda batch: every_token_begins_one.expand(1, batch.tokens.shape[1], 3)
    [output] = predict(model, [text], Generation())
    assert [entity["text"] for entity in output["entities"]] == ["दिल्ली", "Jose\u0301", ",", "Bob"]
