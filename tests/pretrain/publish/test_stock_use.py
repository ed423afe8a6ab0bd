"""Published folders in the hands of stock code: batches of prompts, texts that are too long, the settings of
generation, the permissions of files.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.pretrain.publish.runs import make_run, no_event
from tests.published import copy_published, failed, tokenizer, update_hashes
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage.json_files import read_json_object, write_json

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_decoder_writes_the_same_text_alone_and_in_a_batch(name: str, tmp_path: Path) -> None:
    copy_published(tmp_path, name)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = ["Ada", "Bob and Cleo met by the river in town"]

    def write(texts: list[str]) -> list[list[int]]:
        inputs = fast(texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return [row[inputs["input_ids"].shape[1] :] for row in output.tolist()]

    assert fast.padding_side == "left"
    assert write(prompts) == [*write(prompts[:1]), *write(prompts[1:])]


@pytest.mark.parametrize("name", ["llama", "modernbert", "t5gemma", "bert, tags"])
def test_stock_truncation_cuts_texts_at_the_positions_of_the_model(name: str, tmp_path: Path) -> None:
    config, _ = copy_published(tmp_path, name)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(fast("Ada met Bob by the river. " * 60, truncation=True)["input_ids"]) == config.max_positions
    assert fast.padding_side == ("left" if name == "llama" else "right")


def test_a_shorter_limit_of_an_imported_tokenizer_stays(tmp_path: Path) -> None:
    config, state = copy_published(tmp_path / "base", "bert")
    settings = read_json_object(tmp_path / "base" / "tokenizer_config.json")
    for limit, expected in ((17, 17), (10**30, config.max_positions), (None, config.max_positions)):
        write_json(tmp_path / "base" / "tokenizer_config.json", settings | {"model_max_length": limit})
        imported = published_folder.Tokenizer.open(tmp_path / "base")
        published_folder.write_folder(tmp_path / "base", config, state, imported)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "base").model_max_length == expected


def test_truncation_and_padding_of_an_imported_tokenizer_are_not_published(tmp_path: Path) -> None:
    copy_published(tmp_path, "bert")
    spec = read_json_object(tmp_path / "tokenizer.json")
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    write_json(tmp_path / "tokenizer.json", spec)
    published_folder.Tokenizer.open(tmp_path).save(tmp_path / "again", "encoder")
    assert read_json_object(tmp_path / "again" / "tokenizer.json")["truncation"] is None


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("t5gemma", Generation(max_new=6, start=7)),
        ("t5gemma", Generation(max_new=6, min_new=6, end=True)),
        ("t5gemma", Generation(max_new=6, first=9, beams=2)),
        ("llama", Generation(max_new=6, min_new=6, no_repeat=2, end=True)),
    ],
)
@torch.no_grad()
def test_the_stock_class_writes_with_the_settings_of_the_run(
    name: str, generation: Generation, tmp_path: Path
) -> None:
    _, model = make_run(tmp_path / "run", name, generation=generation)
    out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    special = published_folder.special_ids(tokenizer())
    bos = special["bos"] if name == "llama" else special["start"]
    prompt = [1, 300, 301, 302]
    expected = generate(model, [prompt], generation, bos=bos, eos=special["eos"], pad=special["pad"])[0]

    stock_class = transformers.AutoModelForCausalLM if name == "llama" else transformers.AutoModelForSeq2SeqLM
    output = stock_class.from_pretrained(out).generate(torch.tensor([prompt]))[0].tolist()
    assert output[len(prompt) if name == "llama" else 1 :] == expected
    read = published_folder.read_generation(out)
    assert (read.max_new, read.end, read.first, read.beams) == (
        *(generation.max_new, generation.end, generation.first, generation.beams),
    )


def test_generation_settings_other_than_those_of_the_run_are_noticed(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "t5gemma", generation=Generation(max_new=6, start=7))
    out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    path = out / published_folder.GENERATION
    write_json(path, read_json_object(path) | {"decoder_start_token_id": 1})
    update_hashes(out)
    assert failed(verify(out)) == {"generation", "special tokens"}


def test_a_forced_first_token_of_a_decoder_is_rejected(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "llama", generation=Generation(first=9))
    with pytest.raises(UserError, match=r"generation\.first \(9\)"):
        publish(tmp_path / "run", tmp_path / "out", on_event=no_event)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_published_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    make_run(tmp_path / "run", "llama")
    previous = os.umask(umask)
    try:
        out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    finally:
        os.umask(previous)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_folder_is_published_into_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "llama")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    publish(tmp_path / "run", Path("."), on_event=no_event)
    assert verify(Path(".")).ok and Path("config.json").exists()
    with pytest.raises(UserError, match="exists already"):
        publish(tmp_path / "run", Path(".."), on_event=no_event)
