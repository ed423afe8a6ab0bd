"""One `trifold finetune`, `evaluate` and `generate`: recipes settled and run as pretraining's are; published
folders used here, on the CPU.

In: a recipe, or a published folder and texts. Out: a run folder with scores.json, a table of scores beside a
trivial system's, or answers.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trifold.finetune import run
from trifold.finetune.evaluation import predict
from trifold.finetune.evaluation.evaluate import LoadedModel, report
from trifold.finetune.tasks import TASKS
from trifold.launch.commands.pretrain import connect, stopping
from trifold.launch.recipe.changes import reconcile_run_folder
from trifold.launch.recipe.reader import apply_overrides
from trifold.launch.recipe.schema import FinetuneRecipe, resume_command
from trifold.launch.watch.progress import ProgressWatcher
from trifold.launch.watch.trackers import tracking
from trifold.modeling.errors import UserError
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.monitor.run_folder import last_outcome
from trifold.pretrain.publish import published_folder
from trifold.pretrain.storage.json_files import read_json_object


def finetune(config: FinetuneRecipe, console: Console, address: str | None = None) -> None:
    """Train a recipe to its end and score its best checkpoint, or until SIGTERM or Ctrl-C: then the run is
    saved.
    """
    folder = Path(config.run)
    connect(config, address)
    for change in reconcile_run_folder(config):
        console.print(
            f"{change.key}: {change.old!r} so far, {change.new!r} from here",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    with ProgressWatcher(folder, config.steps, console) as watch, tracking(config, console):
        run.prepare(config, watch.prepared)
        with stopping(folder) as stop:
            if config.cluster.workers == 0:
                run.train(
                    config,
                    RankInfo(
                        0,
                        1,
                        0,
                        "cuda" if config.cluster.gpus_per_worker else "cpu",
                        None,
                        config.cluster.threads(1),
                    ),
                )
            else:
                from trifold.launch.cluster import driver  # imports Ray: 2 s

                driver.run(config, run.train, address, stop.asked)
    if last_outcome(folder) == "stopped":
        console.print(
            f"Continue with: {resume_command(config)}", markup=False, highlight=False, soft_wrap=True
        )
        raise SystemExit(128 + (stop.number or signal.SIGTERM))
    show(read_json_object(folder / "scores.json"), console)


def evaluate(folder: Path, config: FinetuneRecipe, out: Path | None, console: Console) -> None:
    """Score a published folder on a task's dev examples. `out`: a file for its predictions."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()  # where it cannot be written, that is said before the work
    opened = LoadedModel(folder)
    task = TASKS[config.task.kind](config.task, opened.tokenizer, opened.config.family, config.row_length)
    if task.with_head(opened.config) != opened.config:
        raise UserError(
            f"{folder} was not trained for {config.task.kind} with these labels: fine-tune it first (trifold"
            " finetune)."
        )
    predictions = task.predict(opened, task.dev, config.generation, config.micro_rows * config.row_length)
    if out is not None:
        records = [task.record(*pair) for pair in zip(task.dev, predictions, strict=True)]
        out.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
        )
    show({"task": config.task.kind, **report(task, predictions)}, console)


def show(found: dict[str, Any], console: Console) -> None:
    """Scores, their intervals, and the trivial system's, as a table."""
    step = f", step {found['step']}" if "step" in found else ""
    perplexity = f", perplexity {found['perplexity']:.2f}" if "perplexity" in found else ""
    table = Table(title=f"{found['task']}: {found['examples']:,} dev examples{step}{perplexity}")
    for name in ("score", "", "95 % interval", found["trivial"]["system"]):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, score in found["scores"].items():
        low, high = found["intervals"][name]
        table.add_row(
            name, f"{score:.2f}", f"{low:.2f} to {high:.2f}", f"{found['trivial']['scores'][name]:.2f}"
        )
    console.print(table)
    for name, signature in found["signatures"].items():
        console.print(f"{name}: {signature}", style="dim", markup=False, highlight=False, soft_wrap=True)


def generate(folder: Path, texts: Iterator[str], how: list[str], as_json: bool) -> Iterator[str]:
    """A line for each text: what the model of a published folder makes of it, as text or as JSON."""
    for said in predict.predict(
        LoadedModel(folder), texts, apply_overrides(published_folder.read_generation(folder), how)
    ):
        yield json.dumps(said, ensure_ascii=False) if as_json else predict.as_text(said)
