"""A question and its context are read in training as the published tokenizer and the stock class read them:
special tokens, and BERT's token types.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pretrain.data.tokenizer.stock_tokenizers import stock_folder
from tests.published import MODELS, failed, random_model
from trifold.finetune.examples.squad import Question
from trifold.finetune.rows import TaskRows, row_capacity
from trifold.finetune.tasks.qa import Pointer
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import ModelConfig
from trifold.modeling.sequence_parallel import SequenceShard
from trifold.modeling.transformer import Transformer
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage.json_files import read_json_object

transformers = pytest.importorskip("transformers")
TEXTS = [("who met Ada?", "Ada met Bob by the river."), ("where?", "Cleo and Dan live in a town.")]
QUESTIONS = [Question(str(i), "a test", text, context, ()) for i, (text, context) in enumerate(TEXTS)]


def publish_reader(kind: str, folder: Path) -> tuple[ModelConfig, Transformer, Tokenizer]:
    """A model that answers questions, published with a stock tokenizer."""
    stock_folder(kind, folder / "hub")
    tokenizer = Tokenizer.open(folder / "hub")
    changes = {"vocab_size": tokenizer.vocab_size}
    if kind == "roberta":  # counts positions from behind its padding id
        changes |= {"position_offset": tokenizer.pad + 1, "token_types": 1}
    model = random_model(MODELS["bert, answers"].model_copy(update=changes))
    (folder / "ours").mkdir()
    published_folder.write_folder(folder / "ours", model.config, model.state_dict(), tokenizer)
    published_folder.write_record(folder / "ours", model.config, tokenizer, "rows", {})
    return model.config, model, tokenizer


def packed_rows(tokenizer: Tokenizer) -> TaskRows:
    """Both questions in one row, as training reads them."""
    windows = Pointer(tokenizer, "encoder", row_length=128, stride=8).windows(QUESTIONS)
    segments = [Segment(w.tokens, np.full(len(w.tokens), IGNORE), types=w.types) for _, w in windows]
    return TaskRows([segments], row_capacity([segments], 128), tokenizer.pad, [1.0], seed=None)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_packed_questions_have_the_logits_of_the_stock_class_on_pairs(kind: str, tmp_path: Path) -> None:
    _, model, tokenizer = publish_reader(kind, tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    stock = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "ours").eval()
    rows = packed_rows(tokenizer)
    assert rows.num_rows == 1
    row = rows.row(0)
    ours = model.logits(stack([row]))[0]
    for number, member in enumerate(rows.members(0), 1):
        inputs = fast(*TEXTS[member], return_tensors="pt")
        inside = torch.from_numpy(row.segments == number)
        assert inputs["input_ids"][0].tolist() == row.tokens[row.segments == number].tolist()
        assert ("token_type_ids" in inputs) == (kind == "bert") == (row.types is not None)
        output = stock(**inputs)
        expected = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
        assert (ours[inside] - expected).abs().max() < 5e-5 * expected.abs().max()
    assert verify(tmp_path / "ours").ok


def test_other_token_types_than_those_of_training_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_reader("bert", tmp_path)
    settings = read_json_object(tmp_path / "ours" / "tokenizer_config.json")
    assert settings["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
    monkeypatch.setattr(Tokenizer, "gives_token_types", False)
    assert failed(verify(tmp_path / "ours")) == {"pair"}


def test_other_special_tokens_around_a_pair_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_reader("roberta", tmp_path)
    monkeypatch.setattr(Tokenizer, "pair_special_tokens", lambda self: ([self.bos], [self.eos], [self.eos]))
    assert failed(verify(tmp_path / "ours")) == {"pair"}


def test_token_types_train_the_rows_of_both_types(tmp_path: Path) -> None:
    _, model, tokenizer = publish_reader("bert", tmp_path)
    model.logits(stack([packed_rows(tokenizer).row(0)])).square().sum().backward()
    assert model.encoder is not None and model.encoder.position.types is not None
    gradient = model.encoder.position.types.weight.grad
    assert gradient is not None and gradient[0].abs().max() > 0 and gradient[1].abs().max() > 0


def test_ranks_that_share_rows_have_their_slice_of_the_types(tmp_path: Path) -> None:
    _, _, tokenizer = publish_reader("bert", tmp_path)
    batch = stack([packed_rows(tokenizer).row(0)])
    slices = [SequenceShard(place, 2, lambda x: x).local(batch).types for place in (0, 1)]
    assert batch.types is not None and batch.types.sum() > 0
    assert torch.equal(torch.cat([part for part in slices if part is not None], dim=1), batch.types)


def test_tokenizers_trained_here_give_no_types(tmp_path: Path) -> None:
    from tests.published import tokenizer

    assert not tokenizer().gives_token_types
    assert packed_rows(tokenizer()).row(0).types is None
