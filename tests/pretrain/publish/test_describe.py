"""`trifold import FOLDER` on folders that stock classes wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.modeling.huggingface.stock import make
from tests.published import tokenizer
from trifold.launch.cli import app
from trifold.modeling.errors import UserError
from trifold.pretrain.publish.describe import describe

pytest.importorskip("transformers")


def folder_of(name: str, folder: Path, **more: Tensor) -> Path:
    """What the stock class saves, with tensors besides, and a tokenizer."""
    make(name).save_pretrained(folder)
    save_file(
        load_file(folder / "model.safetensors") | more,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer().save(folder, "encoder")
    return folder


def test_it_describes_what_is_read_and_what_is_dropped(tmp_path: Path) -> None:
    folder = folder_of("BERT", tmp_path, **{"bert.pooler.dense.weight": torch.ones(24, 24)})
    lines = dict(describe(folder))
    assert lines["architecture"] == "BertForMaskedLM, read as BertForMaskedLM: encoder"
    assert lines["layers"] == "2, dim 24, 3 heads of 8" and lines["feed-forward"] == "40, gelu, biases"
    assert lines["norms"] == "layer (eps 1e-12) after each sum, on the embeddings"
    assert lines["head"] == "tied to the embeddings, after a dense layer, with a bias"
    parameters = sum(
        tensor.numel()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "pooler" not in name
    )
    assert lines["parameters"].startswith(f"{parameters:,} (float32")
    assert lines["carried"].startswith("bert.pooler.dense.weight: ") and "dropped" not in lines
    assert lines["tokenizer"] == "Unigram, 400 tokens" and lines["trainable"].startswith("yes")
    assert lines["publishable"] == "yes, as BertForMaskedLM"


def test_the_command_prints_a_line_for_each_property(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["import", str(folder_of("M2M-100", tmp_path))])
    assert result.exit_code == 0, result.output
    assert "M2M100ForConditionalGeneration: encoder-decoder" in " ".join(result.output.split())
    assert "sinusoidal, at most 40, counted from 2" in result.output


def test_a_missing_head_is_described_as_initialised(tmp_path: Path) -> None:
    import transformers

    folder_of("RoBERTa", tmp_path)
    transformers.RobertaModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "bare")
    lines = dict(describe(tmp_path / "bare"))
    assert lines["initialised"].startswith("head.bias, head.dense.bias") and "pooler" in lines["carried"]
    assert lines["trainable"] == "no: it has no tokenizer" and "tokenizer" in lines["tokenizer"]


def test_a_pickle_is_rejected(tmp_path: Path) -> None:
    folder = folder_of("GPT-2", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="may be a pickle"):
        dict(describe(folder))
