"""The whole pipeline on a laptop, as on a cluster: each family is pretrained on the toy corpus by two
workers, one of which is killed half way. Then the published folders are fine-tuned on four tasks, each next
to a model of the same shape with random weights.

Nothing comes in from outside. Out come runs/demo/NAME with a published, verified folder, and two tables. Each
demo starts from scratch. Cost: 19 minutes on 2 cores with AVX2 only.
"""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from trifold.finetune.evaluation.model_selection import best_step
from trifold.launch.commands.finetune import finetune, generate
from trifold.launch.commands.pretrain import pretrain
from trifold.launch.demo.world import write_world
from trifold.launch.demo.world_tasks import write_tasks
from trifold.launch.recipe.reader import resolve
from trifold.launch.recipe.schema import FinetuneRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.config import ModelConfig
from trifold.modeling.flops import num_parameters
from trifold.pretrain.monitor.events import describe
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.json_files import read_json_object
from trifold.pretrain.storage.jsonl import read_lines

FAMILIES = {  # recipe: what its model is asked once it is published
    "configs/demo/decoder.yaml": "The employer of",
    "configs/demo/encoder.yaml": "On Sundays Fenla <mask> fond of <mask>.",
    "configs/demo/encoder-decoder.yaml": "On Sundays Fenla <extra_id_0> fond of <extra_id_1>.",
}
TASKS = {  # the same; all that the prompts tell is made up anew
    "configs/demo/translation.yaml": "The employer of Selarl Keloraley is Marewick Brothers.",
    "configs/demo/summaries.yaml": "Today Selarl Keloraley lives in Vereham. Wenil Yaraton lives in"
    " Fenuvemouth. Selarl Keloraley is"
    " a tailor. Berilo Oruvewick likes chess. Selarl Keloraley works for Holuwick Works. Wenil Yaraton was"
    " born in 1931."
    " Selarl Keloraley likes reading. Berilo Oruvewick often visits Wenil Yaraton.",
    "configs/demo/tags.yaml": "Marewick Brothers employs Selarl Keloraley. She lives in Vereham.",
    "configs/demo/questions.yaml": "Where does Selarl Keloraley live?\tWenil Yaraton has a house in"
    " Fenuvemouth. Wenil Yaraton likes chess."
    " Selarl Keloraley works for Holuwick Works. She lives in Vereham.",
}
KILLED = "translation"  # one fine-tune loses a worker too


def demo(console: Terminal) -> None:
    """Train, kill, resume, publish, verify and use a model of each family; teach them four tasks; end with a
    table of each.
    """
    began = time.monotonic()
    write_world(Path("runs/demo/world"))
    write_tasks(Path("runs/demo/tasks"))
    try:
        families = [_family(path, prompt, console) for path, prompt in FAMILIES.items()]
        trained = time.monotonic()
        tasks = [_task(path, prompt, console) for path, prompt in TASKS.items()]
    except SystemExit:  # a run was stopped, and has said what continues it
        console.print("That continues this one run. `trifold demo` begins all of them anew.", highlight=False)
        raise
    for title, rows, seconds in (
        ("Pretraining", families, trained - began),
        ("Fine-tuning: what pretraining was worth", tasks, time.monotonic() - trained),
    ):
        folders = [row.pop("folder") for row in rows]  # a column of a terminal is too narrow for a path
        console.print(_side_by_side(f"{title}, {seconds:.0f} s", rows))
        console.print(*folders, sep="\n", highlight=False)
    console.print('Ask any of them:  trifold generate FOLDER "a text"', markup=False, highlight=False)


def _side_by_side(title: str, rows: list[dict[str, str]]) -> Table:
    """A column for each row, headed by its first value."""
    head, *names = rows[0]
    table = Table(title=title)
    table.add_column(head, style="dim")
    for row in rows:
        table.add_column(row[head], overflow="fold")
    for name in names:
        table.add_row(name, *(row[name] for row in rows))
    return table


def _family(path: str, prompt: str, console: Terminal) -> dict[str, str]:
    """One recipe from text to a verified folder, as a row of the table."""
    config = resolve(path)
    assert isinstance(config.model, ModelConfig), "the demo begins with new weights"
    run = Path(config.run)
    shutil.rmtree(run, ignore_errors=True)
    console.rule(f"{config.model.family}: {path}")
    killed = _kill_when(
        run, config.steps // 2 + 5, rank=1
    )  # after a save, so that steps are lost and done again
    pretrain(config, console)

    out, verified = _published(run, prompt, console)
    metrics, events = read_lines(run / "metrics.jsonl"), read_lines(run / "events.jsonl")
    scores = [record for record in metrics if "heldout_loss" in record]
    speeds = sorted(record["tokens_per_s"] for record in metrics if "tokens_per_s" in record)
    return {
        "family": config.model.family,
        "parameters": f"{num_parameters(config.model) / 1e6:.2f}M",
        "steps": str(config.steps),
        "held-out loss": _change(scores, "heldout_loss"),
        "held-out bits/byte": _change(scores, "bits_per_byte"),
        "held-out accuracy": _change(scores, "accuracy"),
        "tokens/s": f"{speeds[len(speeds) // 2]:,.0f}",
        "waste": f"{_last(events, 'data')['waste']:.1%}",
        "killed and resumed": _killed(run, killed),
        "folder": str(out),
        "verified": verified,
    }


def _task(path: str, prompt: str, console: Terminal) -> dict[str, str]:
    """One recipe from a family's published folder to a task's, and the same from random weights, as a row of
    the table.
    """
    config = resolve(path, (), FinetuneRecipe)
    random = resolve(path, ["model.random=true", f"run={config.run}-random"], FinetuneRecipe)
    scores, seconds = [], []
    killed: dict[str, Any] = {}
    for one in (config, random):
        console.rule(
            f"{config.task.kind} from {'random weights' if one is random else config.model.folder}: {path}"
        )
        shutil.rmtree(one.run, ignore_errors=True)
        began = time.monotonic()
        if one is config and config.task.kind == KILLED:
            killed = _kill_when(Path(one.run), config.steps // 2 + 5, rank=1)
        finetune(one, console)
        seconds.append(time.monotonic() - began)
        scores.append(read_json_object(Path(one.run) / "scores.json"))
    out, verified = _published(Path(config.run), prompt, console)
    best, trivial = scores[0]["best"], scores[0]["trivial"]
    return {
        "task": config.task.kind,
        "family": Path(str(config.model.folder)).parent.name,
        "steps": str(config.steps),
        "score": best,
        "from pretrained": f"{scores[0]['scores'][best]:.1f}",
        "from random": f"{scores[1]['scores'][best]:.1f}",
        "trivial": f"{trivial['scores'][best]:.1f} ({trivial['system']})",
        "seconds": " and ".join(f"{value:.0f}" for value in seconds),
        "killed and resumed": _killed(Path(config.run), killed) if killed else "-",
        "folder": str(out),
        "verified": verified,
    }


def _published(run: Path, prompt: str, console: Terminal) -> tuple[Path, str]:
    """A run's folder, its checks, and what it answers."""

    def tell(event: str, **facts: Any) -> None:
        console.print(describe(event, facts), style="dim", markup=False, highlight=False)

    out = publish(run, run / "published", on_event=tell, checkpoint=best_step(DiskPath(run)))
    report = verify(out)
    [output] = generate(out, iter([prompt]), ["max_new=40"], as_json=False)
    console.print(f"[dim]{escape(prompt)}[/]\n{escape(output)}", highlight=False)
    return out, f"{sum(check.ok for check in report.checks)} of {len(report.checks)} checks"


def _change(scores: list[dict[str, Any]], name: str) -> str:
    """A score before the first step and after the last; bits per byte exist for the decoder alone."""
    return f"{scores[0][name]:.3f} to {scores[-1][name]:.3f}" if name in scores[0] else "-"


def _kill_when(run: Path, step: int, rank: int) -> dict[str, Any]:
    """kill -9 a rank once `step` was recorded, as a machine's failure would; says in the returned mapping
    when it did.
    """
    done: dict[str, Any] = {}

    def watch() -> None:
        while (
            reached := max((record["step"] for record in read_lines(run / "metrics.jsonl")), default=0)
        ) < step:
            time.sleep(0.1)
        os.kill(json.loads((run / "workers" / f"rank-{rank:05d}.json").read_text())["pid"], signal.SIGKILL)
        done["step"] = reached

    threading.Thread(target=watch, daemon=True).start()
    return done


def _killed(run: Path, killed: dict[str, Any]) -> str:
    resumed = [
        str(event["step"]) for event in read_lines(run / "events.jsonl") if event["event"] == "resumed"
    ]
    return f"rank 1 at step {killed.get('step', '?')}, from step {', '.join(resumed) or '?'}"


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [event for event in events if event["event"] == kind][-1]
