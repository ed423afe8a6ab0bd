"""Pretraining from a published folder: its weights, its shape, its tokenizer; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.pretrain.data.tokenizer.stock_tokenizers import stock_folder, stock_model
from tests.processes import run_processes
from tests.published import MODELS, random_model, tokenizer
from tests.recipes import recipe
from tests.training import losses, quiet, train_run, train_until
from trifold.modeling.batch import IGNORE
from trifold.modeling.errors import UserError
from trifold.pretrain.config import pretraining as dials
from trifold.pretrain.config.objectives import ContinuationConfig, InfillingConfig, MixtureConfig, family_of
from trifold.pretrain.config.pretraining import InitialModelConfig
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.initial_model import build_initialised, dropout_of, load_initial_model, start_notes
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.run import open_rows, prepare, train
from trifold.pretrain.storage.jsonl import read_lines

FAMILIES = {"decoder": "llama", "encoder": "modernbert", "encoder-decoder": "t5gemma"}


def folder_of(folder: Path, family: str, marks: Tokenizer | None = None) -> Path:
    """A published folder of this family, with large random weights."""
    marks = marks or tokenizer()
    folder.mkdir(parents=True)
    config = MODELS[FAMILIES[family]].model_copy(update={"vocab_size": marks.vocab_size + 7})
    published_folder.write_folder(folder, config, random_model(config).state_dict(), marks)
    return folder


def started(tmp_path: Path, run: str, family: str, folder: Path, **changes: Any) -> dials.PretrainConfig:
    cache = dials.DataConfig(
        **recipe(tmp_path, run, family).data.model_dump() | {"cache": str(tmp_path / f"shards-{run}")}
    )
    return recipe(
        tmp_path,
        run,
        family,
        **{
            "model": InitialModelConfig.model_validate({"from": str(folder)}),
            "data": cache,
            "steps": 4,
            "evaluate_rows": 1000,
        }
        | changes,
    )


def test_a_run_begins_with_the_loss_of_the_stock_model_and_what_it_becomes_is_published(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path / "folder", "decoder")
    config = started(tmp_path, "run", "decoder", folder)
    prepare(config, 1, quiet)
    run_processes(1, train_run, config)
    first = next(
        record for record in read_lines(Path(config.run) / "metrics.jsonl") if "heldout_loss" in record
    )

    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    corpus, marks, total, count = open_rows(config)[1].streams[0].corpus, Tokenizer.open(folder), 0.0, 0
    for i in range(corpus.num_documents):
        whole = torch.tensor([[marks.bos, *corpus.document(i).tolist(), marks.eos]])
        for start in range(0, whole.shape[1] - 1, 48):  # rows of 48 cut long documents
            piece = whole[:, start : start + 49]
            with torch.no_grad():
                logits = stock(piece[:, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
            count += piece.shape[1] - 1
    assert first["heldout_targets"] == count and first["heldout_loss"] == pytest.approx(
        total / count, rel=1e-5
    )

    out = publish(Path(config.run), tmp_path / "out", on_event=lambda event, **facts: None)
    shape, state = published_folder.load_model(out)
    before = published_folder.load_model(folder)[1]
    assert shape == published_folder.load_model(folder)[0] and all(
        state[name].shape == before[name].shape for name in before
    )
    assert not torch.equal(state["embed.weight"], before["embed.weight"])
    assert Tokenizer.open(out).fingerprint == marks.fingerprint


def test_a_run_continues_only_from_the_folder_it_started_from(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", "encoder-decoder")
    config = started(tmp_path, "run", "encoder-decoder", folder, objective=InfillingConfig())
    prepare(config, 1, quiet)
    run_processes(1, train_until, config, 2)
    weights = (folder / "model.safetensors").read_bytes()
    run_processes(1, _refused_and_continued, config, weights)
    assert len(losses(config.run)) == 4


def _refused_and_continued(folder: RankInfo, config: dials.PretrainConfig, weights: bytes) -> None:
    assert isinstance(config.model, InitialModelConfig) and config.model.folder is not None
    file = Path(config.model.folder) / "model.safetensors"
    file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))  # one bit of one weight
    with pytest.raises(UserError, match=r"started from weights of fingerprint .* restore that folder"):
        train(config, folder)
    file.write_bytes(weights)
    train(config, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_the_folder_s_and_a_random_start_has_its_shape_alone(
    family: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "folder", family)
    shape, state = load_initial_model(
        InitialModelConfig.model_validate({"from": str(folder), "dropout": 0.2}), tmp_path
    )
    assert shape.dropout == 0.2 and shape.family == family
    made = build_initialised(shape, state, seed=0).state_dict()
    stock = random_model(shape.model_copy(update={"dropout": 0.0})).state_dict()
    assert made.keys() == stock.keys() and all(torch.equal(made[name], stock[name]) for name in stock)
    random, none = load_initial_model(
        InitialModelConfig.model_validate({"from": str(folder), "random": True}), tmp_path
    )
    assert none is None and random == shape.model_copy(update={"dropout": 0.0})


def test_a_folders_dropout_is_trained_with_unless_the_recipe_sets_it(tmp_path: Path) -> None:
    marks, folder = tokenizer(), tmp_path / "folder"
    folder.mkdir()
    config = MODELS["t5gemma"].model_copy(update={"vocab_size": marks.vocab_size, "dropout": 0.25})
    published_folder.write_folder(folder, config, random_model(config).state_dict(), marks)
    for start, expected in (({}, 0.25), ({"random": True}, 0.25), ({"dropout": 0.0}, 0.0)):
        model = InitialModelConfig.model_validate({"from": str(folder), **start})
        assert load_initial_model(model, tmp_path)[0].dropout == dropout_of(model) == expected
    assert dropout_of(InitialModelConfig(config=config)) == 0.25


def test_before_training_the_folders_dropout_is_reported_and_what_is_not_used_of_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", "encoder-decoder")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(settings | {"dropout_rate": 0.2, "attention_dropout": 0.1})
    )
    used, unused = start_notes(InitialModelConfig.model_validate({"from": str(folder)}))
    assert used.startswith("dropout 0.2, as in ")
    assert unused == f"{folder} sets attention_dropout = 0.1, which Trifold does not train with"
    assert len(start_notes(InitialModelConfig.model_validate({"from": str(folder), "dropout": 0.0}))) == 1


KINDS = {
    "encoder": ("bert", "[CLS]", "[SEP]"),
    "encoder-decoder": ("t5", None, "</s>"),
    "decoder": ("gpt2", "<|endoftext|>", "<|endoftext|>"),
}


@pytest.mark.parametrize("family", KINDS)
def test_rows_have_the_marks_of_a_published_tokenizer_and_the_run_keeps_it(
    family: str, tmp_path: Path
) -> None:
    kind, begins, ends = KINDS[family]
    marks = Tokenizer.open(stock_folder(kind, tmp_path / "stock"))
    config = started(tmp_path, "run", family, folder_of(tmp_path / "folder", family, marks))
    prepare(config, 1, quiet)
    assert (
        Tokenizer.open(Path(config.run) / "tokenizer").fingerprint
        == Tokenizer.open(tmp_path / "folder").fingerprint
        == marks.fingerprint
    )
    stock = transformers.AutoTokenizer.from_pretrained(Path(config.run) / "tokenizer")
    rows = open_rows(config)[0][-1]
    whole = 0
    for row in (rows.row(i) for i in range(rows.num_rows)):
        for number in range(1, row.segments.max() + 1):
            here = row.segments == number
            read = row.tokens[here] if row.source is None else row.source[row.source_segments == number]
            first, last = stock.convert_ids_to_tokens(
                [int(read[0]), int((row.targets[here] if family == "decoder" else read)[-1])]
            )
            if last == ends and (begins is None or first == begins):
                whole += 1
            if row.source is not None:
                assert row.tokens[here][0] == stock.pad_token_id  # T5 starts its decoder with the padding
    assert whole > 20


OBJECTIVES: dict[str, Any] = {
    "bert": dials.MaskedConfig(rate=0.15, whole_words=True),
    "roberta": dials.MaskedConfig(),
    "gpt2": dials.CausalConfig(),
    "t5": MixtureConfig(parts=(dials.SpansConfig(density=0.3), ContinuationConfig(mode="S"))),
    "bart": InfillingConfig(),
    "mbart": InfillingConfig(),
    "nllb": InfillingConfig(permute_sentences=False),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_packed_rows_have_the_loss_that_the_stock_model_of_an_imported_folder_gives_each_document(
    kind: str, tmp_path: Path
) -> None:
    stock = stock_model(kind, tmp_path / "folder")
    config = started(
        tmp_path, "run", family_of(OBJECTIVES[kind]), tmp_path / "folder", objective=OBJECTIVES[kind]
    )
    prepare(config, 1, quiet)
    shape, state = load_initial_model(config.model, Path(config.run))
    model, rows = build_initialised(shape, state, seed=0).eval(), open_rows(config)[1]
    with torch.no_grad():
        for row in (rows.row(i) for i in range(8)):
            mine = model(stack([row])).nll[0]
            for number in range(1, row.segments.max() + 1):
                here = row.segments == number
                tokens, targets = (torch.from_numpy(side[here])[None] for side in (row.tokens, row.targets))
                read = {"input_ids": tokens}
                if row.source is not None:
                    read = {
                        "input_ids": torch.from_numpy(row.source[row.source_segments == number])[None],
                        "decoder_input_ids": tokens,
                    }
                theirs = torch.nn.functional.cross_entropy(
                    stock(**read).logits[0], targets[0], reduction="none", ignore_index=IGNORE
                )
                torch.testing.assert_close(mine[torch.from_numpy(here)], theirs, rtol=1e-4, atol=1e-4)


def test_a_start_that_does_not_suit_the_recipe_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", "decoder")
    (tmp_path / "run-of-another").mkdir()
    (tmp_path / "run-of-another" / "config.yaml").touch()
    for changes, message in (
        (
            {"objective": dials.MaskedConfig()},
            "the masked objective trains a model of family encoder, not decoder",
        ),
        (
            {
                "data": dials.DataConfig(
                    sources=(dials.SourceConfig(path="x"),), heldout_fraction=0.1, row_length=65
                )
            },
            r"row_length \(65\) exceeds .* \(64\)",
        ),
        (
            {"model": InitialModelConfig.model_validate({"from": str(tmp_path / "none")})},
            "there is no folder .*none: a published folder holds config.json",
        ),
        (
            {"model": InitialModelConfig.model_validate({"from": str(tmp_path / "run-of-another")})},
            "is the folder of a run: publish it first, trifold publish",
        ),
    ):
        with pytest.raises(UserError, match=message):
            prepare(started(tmp_path, "run", "decoder", folder, **changes), 1, quiet)
        assert not (tmp_path / "run" / "tokenizer").exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="may be a pickle, which could run code"):
        prepare(started(tmp_path, "run", "decoder", folder), 1, quiet)
