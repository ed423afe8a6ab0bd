"""`trifold plan`: what a recipe will need, said before anything starts; and after a run what it did need, beside that.

In: a recipe, where it would run, and the rate of a device: measured here in seconds, taken from an earlier run, or given. Out: a table and
RUN/plan.json. Memory and checkpoint are exact counts (pretrain/budget.py), seconds are only as good as the rate.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launch.bench import contenders, rows
from launch.config import Recipe
from modeling.batch import Batch
from modeling.config import ModelConfig, Refused
from modeling.counts import num_parameters
from pretrain import budget, storage
from pretrain.batches import stack
from pretrain.engine import Place
from pretrain.metrics import read_lines
from pretrain.stages import parts
from pretrain.start import begin

GPU_HOURS_PER_FAILURE = 50_000.0  # Llama 3 405B: 419 unexpected interruptions in 54 days of 16,384 GPUs (Dubey et al. 2024, section 3.3.4)
STEADY = 3  # timed steps of each kind in a calibration


@dataclass(frozen=True)
class Where:
    """The machines, and what is known of them."""

    ranks: int
    device: str
    memory: float  # bytes of a device
    tokens_per_second: float | None = None  # of one device; None: measured here
    write_bytes_per_second: float | None = None  # of one rank; None: measured here
    price_per_hour: float = 0.0  # of one device
    hours_per_failure: float = GPU_HOURS_PER_FAILURE  # of one device
    restart_seconds: float = 60.0  # from a failure to the first step after it, reading the checkpoint aside


def plan(recipe: Recipe, where: Where, console: Console) -> dict[str, Any]:
    """Work it out, write RUN/plan.json, show it."""
    found = predict(recipe, where)
    file = Path(recipe.run) / "plan.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{recipe.run} on {where.ranks} {where.device} rank(s)", show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), shown(name, value))
    console.print(table)
    if found["memory_peak_bytes"] > where.memory:
        console.print(
            f"It does not fit: a rank needs {shown('_bytes', found['memory_peak_bytes'])} and has {shown('_bytes', where.memory)}. Set"
            f" micro_rows to {found['largest_micro_rows']} at most, engine.recompute=true, or a higher engine.zero_stage.",
            style="yellow",
        )
    return found


def predict(recipe: Recipe, where: Where) -> dict[str, Any]:
    """What is known before a run, by name; the names say the unit."""
    model = begin(recipe.model, Path(recipe.run))[0]
    part = parts(recipe)[-1]
    micro = _batch(recipe, model, part.micro_rows)
    memory = budget.memory(recipe, model, micro, where.ranks, where.device)
    rounds = -(-part.micros // where.ranks)
    tokens = part.step_rows * micro.tokens[0].numel() + (0 if micro.source is None else part.step_rows * micro.source[0].numel())
    seconds = _step_seconds(recipe, model, where, rounds, tokens)
    saved = budget.checkpoint_bytes(recipe, model)
    rate = where.write_bytes_per_second or _write_rate(Path(recipe.run))
    writing = saved / where.ranks / rate
    return {
        "parameters": num_parameters(model),
        **{f"memory_{name}_bytes": size for name, size in memory._asdict().items()},
        "memory_peak_bytes": memory.total,
        "largest_micro_rows": budget.largest_micro(
            recipe, model, lambda n: _batch(recipe, model, n), where.ranks, where.device, where.memory
        ),
        "micros_of_a_rank": rounds,
        "sent_bytes_of_a_rank_and_step": budget.traffic(recipe, model, where.ranks, rounds),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "checkpoint_bytes": saved,
        "checkpoint_seconds": writing,
        **_whole_run(recipe, where, seconds, saved / where.ranks / rate),
    }


def beside(recipe: Recipe) -> Table | None:
    """What RUN/plan.json said beside what the run's metrics and events found; None where nothing was planned. It is written there too."""
    folder = Path(recipe.run)
    if not (folder / "plan.json").exists():
        return None
    said = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    found = measured(folder)
    (folder / "plan.json").write_text(json.dumps({**said, "measured": found}, indent=1) + "\n", encoding="utf-8")
    table = Table(title="planned and measured")
    for name in ("", "planned", "measured", "off by"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), shown(name, said[name]), shown(name, value), f"{100 * (said[name] / value - 1):+.0f} %")
    return table


def measured(folder: Path) -> dict[str, float]:
    """What a run's own files say of what a plan predicts: medians of its steps and of its saves, the peak of its first rank."""
    steps = [record for record in read_lines(folder / "metrics.jsonl") if "seconds" in record]
    events = read_lines(folder / "events.jsonl")
    found: dict[str, list[float]] = {
        "memory_peak_bytes": [max((record.get("peak_bytes", 0) for record in steps), default=0)],
        "step_seconds": [record["seconds"] for record in steps],
        "tokens_per_second": [record["tokens_per_s"] for record in steps],
        "checkpoint_bytes": [e["bytes"] for e in events if e["event"] == "save_committed"],
        "checkpoint_seconds": [e["seconds"] for e in events if e["event"] == "save_committed"],
    }
    return {name: median(values) for name, values in found.items() if values and max(values) > 0}


def shown(name: str, value: Any) -> str:
    """A value in the unit that its name ends with."""
    if "bytes" in name:
        unit = next((u for u in (40, 30, 20) if value >= 2**u), 10)
        return f"{value / 2**unit:,.2f} {dict(zip((40, 30, 20, 10), ('TiB', 'GiB', 'MiB', 'KiB'), strict=True))[unit]}"
    if "share" in name:
        return f"{100 * value:.2f} %"
    return f"{value:,.3f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


def _whole_run(recipe: Recipe, where: Where, step: float, writing: float) -> dict[str, float]:
    """Time, price and what failures cost. A save holds training up while its slices are copied to host memory; it is written beside the
    steps, so saves cannot follow each other faster than they are written."""
    between = where.hours_per_failure * 3600 / where.ranks
    stall = 0.02 * writing  # measured: the copy takes about a fiftieth of the writing (LOG.md)
    restart = where.restart_seconds + writing  # reading is as fast as writing
    interval = max(budget.best_interval(stall, between), writing)
    every = recipe.checkpoints.every * step
    lost = budget.lost_share(every, stall, restart, between)
    hours = recipe.steps * step / 3600 * (1 + lost)
    return {
        "run_hours": hours,
        "run_price": hours * where.ranks * where.price_per_hour,
        "hours_between_failures": between / 3600,
        "restart_seconds": restart,
        "lost_share": lost,
        "best_checkpoints_every_steps": max(1, round(interval / step)),
        "lost_share_at_best": budget.lost_share(interval, stall, restart, between),
    }


def _step_seconds(recipe: Recipe, model: ModelConfig, where: Where, rounds: int, tokens: int) -> float:
    """From the device's rate, or by a few steps of one and of two micros here: what a micro takes, and what the optimizer does."""
    if where.tokens_per_second is not None:
        return tokens / where.ranks / where.tokens_per_second
    if where.device == "cuda" and not torch.cuda.is_available():
        raise Refused("there is no CUDA device here to measure: give --tokens-per-second (of one device), or --like a run's folder")
    place = Place(0, 1, 0, "cuda" if where.device == "cuda" else "cpu", None, recipe.cluster.threads_per_worker or 1)
    micros = rows.micros(recipe, model.vocab_size, 2, 2, place.device)
    racing = [contenders.ours(f"{n} micro(s)", recipe, model, [micros[:n]], place, 0.0) for n in (1, 2)]
    contenders.race(racing, place, warmup=1, steps=STEADY)
    if failed := [c.failed for c in racing if not c.seconds]:
        raise Refused(f"the steps that were to be measured failed: {failed[0]}. Give --tokens-per-second instead.")
    one, two = (median(c.seconds) for c in racing)
    return one + (rounds - 1) * max(0.0, two - one)


def _write_rate(folder: Path) -> float:
    """Bytes per second of a hashed and synced file beside the run."""
    folder.mkdir(parents=True, exist_ok=True)
    content = memoryview(bytes(2**26))
    inside = Path(tempfile.mkdtemp(dir=folder, prefix="rate-"))
    try:
        began = time.perf_counter()
        storage.write(inside / "rate", iter([content]))
        return len(content) / (time.perf_counter() - began)
    finally:
        shutil.rmtree(inside)


def _batch(recipe: Recipe, model: ModelConfig, number: int) -> Batch:
    """Rows of the recipe's shape."""
    source = rows.synthetic(recipe, model.vocab_size, 2, number)
    return stack([source.row(i) for i in range(number)])


def device_memory(device: str, ranks: int) -> float:
    """Bytes that a rank may use here: a CUDA device's, or its share of the machine's."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise Refused("there is no CUDA device here: give --memory-gib and --tokens-per-second of one")
        return float(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def rate_of(folder: Path) -> float:
    """Tokens per second of one rank in an earlier run: the median of its steps."""
    started = [event for event in read_lines(folder / "events.jsonl") if event["event"] == "started"]
    found: Mapping[str, float] = measured(folder)
    if not started or "tokens_per_second" not in found:
        raise Refused(f"{folder} holds no steps of a run to take a rate from")
    return found["tokens_per_second"] / started[-1]["world"]
