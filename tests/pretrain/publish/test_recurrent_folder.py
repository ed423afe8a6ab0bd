"""`verify` on folders without a stock class: it reads the model back, and notices every single mistake."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.modeling.families import CONFIGS, RECURRENT
from tests.published import SPECIAL, failed, random_model, tokenizer, update_hashes, write_published
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import express
from trifold.pretrain.publish import published_folder, weights
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage.json_files import read_json_object, write_json

pytest.importorskip("transformers")
TAGGER = RECURRENT["lstm encoder"].model_copy(update={"labels": ("O", "B-X"), "crf": True})
MODELS = RECURRENT | {
    "tagger": TAGGER,
    "answers": RECURRENT["rnn encoder"].model_copy(update={"spans": True}),
}


def write(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, Any]:
    config = MODELS[name].model_copy(update={"vocab_size": tokenizer().vocab_size})
    state = random_model(config).state_dict()
    write_published(folder, config, state, dtype)
    return config, state


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_folder_passes_and_reads_back_equal(name: str, tmp_path: Path) -> None:
    config, state = write(tmp_path, name)
    for report in (verify(tmp_path, (config, state)), verify(tmp_path)):
        assert report.ok, report.failures
        names = {check.name for check in report.checks}
        assert {*"files config dtype tokenizer reload".split(), "special tokens"} <= names
        assert ("greedy" in names) == (config.family != "encoder")
    back, read = published_folder.load_model(tmp_path)
    assert (
        back == config
        and read.keys() == state.keys()
        and all(torch.equal(read[key], state[key]) for key in state)
    )
    assert read_json_object(tmp_path / "config.json")["architectures"] == ["TrifoldRecurrent"]


def test_a_bf16_folder_passes(tmp_path: Path) -> None:
    assert (report := verify(tmp_path, write(tmp_path, "lstm additive", torch.bfloat16))).ok, report.failures


def test_weights_and_settings_that_are_not_the_trained_ones_are_noticed(tmp_path: Path) -> None:
    config, state = write(tmp_path, "lstm additive")
    tensors = weights.read_tensors(tmp_path)
    a, b = "decoder.align.score.query.weight", "decoder.align.score.key.weight"
    weights.write_tensors(
        tmp_path, tensors | {a: tensors[b].clone(), b: tensors[a].clone()}, weights.SHARD_BYTES
    )
    assert failed(verify(tmp_path)) == {"files"}
    update_hashes(tmp_path)
    assert failed(verify(tmp_path, (config, state))) == {"weights", "reload"}
    weights.write_tensors(tmp_path, tensors, weights.SHARD_BYTES)
    hf = read_json_object(tmp_path / "config.json")
    write_json(tmp_path / "config.json", hf | {"embed_scale": 2.0})
    update_hashes(tmp_path)
    assert failed(verify(tmp_path, (config, state))) == {"config", "reload"}
    write_json(tmp_path / "config.json", hf | {"cell": "gru"})
    assert "folder" in failed(verify(tmp_path))  # tensors of another shape
    write_json(tmp_path / "config.json", hf | {"head_count": 3})
    with pytest.raises(UserError, match="sets head_count = 3, which Trifold does not have"):
        published_folder.load_model(tmp_path)


def test_no_transformer_is_published_as_recurrent() -> None:
    assert express(CONFIGS["llama"], SPECIAL)[0].stock_class == "LlamaForCausalLM"
    with pytest.raises(UserError, match="crf True"):
        express(CONFIGS["modernbert"].model_copy(update={"labels": ("O", "B-X"), "crf": True}), SPECIAL)
