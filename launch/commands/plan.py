"""`trifold plan`: what a recipe will need, said before anything starts; and after a run what it did need,
beside that.

In: a recipe, where it would run, and the rate of a device: measured here in seconds, taken from an earlier
run, or given. Out: a table and RUN/plan.json. Memory and checkpoint are exact counts
(pretrain/engine/memory_estimate.py), seconds are only as good as the rate.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.table import Table

from trifold.launch.bench import contenders, rows, save
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import num_parameters
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.stages import resolve_stages
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine import auto, memory_estimate
from trifold.pretrain.engine.fp8 import check_device
from trifold.pretrain.initial_model import load_initial_model
from trifold.pretrain.storage.jsonl import read_lines

# Llama 3 405B: 419 unexpected interruptions in 54 days of 16,384 GPUs (Dubey et al. 2024, section 3.3.4)
GPU_HOURS_PER_FAILURE = 50_000.0
WARMUP, STEADY = 2, 5  # steps of a calibration that are not timed, and timed ones of each kind
# of a save's writing that training waits for, where neither is measured: 0.02 to 0.2 was seen (LOG.md, `bench
# save`)
COPY_SHARE = 0.1
UNITS = {"TiB": 40, "GiB": 30, "MiB": 20}  # as powers of two


@dataclass(frozen=True)
class Machine:
    """The machines, and what is known of them."""

    ranks: int
    device: str
    memory: float  # bytes of a device
    tokens_per_second: float | None = None  # of one device; None: steps and saves are measured here
    write_bytes_per_second: float = 1e9  # of one rank, where they are not
    price_per_hour: float = 0.0  # of one device
    hours_per_failure: float = GPU_HOURS_PER_FAILURE  # of one device
    restart_seconds: float = 60.0  # from a failure to the first step after it, reading the checkpoint aside


def plan(config: PretrainRecipe, where: Machine, console: Terminal) -> dict[str, Any]:
    """Work it out, write RUN/plan.json, show it."""
    found = predict(auto.resolve_precision(config, where.device), where)
    file = Path(config.run) / "plan.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{config.run} on {where.ranks} {where.device} rank(s)", show_header=False)
    for name, value in found.items():
        table.add_row(_said(name), shown(name, value))
    console.print(table)
    if found["memory_peak_bytes"] > where.memory:
        console.print(
            f"It does not fit: a rank needs {shown('_bytes', found['memory_peak_bytes'])} and has"
            f" {shown('_bytes', where.memory)}. Set"
            f" micro_rows to {found['largest_micro_rows']} at most, engine.recompute=true, or a higher"
            " engine.zero_stage.",
            style="yellow",
        )
    return found


class Rates(NamedTuple):
    """Seconds of a rank, and bytes of its process beyond tensors."""

    micro: float
    optimizer: float
    save_waits: float
    save_written: float
    save_read: float
    process: int | None  # None: not known, as no process was seen


def predict(config: PretrainRecipe, where: Machine) -> dict[str, Any]:
    """What is known before a run, by name; the names say the unit."""
    if config.engine.fp8:
        check_device(where.device)
    model = load_initial_model(config.model, Path(config.run))[0]
    part = resolve_stages(config)[-1]
    micros = (_batch(config, model, part.micro_rows, part.row_length) for part in resolve_stages(config))
    recompute = auto.needs_recompute(config, model, micros, where.ranks, where.device, where.memory)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"recompute": recompute})})
    micro = _batch(config, model, part.micro_rows)
    memory = memory_estimate.estimate_memory(config, model, micro, where.ranks, where.device)
    saved = memory_estimate.checkpoint_bytes(config, model)
    tokens = part.micro_rows * (
        micro.tokens.shape[1] + (0 if micro.source is None else micro.source.shape[1])
    )
    share = tokens / config.engine.sequence_parallel  # positions of a rank
    rates = (
        _measured(config, model, where) if where.tokens_per_second is None else _given(where, share, saved)
    )
    rounds = -(-part.micros // config.engine.data_parallel_size(where.ranks))
    exchanged = memory_estimate.sequence_parallel_bytes(config, model, micro, where.device)
    step = rounds * rates.micro + rates.optimizer
    process = rates.process or 0
    peak, fits = memory.total + process, where.memory - process
    return {
        "parameters": num_parameters(model),
        "recompute": recompute,
        **{f"memory_{name}_bytes": size for name, size in memory._asdict().items()},
        "memory_process_bytes": rates.process,
        "memory_peak_bytes": peak,
        "largest_micro_rows": memory_estimate.largest_micro(
            config, model, lambda n: _batch(config, model, n), where.ranks, where.device, fits
        ),
        "micros_of_a_rank": rounds,
        "sent_bytes_of_a_rank_and_step": memory_estimate.gradient_bytes(config, model, where.ranks, rounds)
        + rounds * exchanged,
        "step_seconds": step,
        "positions_per_second": part.micros * tokens / step,
        "checkpoint_bytes": saved,
        "checkpoint_seconds": rates.save_written,
        **_whole_run(config, where, step, rates),
    }


def compare_to_measured(config: PretrainRecipe) -> Table | None:
    """What RUN/plan.json said beside what the run's metrics and events found; None where nothing was planned.
    It is written there too.
    """
    folder = Path(config.run)
    if not (folder / "plan.json").exists():
        return None
    said = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    found = measured(folder)
    (folder / "plan.json").write_text(
        json.dumps({**said, "measured": found}, indent=1) + "\n", encoding="utf-8"
    )
    table = Table(title="planned and measured")
    for name in ("", "planned", "measured", "off by"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in found.items():
        table.add_row(
            _said(name),
            shown(name, said[name]),
            shown(name, value),
            f"{100 * (said[name] / value - 1):+.0f} %",
        )
    return table


def measured(folder: Path) -> dict[str, float]:
    """What a run's own files say of what a plan predicts: medians of its steps and of its saves, the peak of
    its first rank.
    """
    steps = [record for record in read_lines(folder / "metrics.jsonl") if "seconds" in record]
    events = read_lines(folder / "events.jsonl")
    found: dict[str, list[float]] = {
        "memory_peak_bytes": [max((record.get("peak_bytes", 0) for record in steps), default=0)],
        "step_seconds": [record["seconds"] for record in steps],
        "checkpoint_bytes": [e["bytes"] for e in events if e["event"] == "save_committed"],
        "checkpoint_seconds": [e["seconds"] for e in events if e["event"] == "save_committed"],
    }
    return {name: median(values) for name, values in found.items() if values and max(values) > 0}


def _said(name: str) -> str:
    """A name as a table says it; bytes have their unit in the value."""
    return name.removesuffix("_bytes").replace("memory_", "memory: ").replace("_", " ")


def shown(name: str, value: Any) -> str:
    """A value in the unit that its name ends with."""
    if value is None:
        return "not known without steps here"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "bytes" in name:
        unit, power = next((item for item in UNITS.items() if value >= 2 ** item[1]), ("KiB", 10))
        return f"{value / 2**power:,.2f} {unit}"
    if "share" in name:
        return f"{100 * value:.2f} %"
    return f"{value:,.3f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


def _whole_run(config: PretrainRecipe, where: Machine, step: float, rates: Rates) -> dict[str, float]:
    """Time, price and what failures cost. A save is written beside the steps, so saves cannot follow each
    other faster than that.
    """
    between = where.hours_per_failure * 3600 / where.ranks
    restart = where.restart_seconds + rates.save_read
    interval = max(memory_estimate.best_interval(rates.save_waits, between), rates.save_written)
    lost = memory_estimate.lost_fraction(config.checkpoints.every * step, rates.save_waits, restart, between)
    hours = config.steps * step / 3600 * (1 + lost)
    return {
        "run_hours": hours,
        "run_price": hours * where.ranks * where.price_per_hour,
        "hours_between_failures": between / 3600,
        "restart_seconds": restart,
        "lost_share": lost,
        "best_checkpoints_every_steps": max(1, round(interval / step)),
        "lost_share_at_best": memory_estimate.lost_fraction(interval, rates.save_waits, restart, between),
    }


def _given(where: Machine, tokens: float, saved: int) -> Rates:
    """From the rates of a device that is not here."""
    assert where.tokens_per_second is not None
    written = saved / where.ranks / where.write_bytes_per_second
    process = (
        0 if where.device == "cuda" else None
    )  # of a GPU's memory it holds nothing that torch does not count
    return Rates(tokens / where.tokens_per_second, 0.0, COPY_SHARE * written, written, written, process)


def _measured(config: PretrainRecipe, model: ModelConfig, where: Machine) -> Rates:
    """A few steps of one and of two micros on this machine, and a few saves beside the run folder, by one
    rank.
    """
    if where.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device here to measure: give --tokens-per-second (of one device), or --like a"
            " run's folder"
        )
    rank_info = RankInfo.single(
        "cuda" if where.device == "cuda" else "cpu",
        config.cluster.threads(max(1, config.cluster.workers)),
    )
    alone = config.engine.model_copy(update={"sequence_parallel": 1})
    one = config.model_copy(update={"step_rows": 2 * config.micro_rows, "engine": alone})
    batches = rows.micros(config, model.vocab_size, 2, 2, rank_info.device)
    racer = contenders.ours("both", one, model, [batches[:1], batches], rank_info, 0.0)
    try:  # not contenders.race: its profiler would be counted as memory of the process
        racer.model, racer.step = racer.make()
        for i in range(WARMUP + 2 * STEADY):
            contenders.timed_step(racer, rank_info, i)
    except RuntimeError as error:
        raise UserError(
            f"the steps that were to be measured failed: {error}. Give --tokens-per-second instead."
        ) from error
    one_micro, two_micros = (
        median(racer.seconds[i::2]) for i in (WARMUP, WARMUP + 1)
    )  # steps have one and two micros in turn
    micro = max(0.0, two_micros - one_micro)
    assert racer.engine is not None
    counted = memory_estimate.estimate_memory(one, model, batches[0].batch, 1, where.device).total
    process = max(0, racer.engine.meter.peak() - counted) if where.device == "cpu" else 0
    costs = save.measure(racer.engine, config, Path(config.run))
    slice_ = micro / config.engine.sequence_parallel
    return Rates(
        slice_,
        one_micro - micro,
        costs.waits / where.ranks,
        costs.written / where.ranks,
        costs.verified + costs.read,
        process,
    )


def _batch(config: PretrainRecipe, model: ModelConfig, number: int, row_length: int | None = None) -> Batch:
    """Rows of the recipe's shape, or of another length."""
    if row_length is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"row_length": row_length})})
    source = rows.synthetic(config, model.vocab_size, 2, number)
    return stack(source.rows(range(number)))


def rate_of(folder: Path) -> float:
    """Tokens per second of one rank in an earlier run: the median of its steps."""
    started = [event for event in read_lines(folder / "events.jsonl") if event["event"] == "started"]
    steps = [
        record["tokens_per_s"] for record in read_lines(folder / "metrics.jsonl") if "tokens_per_s" in record
    ]
    if not started or not steps:
        raise UserError(f"{folder} holds no steps of a run to take a rate from")
    return median(steps) / started[-1]["world"]
