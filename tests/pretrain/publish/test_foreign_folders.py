"""Folders that Trifold did not write, with model and tokenizer of one kind: verified as they are, and again
as Trifold publishes them.
"""

from pathlib import Path

import pytest

from tests.modeling.huggingface.stock import make
from tests.pretrain.data.tokenizer.stock_tokenizers import KINDS, stock_folder
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.describe import describe
from trifold.pretrain.publish.verify import verify

pytest.importorskip("transformers")
MODEL = {
    "bert": "BERT",
    "gpt2": "GPT-2",
    "roberta": "RoBERTa",
    "bart": "BART",
    "t5": "T5 1.1",
    "mbart": "mBART",
    "nllb": "M2M-100",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_folder_is_verified_as_it_is_and_as_published_again(kind: str, tmp_path: Path) -> None:
    marks = Tokenizer.open(stock_folder(kind, tmp_path / "hub"))
    ids = {"pad_token_id": marks.pad, "bos_token_id": marks.bos, "eos_token_id": marks.eos}
    start = {} if kind in ("bert", "gpt2", "roberta") else {"decoder_start_token_id": marks.start}
    make(MODEL[kind], vocab_size=marks.vocab_size + 3, **ids, **start).save_pretrained(tmp_path / "hub")
    report = verify(tmp_path / "hub")
    assert report.ok, report.failures
    assert "made elsewhere" in report.checks[0].detail
    assert dict(describe(tmp_path / "hub"))["publishable"].startswith("yes")

    config, state = published_folder.load_model(tmp_path / "hub")
    (tmp_path / "ours").mkdir()
    published_folder.write_folder(tmp_path / "ours", config, state, Tokenizer.open(tmp_path / "hub"))
    published_folder.write_record(tmp_path / "ours", config, Tokenizer.open(tmp_path / "hub"), "rows", {})
    report = verify(tmp_path / "ours", (config, state))
    assert report.ok, report.failures
