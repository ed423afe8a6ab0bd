"""A run becomes a folder that stock classes load, or nothing at all."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from tests.pretrain.data.tokenizer.stock_tokenizers import stock_folder
from tests.pretrain.publish.runs import make_run, no_event, save
from tests.published import random_model, tokenizer
from trifold.modeling import huggingface
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import Transformer
from trifold.pretrain.publish import published_folder, weights
from trifold.pretrain.publish.publish import Weights, publish
from trifold.pretrain.storage.json_files import write_json

transformers = pytest.importorskip("transformers")


def nothing_else_in(folder: Path, expected: set[str]) -> bool:
    return {path.name for path in folder.iterdir()} == expected


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("modernbert", "AutoModelForMaskedLM"),
        ("t5gemma", "AutoModelForSeq2SeqLM"),
    ],
)
@torch.no_grad()
def test_a_published_folder_loads_in_the_auto_classes_with_the_trained_weights(
    name: str, auto_class: str, tmp_path: Path
) -> None:
    config, trained = make_run(tmp_path / "run", name)
    out = publish(tmp_path / "run", tmp_path / "out" / "model", on_event=no_event)
    assert nothing_else_in(tmp_path / "out", {"model"})
    stock = getattr(transformers, auto_class).from_pretrained(out)
    fast = transformers.AutoTokenizer.from_pretrained(out)
    assert type(stock).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
    ids = fast("Ada met Bob by the river")["input_ids"]
    assert ids[0] == tokenizer().bos and (ids[-1] == tokenizer().eos) == (config.family != "decoder")
    assert (out / "generation_config.json").exists() == (config.family != "encoder")
    config_again, state = published_folder.load_model(out)
    assert config_again == config.model_copy(update={"global_every": config_again.global_every})
    assert all(torch.equal(state[key], tensor) for key, tensor in trained.state_dict().items())


def test_the_newest_checkpoint_is_published_or_that_of_the_given_step(tmp_path: Path) -> None:
    config, newest = make_run(tmp_path / "run", "llama", steps=(10, 20))
    for step, model in ((None, newest), (20, newest), (10, random_model(config, seed=10))):
        out = publish(tmp_path / "run", tmp_path / f"out-{step}", on_event=no_event, checkpoint=step)
        assert torch.equal(
            published_folder.load_model(out)[1]["decoder.norm.weight"],
            model.state_dict()["decoder.norm.weight"],
        )
    with pytest.raises(UserError, match="no checkpoint of step 15; there are those of: 10, 20"):
        publish(tmp_path / "run", tmp_path / "out", on_event=no_event, checkpoint=15)


def test_averaged_weights_are_published_if_there_are_any_unless_trained_ones_are_requested(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    config, model = make_run(run, "llama")
    with pytest.raises(UserError, match="holds no averaged weights, because its recipe's `ema` was 0"):
        publish(run, tmp_path / "out", on_event=no_event, weights="ema")
    average = random_model(config, seed=77)
    save(run, model, 20, average)
    frozen = next(iter(dict(model.named_parameters())))
    requests: list[tuple[Weights | None, Transformer]]
    requests = [(None, average), ("ema", average), ("trained", model)]
    for requested, expected in requests:
        out = publish(run, tmp_path / f"out-{requested}", on_event=no_event, weights=requested)
        state, trained = published_folder.load_model(out)[1], model.state_dict()
        assert all(
            torch.equal(state[name], trained[name] if name == frozen else p)
            for name, p in expected.state_dict().items()
        )
        sentence = "exponential moving average of the trained ones, with a decay of 0.99 per step"
        assert (sentence in (out / published_folder.CARD).read_text()) == (requested != "trained")
        assert json.loads((out / published_folder.RECORD).read_text())["weights"] == (requested or "ema")


def test_a_damaged_newest_checkpoint_is_skipped_and_reported(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "llama", steps=(10, 20))
    weights = next((tmp_path / "run" / "checkpoints").glob("step-00000020*")) / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    events: list[str] = []
    out = publish(tmp_path / "run", tmp_path / "out", on_event=lambda event, **facts: events.append(event))
    assert events == ["checkpoint_rejected"]
    assert "step-00000010" in json.loads((out / published_folder.RECORD).read_text())["checkpoint"]["name"]
    with pytest.raises(UserError, match=r"is damaged and cannot be used: .*rank-00000\.safetensors"):
        publish(tmp_path / "run", tmp_path / "other", on_event=no_event, checkpoint=20)


def test_large_weights_are_sharded_with_an_index_that_stock_classes_read(tmp_path: Path) -> None:
    _, trained = make_run(tmp_path / "run", "t5gemma")
    out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event, shard_bytes=30_000)
    index = json.loads((out / weights.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert (
        len(files) > 3
        and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        and not (out / "model.safetensors").exists()
    )
    assert sum((out / file).stat().st_size for file in files) > index["metadata"]["total_size"]
    stock = transformers.T5GemmaForConditionalGeneration.from_pretrained(out)
    assert torch.equal(stock.model.encoder.embed_tokens.weight, trained.embed.weight)
    intact, moved = (out / weights.INDEX).read_text(), next(iter(index["weight_map"]))
    write_json(out / weights.INDEX, {**index, "weight_map": {**index["weight_map"], moved: files[-1]}})
    with pytest.raises(UserError, match=re.escape(f"disagree on {moved}")):
        published_folder.load_model(out)
    (out / weights.INDEX).write_text(intact)
    (out / files[1]).unlink()
    with pytest.raises(UserError, match=f"there is no .*{files[1]}"):
        published_folder.load_model(out)


def test_bf16_is_published_rounded_once(tmp_path: Path) -> None:
    _, trained = make_run(tmp_path / "run", "llama")
    out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event, dtype="bf16")
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert torch.equal(
        published_folder.load_model(out)[1]["embed.weight"], trained.embed.weight.bfloat16().float()
    )


def test_the_card_has_recipe_data_scores_and_provenance_and_its_example_runs(tmp_path: Path) -> None:
    config, _ = make_run(tmp_path / "run", "llama", max_positions=256)
    out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    card = (out / published_folder.CARD).read_text()
    record = json.loads((out / published_folder.RECORD).read_text())
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert recipe["model"] == config.model_dump(mode="json") == record["model"]
    for text in (
        "books.txt",
        "77,777 tokens",
        "bits per byte: 2.125",
        "10 steps, 12,345 tokens",
        "rows-fingerprint",
        torch.__version__,
    ):
        assert text in card
    assert record["checkpoint"]["sha256"] in card and tokenizer().fingerprint in card
    assert "LlamaForCausalLM" in card and "\n---\n# " in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(example.splitlines()) == 5
    exec(example, {"folder": str(out)})


def test_a_run_without_a_checkpoint_is_rejected_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for run in (tmp_path / "run", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="has no checkpoint to publish: train it first"):
            publish(run, tmp_path / "out", on_event=no_event)
    assert nothing_else_in(tmp_path, {"run"})


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "llama")
    (tmp_path / "out").mkdir()
    publish(tmp_path / "run", tmp_path / "out", on_event=no_event)  # an empty folder is taken
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    assert (tmp_path / "out" / "config.json").read_bytes() == before and nothing_else_in(
        tmp_path, {"run", "out"}
    )


def test_a_wrong_row_of_a_name_table_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "llama")
    right = huggingface.LLAMA
    wrong = type(right)(
        **{**vars(right), "table": right.table.replace("model.norm.weight", "model.norm.wait")}
    )
    monkeypatch.setattr(huggingface, "ARCHITECTURES", (wrong,))
    with pytest.raises(
        UserError,
        match=r"was not published.*names: missing_keys model\.norm\.weight; unexpected_keys"
        r" model\.norm\.wait",
    ):
        publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    assert nothing_else_in(tmp_path, {"run"})


def test_a_model_that_no_architecture_expresses_is_rejected_and_leaves_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "llama", logit_bias=True)
    with pytest.raises(UserError, match="no logit_bias True"):
        publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    assert nothing_else_in(tmp_path, {"run"})


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", "llama")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "config.json")

    monkeypatch.setattr(published_folder, "write_json", full)
    with pytest.raises(
        UserError,
        match=r"was not published: No space left on device \(config.json\); nothing was left behind",
    ):
        publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    monkeypatch.undo()

    def full_too(*_: Any, **__: Any) -> None:  # how safetensors says it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full_too)
    with pytest.raises(
        UserError, match=r"was not published: .*No space left on device .*; nothing was left behind"
    ):
        publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    assert nothing_else_in(tmp_path, {"run"})


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "bert"), ("bert", "roberta"), ("bart", "bart"), ("t5", "t5")]
)
def test_the_example_of_the_card_hides_text_as_its_tokenizer_does(
    name: str, kind: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", name, vocab_size=600)
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    stock_folder(kind, tmp_path / "run" / "tokenizer")
    out = publish(tmp_path / "run", tmp_path / "out", on_event=no_event)
    card = (out / published_folder.CARD).read_text()
    hidden = {"bert": "is [MASK].", "roberta": "is <mask>.", "bart": " <mask>.", "t5": "<extra_id_0>."}[kind]
    assert hidden in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(example, {"folder": str(out)})
