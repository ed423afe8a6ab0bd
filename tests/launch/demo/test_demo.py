"""The demo's parts fit together: each fine-tune has the folder, the files and the row length that it needs;
the tables can be read.
"""

from io import StringIO
from pathlib import Path

import pytest

from trifold.launch.demo.demo import FAMILIES, KILLED, TASKS, _killed, _side_by_side, demo
from trifold.launch.demo.world_tasks import write_tasks
from trifold.launch.recipe.reader import resolve
from trifold.launch.recipe.schema import FinetuneRecipe
from trifold.launch.terminal import Terminal
from trifold.pretrain.storage.jsonl import append_line


def test_every_finetune_starts_from_a_folder_and_files_that_the_demo_makes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_tasks(Path("runs/demo/tasks"))
    published = {f"{recipe.run}/published": recipe for recipe in (resolve(path) for path in FAMILIES)}
    recipes = [resolve(path, (), FinetuneRecipe) for path in TASKS]
    for recipe in recipes:
        assert recipe.row_length <= published[str(recipe.model.folder)].model.max_positions
        assert all(
            Path(file).exists()
            for place in (*recipe.task.train, *recipe.task.dev)
            for file in place.split(",")
        )
        assert recipe.steps % recipe.evaluate_every == 0  # the last step is scored too
    assert {recipe.task.kind for recipe in recipes} == {"translation", "summarization", "ner", "qa"}
    [killed] = [recipe for recipe in recipes if recipe.task.kind == KILLED]
    assert (
        recipe.checkpoints.every < killed.steps // 2 + 5 < killed.steps
    )  # a checkpoint to go on from, and steps to lose


def test_a_demo_that_is_stopped_says_that_the_run_can_go_on_and_the_demo_begins_anew(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def stopped(*_: object) -> None:
        raise SystemExit(130)

    monkeypatch.setattr("trifold.launch.demo.demo._family", stopped)
    console = Terminal(width=80, record=True, file=StringIO())
    with pytest.raises(SystemExit, match="130"):
        demo(console)
    assert console.export_text().endswith(
        "That continues this one run. `trifold demo` begins all of them anew.\n"
    )


def test_the_folders_stand_below_the_tables_each_on_a_line_of_its_own_to_be_copied(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "trifold.launch.demo.demo._family",
        lambda path, *_: {"family": path, "folder": f"runs/of/{Path(path).stem}/published"},
    )
    monkeypatch.setattr(
        "trifold.launch.demo.demo._task",
        lambda path, *_: {"task": path, "folder": f"runs/of/{Path(path).stem}/published"},
    )
    console = Terminal(width=80, record=True, file=StringIO())
    demo(console)
    said = console.export_text().splitlines()
    assert all(f"runs/of/{Path(path).stem}/published" in said for path in (*FAMILIES, *TASKS))


def test_a_table_fits_a_terminal_and_says_what_happened(tmp_path):
    append_line(tmp_path / "events.jsonl", {"event": "resumed", "step": 50})
    row = {"task": "qa", "from pretrained": "61.0", "killed and resumed": _killed(tmp_path, {"step": 65})}
    console = Terminal(width=80, record=True, file=StringIO())
    console.print(_side_by_side("Fine-tuning", [row, {**row, "task": "ner"}]))
    said = console.export_text()
    assert all(word in said for word in ("Fine-tuning", "qa", "ner", "61.0", "65", "50"))
    assert all(len(line) <= 80 for line in said.splitlines())
