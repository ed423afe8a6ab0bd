"""`trifold finetune`, `evaluate` and `generate`: the table of scores, and published models used here.

A resolved recipe, or a published folder and texts, come in. Out come a run folder with scores.json, a table
of scores next to a trivial baseline's, or answers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from trifold.finetune import run
from trifold.finetune.evaluation import predict
from trifold.finetune.evaluation.evaluate import LoadedModel, report
from trifold.finetune.evaluation.model_selection import write_predictions
from trifold.finetune.evaluation.seeds import seed_configs, summarise_seeds
from trifold.finetune.tasks import TASKS
from trifold.launch.commands.run import drive
from trifold.launch.recipe.changes import reconcile_run_folder
from trifold.launch.recipe.reader import apply_overrides
from trifold.launch.recipe.schema import FinetuneRecipe, resume_command
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain.monitor.run_folder import last_outcome
from trifold.pretrain.publish import published_folder
from trifold.pretrain.storage.json_files import read_json_object


def finetune(config: FinetuneRecipe, console: Terminal, address: str | None = None) -> None:
    """Train a recipe until it is finished and score its best checkpoint, or until a signal stops it with a
    save.
    """
    if config.seeds > 1:
        return finetune_seeds(config, console, address)
    drive(config, run.prepare, run.train, console, address)
    show_scores(read_json_object(Path(config.run) / "scores.json"), console)


def finetune_seeds(config: FinetuneRecipe, console: Terminal, address: str | None) -> None:
    """Train each seed that is not finished yet, one after another, and show the scores of all."""
    reconcile_run_folder(config)
    for one in seed_configs(config):
        if last_outcome(Path(one.run)) == "scored":
            reconcile_run_folder(one)  # rejects a recipe that is not the one that trained it
            console.print_line(f"{one.run} is finished.")
            continue
        try:
            drive(one, run.prepare, run.train, console, address)
        except SystemExit:
            console.print_line(f"For all {config.seeds} seeds: {resume_command(config)}")
            raise
    show_seeds(summarise_seeds(config), console)


def evaluate(folder: Path, config: FinetuneRecipe, out: Path | None, console: Terminal) -> None:
    """Score a published folder on a task's dev examples. `out` is a file for its predictions."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()  # fails before the work where it cannot be written

    model = LoadedModel(folder)
    task = TASKS[config.task.kind](config.task, model.tokenizer, model.config.family, config.row_length)
    if task.with_head(model.config) != model.config:
        raise UserError(
            f"{folder} was not trained for {config.task.kind} with these labels: fine-tune it first"
            " (trifold finetune)."
        )

    task.restore(model.task)
    predictions = task.predict(model, task.dev, config.generation, config.micro_rows * config.row_length)
    if out is not None:
        write_predictions(out, task, task.dev, predictions)
    show_scores({"task": config.task.kind, **report(task, predictions, task.dev)}, console)


def generate(folder: Path, texts: Iterator[str], overrides: list[str], as_json: bool) -> Iterator[str]:
    """One line for each text: the output of a published model, as text or as JSON.

    `overrides` change the folder's generation settings, such as `beams=4`.
    """
    settings = apply_overrides(published_folder.read_generation(folder), overrides)
    for output in predict.predict(LoadedModel(folder), texts, settings):
        yield json.dumps(output, ensure_ascii=False, allow_nan=False) if as_json else predict.as_text(output)


def show_seeds(summary: dict[str, Any], console: Terminal) -> None:
    """Print the dev scores of each seed, their mean and their standard deviation."""
    table = Table(title=f"{summary['task']}: dev scores of {len(summary['seeds'])} seeds")
    table.add_column("score")
    for heading in (*summary["seeds"], "mean", "standard deviation"):
        table.add_column(heading, justify="right")
    for name, average in summary["mean"].items():
        scores = [f"{result['scores'][name]:.2f}" for result in summary["seeds"].values()]
        table.add_row(name, *scores, f"{average:.2f}", f"{summary['spread'][name]:.2f}")
    console.print(table)
    console.print_line(
        f"{summary['published']} is the best by {summary['best']}: `trifold publish` takes it."
    )


def show_scores(result: dict[str, Any], console: Terminal) -> None:
    """Print a table of scores with their confidence intervals, next to the trivial baseline's."""
    step = f", step {result['step']}" if "step" in result else ""
    perplexity = f", perplexity {result['perplexity']:.2f}" if "perplexity" in result else ""
    title = f"{result['task']}: {result['examples']:,} dev examples{step}{perplexity}"
    _show_table(title, result, console)
    if "test" in result:
        _show_table(
            f"{result['task']}: {result['test']['examples']:,} test examples", result["test"], console
        )
    for name, signature in result["signatures"].items():
        console.print_line(f"{name}: {signature}", style="dim")


def _show_table(title: str, result: dict[str, Any], console: Terminal) -> None:
    """Print the scores of one split."""
    table = Table(title=title)
    table.add_column("score")
    for heading in ("", "95 % interval", result["trivial"]["system"]):
        table.add_column(heading, justify="right")

    for name, score in result["scores"].items():
        low, high = result["intervals"][name]
        baseline = result["trivial"]["scores"][name]
        table.add_row(name, f"{score:.2f}", f"{low:.2f} to {high:.2f}", f"{baseline:.2f}")
    console.print(table)
