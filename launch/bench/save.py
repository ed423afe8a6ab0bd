"""`trifold bench save`: what a checkpoint of a recipe costs: training waits, the background writes, a resume reads."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from launch.bench.report import Row, machine, show
from launch.config import Recipe
from modeling.transformer import build
from pretrain.checkpoint import State, newest_verified, open_checkpoint
from pretrain.engine import Engine, Place
from pretrain.lease import Lease, take_generation
from pretrain.saving import Checkpointer
from pretrain.start import begin

SAVES = 5


def bench(recipe: Recipe, place: Place, console: Console, *, folder: Path, out: Path | None) -> None:
    """Measure in a new folder below `folder`, which is removed, and show."""
    engine = Engine(build(begin(recipe.model, Path(recipe.run))[0], recipe.seed), recipe, place)
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-save-") as run:
        rows = measure(engine, recipe, Path(run))
    show(console, f"{recipe.run}: one rank's checkpoint\n{machine(place.device, place.threads)}", rows, out)


def measure(engine: Engine, recipe: Recipe, run: Path) -> list[Row]:
    events: list[dict[str, Any]] = []

    def heard(event: str, **facts: Any) -> None:
        events.append({"event": event, **facts})

    saver = Checkpointer(Lease(run, take_generation(run).generation), 0, 1, recipe.checkpoints, heard)
    copies, calls = [], []
    for step in range(1, SAVES + 1):
        copied, slices = _timed(engine.slices)
        called, _ = _timed(lambda step=step, slices=slices: saver.save(_state(step), slices))
        copies.append(copied)
        calls.append(called)
        saver.wait()
    size = sum(tensor.nbytes for piece in slices.values() for tensor in piece.tensors.values())
    written = [event["seconds"] for event in events if event["event"] == "save_committed"]
    verified, found = _timed(lambda: newest_verified(run, heard))
    assert found is not None and len(written) == SAVES, events
    read, _ = _timed(lambda: engine.load(open_checkpoint(found.folder).read, 1))
    flat = torch.zeros(size // 4)
    bandwidth = size / median(_timed(lambda: flat.clone())[0] for _ in range(SAVES))
    stall = median(copies) + median(calls)
    named = {
        "training waits (copy and call)": stall,
        "written and committed, in the background": median(written),
        "verified, at a resume": verified,
        "read back, at a resume": read,
    }
    rows: list[Row] = [{"": name, "MB/s": size / seconds / 1e6, "seconds": seconds, "MB": size / 1e6} for name, seconds in named.items()]
    return [*rows, {"": "a plain host copy of as many bytes", "MB/s": bandwidth / 1e6, "seconds": size / bandwidth, "MB": size / 1e6}]


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def _state(step: int) -> State:
    return State(step=step, cursor=step, optimizer_step=step, skips=[], fingerprint="bench", config={})
