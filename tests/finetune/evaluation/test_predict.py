"""What published folders say, each in its task's natural form."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.finetune.small_tasks import folder_of
from trifold.finetune.evaluation.evaluate import LoadedModel
from trifold.finetune.evaluation.predict import as_text, predict
from trifold.finetune.tasks.tagging import first_tokens
from trifold.launch.cli import app
from trifold.launch.commands.finetune import generate
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation


def test_entities_come_with_their_spans_and_types(tmp_path: Path) -> None:
    model = LoadedModel(folder_of(tmp_path, "encoder", labels=("O", "B-PER", "I-PER")))
    text = "yes, Ada sees (Bob)."
    _, positions = first_tokens(model.tokenizer, "encoder", text, [(5, 8), (15, 18)])

    def logits(batch):
        hit = torch.isin(torch.arange(batch.tokens.shape[1]), torch.tensor(positions))[None]
        return torch.stack([~hit, hit, torch.zeros_like(hit)], dim=-1).float()

    model.logits = logits
    [output] = predict(model, [text], Generation())
    assert output == {
        "entities": [
            {"text": t, "type": "PER", "start": s, "end": s + 3} for t, s in (("Ada", 5), ("Bob", 15))
        ]
    }
    assert as_text(output) == "Ada [PER 5-8]  Bob [PER 15-18]"
    model.logits = lambda batch: torch.eye(3)[0].expand(1, batch.tokens.shape[1], 3)
    [output] = predict(model, [text], Generation())
    assert output == {"entities": []} and as_text(output) == "(no entities)"


def test_a_span_head_answers_with_place_and_score_and_wants_a_context(tmp_path: Path) -> None:
    model = LoadedModel(folder_of(tmp_path, "decoder", spans=True))
    [output] = predict(model, ["Who?\tMr Ada sees Bob."], Generation())
    assert (
        output["answer"]
        and "Mr Ada sees Bob."[output["start"] :].startswith(output["answer"])
        and isinstance(output["score"], float)
    )
    with pytest.raises(UserError, match="give `question<TAB>context`"):
        list(predict(model, ["Who?"], Generation()))


def test_the_command_line_reads_a_file_and_writes_a_line_for_each(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "encoder-decoder")
    (tmp_path / "texts").write_text("Mr Ada sees Bob.\nIn Cleo we see Dan.\n")
    given = [
        "generate",
        str(folder),
        "--file",
        str(tmp_path / "texts"),
        "--json",
        "--how",
        "beams=3",
        "--how",
        "max_new=7",
    ]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 2 and all(set(line) == {"text"} for line in lines)
    with pytest.raises(UserError, match="did you mean `beams`"):
        CliRunner().invoke(app, ["generate", str(folder), "x", "--how", "beam=3"], catch_exceptions=False)
    with pytest.raises(UserError, match=r"there is no file .*nowhere"):
        CliRunner().invoke(
            app, ["generate", str(folder), "--file", str(tmp_path / "nowhere")], catch_exceptions=False
        )
    (tmp_path / "texts").write_bytes(b"Ada\ncaf\xe9\n")
    with pytest.raises(UserError, match="texts is not UTF-8: byte 7 is 0xe9"):
        CliRunner().invoke(
            app, ["generate", str(folder), "--file", str(tmp_path / "texts")], catch_exceptions=False
        )
    with pytest.raises(
        UserError, match="text 2: character 3 of it is half of a surrogate pair, or a byte that is not UTF-8"
    ):
        CliRunner().invoke(app, ["generate", str(folder)], input=b"Ada\ncaf\xe9\n", catch_exceptions=False)


def test_another_tokenizer_of_as_many_pieces_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "decoder")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"][-1][0], spec["model"]["vocab"][-2][0] = (
        spec["model"]["vocab"][-2][0],
        spec["model"]["vocab"][-1][0],
    )
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"its tokenizer's fingerprint is .*, its model was trained with"):
        LoadedModel(folder)


def test_a_decoder_is_asked_as_it_was_taught_and_writes_as_its_folder_says(tmp_path: Path) -> None:
    """Of the same weights: without a task the text goes on, with one the prompt surrounds it and only what is
    new is output.
    """
    folder = folder_of(tmp_path, "decoder")
    model = LoadedModel(folder)
    asked = "Ada sees Bob.\n=>\n"
    [plain] = predict(model, [asked], Generation(max_new=12))
    record = json.loads((folder / "trifold.json").read_text())
    (folder / "trifold.json").write_text(
        json.dumps(record | {"task": {"kind": "translation", "prompt": "{source}\n=>\n"}})
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 12, "num_beams": 1, "do_sample": False})
    )
    [output] = generate(folder, iter(["Ada sees Bob."]), [], as_json=True)
    assert plain["text"] == asked + json.loads(output)["text"] and json.loads(output)["text"]
    [longer] = generate(folder, iter(["Ada sees Bob."]), ["max_new=20"], as_json=True)
    assert len(longer) > len(output)


def test_an_encoder_that_picks_sentences_says_as_many_of_them_as_it_was_taught(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "encoder", labels=("leave", "pick"))
    record = json.loads((folder / "trifold.json").read_text())
    (folder / "trifold.json").write_text(
        json.dumps(record | {"task": {"kind": "summarization", "prompt": None, "picks": 2}})
    )
    model = LoadedModel(folder)
    text = "Ada sees Bob. In Cleo we see Dan. Mr Eve likes Finn. Yes."
    _, positions = first_tokens(model.tokenizer, "encoder", text, [(0, 13), (14, 33), (34, 52), (53, 57)])

    def logits(batch):
        wanted = torch.isin(
            torch.arange(batch.tokens.shape[1]), torch.tensor([positions[3], positions[1]])
        ).float()[None]
        return torch.stack([1 - wanted, wanted], dim=-1)

    model.logits = logits
    assert list(predict(model, [text], Generation())) == [{"text": "In Cleo we see Dan. Yes."}]
