"""The way of a person through the commands: finetune, continue, publish, evaluate."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.finetune.small_tasks import folder_of, recipe, write_tags
from trifold.launch.cli import app
from trifold.modeling.errors import UserError


def test_a_recipe_is_finetuned_continued_published_and_evaluated(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "encoder")
    for name, seed in (("train", 1), ("dev", 2)):
        write_tags(tmp_path / name, 24, seed)
    task = {"kind": "ner", "train": [str(tmp_path / "train")], "dev": [str(tmp_path / "dev")]}
    made = recipe(
        tmp_path / "run",
        folder,
        task,
        steps=2,
        evaluate_every=2,
        checkpoints={"every": 2},
        schedule={"kind": "wsd"},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made.model_dump(mode="json")))

    def run(*given: str) -> str:
        return CliRunner().invoke(app, list(given), catch_exceptions=False).stdout.replace("\n", "")

    said = run("finetune", str(file), "--workers", "0")
    assert "ner: 24 dev examples, step 2" in said and "usual tag" in said
    assert "steps: 2 so far, 4 from here" in run("finetune", str(file), "steps=4", "--workers", "0")
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        run("finetune", str(file), "optimizer.lr=0.5", "steps=4", "--workers", "0")
    assert "is published and verified" in run(
        "publish", str(tmp_path / "run"), "--out", str(tmp_path / "out")
    )
    said = run("evaluate", str(tmp_path / "out"), "--task", str(file), "--out", str(tmp_path / "said.jsonl"))
    assert "95 % interval" in said and len((tmp_path / "said.jsonl").read_text().splitlines()) == 24
    with pytest.raises(UserError, match="was not trained for ner with these labels"):
        run("evaluate", str(folder), "--task", str(file))
