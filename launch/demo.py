"""The whole system on a laptop, as on a cluster: each family trained on the small world by two workers of which one is killed half way.

In: nothing from outside. Out: runs/demo/FAMILY with a published, verified folder, and one table. Each demo starts anew.
Cost: 4 minutes on 2 cores.
"""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.config import resolve
from launch.finetune import generate
from launch.pretrain import pretrain
from launch.world import write_world
from modeling.config import ModelConfig
from modeling.counts import num_parameters
from pretrain.metrics import read_lines
from pretrain.publish import publish
from pretrain.verify import verify

PROMPTS = {  # recipe: what its model is asked once it is published
    "configs/demo/decoder.yaml": "The employer of",
    "configs/demo/encoder.yaml": "On Sundays Fenla <mask> fond of <mask>.",
    "configs/demo/encoder-decoder.yaml": "On Sundays Fenla <extra_id_0> fond of <extra_id_1>.",
}


def demo(console: Console) -> None:
    """Train, kill, resume, publish, verify and use a model of each family; end with the table."""
    began = time.monotonic()
    write_world(Path("runs/demo/world"))
    rows = [_family(path, prompt, console) for path, prompt in PROMPTS.items()]
    table = Table(title=f"Trifold's demo, {time.monotonic() - began:.0f} s")
    table.add_column("family", style="dim")
    for row in rows:
        table.add_column(row["family"], overflow="fold")
    for name in list(rows[0])[1:]:
        table.add_row(name, *(row[name] for row in rows))
    console.print(table)


def _family(path: str, prompt: str, console: Console) -> dict[str, str]:
    """One recipe from text to a verified folder, as a row of the table."""
    recipe = resolve(path)
    assert isinstance(recipe.model, ModelConfig), "the demo begins with new weights"
    run = Path(recipe.run)
    shutil.rmtree(run, ignore_errors=True)
    console.rule(f"{recipe.model.family}: {path}")
    killed = _kill_when(run, recipe.steps // 2 + 5, rank=1)  # after a save, so that steps are lost and done again
    pretrain(recipe, console)

    out = publish(run, run / "published", on_event=lambda event, **facts: console.print(f"{event}: {facts}"))
    report = verify(out)
    [said] = generate(out, iter([prompt]), ["max_new=40"], as_json=False)
    console.print(f"[dim]{escape(prompt)}[/]\n{escape(said)}", highlight=False)

    metrics, events = read_lines(run / "metrics.jsonl"), read_lines(run / "events.jsonl")
    scores = [record for record in metrics if "heldout_loss" in record]
    speeds = sorted(record["tokens_per_s"] for record in metrics if "tokens_per_s" in record)
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    return {
        "family": recipe.model.family,
        "parameters": f"{num_parameters(recipe.model) / 1e6:.2f}M",
        "steps": str(recipe.steps),
        "held-out loss": _change(scores, "heldout_loss"),
        "held-out bits/byte": _change(scores, "bits_per_byte"),
        "held-out accuracy": _change(scores, "accuracy"),
        "tokens/s": f"{speeds[len(speeds) // 2]:,.0f}",
        "waste": f"{_last(events, 'data')['waste']:.1%}",
        "killed and resumed": f"rank 1 at step {killed.get('step', '?')}, from step {', '.join(map(str, resumed)) or '?'}",
        "folder": str(out),
        "verified": f"{sum(check.ok for check in report.checks)} of {len(report.checks)} checks",
    }


def _change(scores: list[dict[str, Any]], name: str) -> str:
    """A score before the first step and after the last; bits per byte exist for the decoder alone."""
    return f"{scores[0][name]:.3f} to {scores[-1][name]:.3f}" if name in scores[0] else "-"


def _kill_when(run: Path, step: int, rank: int) -> dict[str, Any]:
    """kill -9 a rank once `step` was recorded, as a machine's failure would; says in the returned mapping when it did."""
    done: dict[str, Any] = {}

    def watch() -> None:
        while (reached := max((record["step"] for record in read_lines(run / "metrics.jsonl")), default=0)) < step:
            time.sleep(0.1)
        os.kill(json.loads((run / "workers" / f"rank-{rank:05d}.json").read_text())["pid"], signal.SIGKILL)
        done["step"] = reached

    threading.Thread(target=watch, daemon=True).start()
    return done


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [event for event in events if event["event"] == kind][-1]
