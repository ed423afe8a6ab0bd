"""`trifold plan`: what a recipe will need, estimated before anything starts; and after a run, compared with
what it did need.

A config, the machines and the throughput of a device come in: measured here in seconds, taken from an earlier
run, or given. Out come a table and RUN/plan.json. Memory and checkpoint size are exact counts
(pretrain/engine/memory_estimate.py); times are as good as the throughput.
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
from trifold.pretrain.storage.json_files import read_json_object
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
    """The machines of a run, and what is known about them."""

    ranks: int
    device: str
    memory: float  # bytes of a device
    tokens_per_second: float | None = None  # of one device; None: steps and saves are measured here
    write_bytes_per_second: float = 1e9  # of one rank, where they are not
    price_per_hour: float = 0.0  # of one device
    hours_per_failure: float = GPU_HOURS_PER_FAILURE  # of one device
    restart_seconds: float = 60.0  # from a failure to the first step after it, reading the checkpoint aside


def plan(config: PretrainRecipe, machine: Machine, console: Terminal) -> dict[str, Any]:
    """Estimate, write RUN/plan.json and print a table."""
    results = predict(auto.resolve_precision(config, machine.device), machine)
    file = Path(config.run) / "plan.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"{config.run} on {machine.ranks} {machine.device} rank(s)", show_header=False)
    for name, value in results.items():
        table.add_row(_label(name), shown(name, value))
    console.print(table)
    if results["memory_peak_bytes"] > machine.memory:
        console.print(
            f"It does not fit: a rank needs {shown('_bytes', results['memory_peak_bytes'])} and has"
            f" {shown('_bytes', machine.memory)}. Set"
            f" micro_rows to {results['largest_micro_rows']} at most, engine.recompute=true, or a higher"
            " engine.zero_stage.",
            style="yellow",
        )
    return results


class Rates(NamedTuple):
    """Seconds per rank, and bytes of its process beyond tensors."""

    micro: float
    optimizer: float
    save_waits: float
    save_written: float
    save_read: float
    process: int | None  # None: not known, as no process was seen


def predict(config: PretrainRecipe, machine: Machine) -> dict[str, Any]:
    """The estimates by name; the end of a name is its unit."""
    if config.engine.fp8:
        check_device(machine.device)
    model_config = load_initial_model(config.model, Path(config.run))[0]
    stages = resolve_stages(config)
    stage = stages[-1]
    micros = (_batch(config, model_config, each.micro_rows, each.row_length) for each in stages)
    recompute = auto.needs_recompute(
        config, model_config, micros, machine.ranks, machine.device, machine.memory
    )
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"recompute": recompute})})
    micro = _batch(config, model_config, stage.micro_rows)
    memory = memory_estimate.estimate_memory(config, model_config, micro, machine.ranks, machine.device)
    checkpoint_bytes = memory_estimate.checkpoint_bytes(config, model_config)
    tokens = stage.micro_rows * (
        micro.tokens.shape[1] + (0 if micro.source is None else micro.source.shape[1])
    )
    tokens_per_rank = tokens / config.engine.sequence_parallel  # positions of a rank
    rates = (
        _measured_rates(config, model_config, machine)
        if machine.tokens_per_second is None
        else _given_rates(machine, tokens_per_rank, checkpoint_bytes)
    )
    micros_per_rank = -(-stage.micros // config.engine.data_parallel_size(machine.ranks))
    exchanged_bytes = memory_estimate.sequence_parallel_bytes(config, model_config, micro, machine.device)
    step = micros_per_rank * rates.micro + rates.optimizer
    process = rates.process or 0
    peak, fits = memory.total + process, machine.memory - process
    return {
        "parameters": num_parameters(model_config),
        "recompute": recompute,
        **{f"memory_{name}_bytes": size for name, size in memory._asdict().items()},
        "memory_process_bytes": rates.process,
        "memory_peak_bytes": peak,
        "largest_micro_rows": memory_estimate.largest_micro(
            config,
            model_config,
            lambda n: _batch(config, model_config, n),
            machine.ranks,
            machine.device,
            fits,
        ),
        "micros_of_a_rank": micros_per_rank,
        "sent_bytes_of_a_rank_and_step": memory_estimate.gradient_bytes(
            config, model_config, machine.ranks, micros_per_rank
        )
        + micros_per_rank * exchanged_bytes,
        "step_seconds": step,
        "positions_per_second": stage.micros * tokens / step,
        "checkpoint_bytes": checkpoint_bytes,
        "checkpoint_seconds": rates.save_written,
        **_run_totals(config, machine, step, rates),
    }


def compare_to_measured(config: PretrainRecipe) -> Table | None:
    """Compare RUN/plan.json with what the run's metrics and events measured, and write that there too; None
    where nothing was planned. Raises UserError for a damaged plan.
    """
    file = Path(config.run) / "plan.json"
    if not file.exists():
        return None
    planned = read_json_object(file)
    results = measured(file.parent)
    file.write_text(json.dumps({**planned, "measured": results}, indent=1) + "\n", encoding="utf-8")

    table = Table(title="planned and measured")
    for heading in ("", "planned", "measured", "off by"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in results.items():
        estimate = planned.get(name)
        if isinstance(estimate, int | float):
            difference = f"{100 * (estimate / value - 1):+.0f} %"
            table.add_row(_label(name), shown(name, estimate), shown(name, value), difference)
    return table


def measured(folder: Path) -> dict[str, float]:
    """What a run's own files say of what a plan predicts: medians of its steps and of its saves, the peak of
    its first rank.
    """
    steps = [record for record in read_lines(folder / "metrics.jsonl") if "seconds" in record]
    events = read_lines(folder / "events.jsonl")
    results: dict[str, list[float]] = {
        "memory_peak_bytes": [max((record.get("peak_bytes", 0) for record in steps), default=0)],
        "step_seconds": [record["seconds"] for record in steps],
        "checkpoint_bytes": [e["bytes"] for e in events if e["event"] == "save_committed"],
        "checkpoint_seconds": [e["seconds"] for e in events if e["event"] == "save_committed"],
    }
    return {name: median(values) for name, values in results.items() if values and max(values) > 0}


def _label(name: str) -> str:
    """A name as a row label; bytes have their unit in the value."""
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


def _run_totals(config: PretrainRecipe, machine: Machine, step: float, rates: Rates) -> dict[str, float]:
    """Time, price and what failures cost. A save is written beside the steps, so saves cannot follow each
    other faster than that.
    """
    between = machine.hours_per_failure * 3600 / machine.ranks
    restart = machine.restart_seconds + rates.save_read
    interval = max(memory_estimate.best_interval(rates.save_waits, between), rates.save_written)
    lost = memory_estimate.lost_fraction(config.checkpoints.every * step, rates.save_waits, restart, between)
    hours = config.steps * step / 3600 * (1 + lost)
    return {
        "run_hours": hours,
        "run_price": hours * machine.ranks * machine.price_per_hour,
        "hours_between_failures": between / 3600,
        "restart_seconds": restart,
        "lost_share": lost,
        "best_checkpoints_every_steps": max(1, round(interval / step)),
        "lost_share_at_best": memory_estimate.lost_fraction(interval, rates.save_waits, restart, between),
    }


def _given_rates(machine: Machine, tokens: float, checkpoint_bytes: int) -> Rates:
    """From the rates of a device that is not here."""
    assert machine.tokens_per_second is not None
    written = checkpoint_bytes / machine.ranks / machine.write_bytes_per_second
    process = (
        0 if machine.device == "cuda" else None
    )  # of a GPU's memory it holds nothing that torch does not count
    return Rates(tokens / machine.tokens_per_second, 0.0, COPY_SHARE * written, written, written, process)


def _measured_rates(config: PretrainRecipe, model_config: ModelConfig, machine: Machine) -> Rates:
    """A few steps of one and of two micros on this machine, and a few saves beside the run folder, by one
    rank.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device here to measure: give --tokens-per-second (of one device), or --like a"
            " run's folder"
        )
    rank_info = RankInfo.single(
        "cuda" if machine.device == "cuda" else "cpu",
        config.cluster.threads(max(1, config.cluster.workers)),
    )
    alone = config.engine.model_copy(update={"sequence_parallel": 1})
    one = config.model_copy(update={"step_rows": 2 * config.micro_rows, "engine": alone})
    batches = rows.micros(config, model_config.vocab_size, 2, 2, rank_info.device)
    racer = contenders.ours("both", one, model_config, [batches[:1], batches], rank_info, 0.0)
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
    counted = memory_estimate.estimate_memory(one, model_config, batches[0].batch, 1, machine.device).total
    process = max(0, racer.engine.meter.peak() - counted) if machine.device == "cpu" else 0
    costs = save.measure(racer.engine, config, Path(config.run))
    per_rank = micro / config.engine.sequence_parallel
    return Rates(
        per_rank,
        one_micro - micro,
        costs.waits / machine.ranks,
        costs.written / machine.ranks,
        costs.verified + costs.read,
        process,
    )


def _batch(
    config: PretrainRecipe, model_config: ModelConfig, number: int, row_length: int | None = None
) -> Batch:
    """Rows of the recipe's shape, or of another length."""
    if row_length is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"row_length": row_length})})
    source = rows.synthetic(config, model_config.vocab_size, 2, number)
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
