"""What a folder holds beside its model comes back in the published folder."""

import json
from pathlib import Path

import pytest
import torch

from tests.pretrain.publish.runs import make_run, no_event
from tests.published import copy_published, tokenizer
from trifold.pretrain.publish import carried
from trifold.pretrain.publish.describe import describe
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage.json_files import read_json_object, write_json

transformers = pytest.importorskip("transformers")
POOLING = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}


def sentence_transformer(folder: Path) -> Path:
    """A folder as sentence-transformers saves it, with weights of another framework and code besides."""
    copy_published(folder, "bert")
    model = transformers.BertModel.from_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "trifold.json").unlink()
    (folder / "1_Pooling").mkdir()
    (folder / "runs").mkdir()
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../secrets"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    write_json(folder / "1_Pooling" / "config.json", POOLING)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 17})
    (folder / "LICENSE").write_text("free")
    for name in ("pytorch_model.bin", "modeling_x.py", ".hidden.json", "runs/log.txt"):
        (folder / name).write_text("{}")
    return folder


def test_the_modules_of_sentence_transformers_and_poolers_are_published_again(tmp_path: Path) -> None:
    source, run = sentence_transformer(tmp_path / "source"), tmp_path / "run"
    carried.keep(source, run)
    make_run(run, "bert")
    pooler = transformers.BertModel.from_pretrained(source).pooler.state_dict()
    lines = dict(describe(source))
    for name in ("modules.json", "1_Pooling/config.json", "bert.pooler.dense.weight", "LICENSE"):
        assert name in lines["carried"]
    assert "pooler" not in lines.get("dropped", "")

    for path in sorted(source.rglob("*"), reverse=True):  # the folder may be gone by then
        path.rmdir() if path.is_dir() else path.unlink()
    out = publish(run, tmp_path / "out", on_event=no_event)
    assert read_json_object(out / "1_Pooling" / "config.json") == POOLING
    assert read_json_object(out / "sentence_bert_config.json") == {"max_seq_length": 17}
    assert (out / "LICENSE").read_text() == "free"
    names = {path.name for path in out.rglob("*")}
    assert not names & {"pytorch_model.bin", "modeling_x.py", ".hidden.json", "runs", "secrets"}
    published = transformers.BertModel.from_pretrained(out).pooler.state_dict()
    assert all(torch.equal(published[name], tensor) for name, tensor in pooler.items())
    assert verify(out).ok


def test_generation_settings_and_several_ends_are_published_again(tmp_path: Path) -> None:
    copy_published(tmp_path / "source", "llama")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [tokenizer().eos, 9]}
    write_json(tmp_path / "source" / "generation_config.json", settings)
    carried.keep(tmp_path / "source", tmp_path / "run")
    make_run(tmp_path / "run", "llama")
    out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    assert settings.items() <= read_json_object(out / "generation_config.json").items()
    stock = transformers.GenerationConfig.from_pretrained(out)
    assert stock.temperature == 0.6 and stock.eos_token_id == [tokenizer().eos, 9]


def test_what_was_carried_first_stays(tmp_path: Path) -> None:
    copy_published(tmp_path / "source", "bert")
    write_json(tmp_path / "source" / "extra.json", {"a": 1})
    carried.keep(tmp_path / "source", tmp_path / "run")
    write_json(tmp_path / "source" / "extra.json", {"a": 2})
    carried.keep(tmp_path / "source", tmp_path / "run")
    assert read_json_object(tmp_path / "run" / "carried" / "extra.json") == {"a": 1}
