"""`trifold bench train`: the throughput of a recipe on this machine, next to Hugging Face classes of its
shape in the same run.

A config comes in. Out comes one row per contender: target tokens per second, MFU by one formula
(modeling/flops.py), peak memory, seconds. One process is one rank; the recipe's micro-batch and step sizes,
engine and precision apply.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from trifold.launch.bench import contenders
from trifold.launch.bench.contenders import Contender
from trifold.launch.bench.profile import profile
from trifold.launch.bench.report import Row, machine, show
from trifold.launch.bench.rows import micros
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.config import ModelConfig
from trifold.modeling.flops import train_flops_per_row
from trifold.pretrain.data.objectives import ObjectiveMixture
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.auto import resolve_precision
from trifold.pretrain.initial_model import load_initial_model
from trifold.pretrain.monitor.metrics import peak_flops

DIFFERENT = 4  # steps with rows of their own, read in turn


def bench(
    config: PretrainRecipe,
    rank_info: RankInfo,
    console: Terminal,
    *,
    documents: int,
    peers: bool,
    eager: bool,
    steps: int,
    warmup: int,
    out: Path | None,
    trace: Path | None,
) -> None:
    """Measure and show. `trace`: a file for a profile of our own steps, made after them."""
    config = resolve_precision(config, rank_info.device)
    racing = field(config, rank_info, documents, (False,) * peers + (True,) * (peers and not eager))
    contenders.race(racing, rank_info, warmup, steps)
    shape = f"rows of {config.data.row_length}, " + (
        f"about {documents} documents each" if documents else "each one whole document"
    )
    rows = f"{config.micro_rows} x {config.step_rows // config.micro_rows} rows a step"
    title = f"{config.run}: {config.objective.kind}, {shape}, {rows},"
    show(
        console,
        f"{title} {config.engine.precision}\n{machine(rank_info.device, rank_info.threads)}",
        results(racing, config, rank_info),
        out,
    )
    first = racing[0]
    if trace is not None and first.step is not None and first.model is not None:
        profile(first.step, first.model, rank_info, trace, console)


def field(
    config: PretrainRecipe, rank_info: RankInfo, documents: int, peers: Sequence[bool]
) -> list[Contender]:
    """Ours, and for each of `peers` (compiled or not) the stock class of the same shape; for packed rows it
    gets the documents padded.
    """
    model_config = load_initial_model(config.model, Path(config.run))[0]
    per_step = max(1, config.step_rows // config.micro_rows)
    packed = contenders.steps_of(
        micros(config, model_config.vocab_size, documents, DIFFERENT * per_step, rank_info.device), per_step
    )
    flops = flops_of_step(config, model_config)
    racing = [
        contenders.ours(
            f"Trifold, ZeRO-{config.engine.zero_stage}", config, model_config, packed, rank_info, flops
        )
    ]
    for compiled in peers:
        name = f"{contenders.stock_name(model_config)}, {'compiled' if compiled else 'eager'}" + (
            ", padded" if documents else ""
        )
        make = contenders.same_shape(model_config)
        racing.append(
            contenders.stock(
                name, make, config, packed, rank_info, flops, compiled=compiled, padded=documents > 0
            )
        )
    return racing


def flops_of_step(config: PretrainRecipe, model_config: ModelConfig) -> float:
    """By the one formula, for the rows as they stand, padding included."""
    words = contenders.Words(model_config.vocab_size)
    room = ObjectiveMixture(config.objective, words, config.data.row_length).capacity
    rows = config.micro_rows * max(1, config.step_rows // config.micro_rows)
    return rows * train_flops_per_row(model_config, room.tokens, room.source)


def results(racing: Sequence[Contender], config: PretrainRecipe, rank_info: RankInfo) -> list[Row]:
    """A row each; the ratio is ours over theirs in tokens per second."""
    peak = peak_flops(rank_info, torch.float32 if config.engine.precision == "fp32" else torch.bfloat16)
    return [result(contender, racing[0], peak) for contender in racing]


def result(contender: Contender, ours: Contender, peak: float | None) -> Row:
    if not contender.seconds:
        return {"": contender.name, "note": contender.failed}
    seconds, cpu = median(contender.seconds), median(contender.cpu_seconds)
    return {
        "": contender.name,
        "tokens/s": contender.tokens / seconds,
        "ours, times": ours.tokens / median(ours.seconds) / (contender.tokens / seconds)
        if ours.seconds
        else None,
        **({} if peak is None else {"MFU %": 100 * contender.flops / seconds / peak}),
        "peak MiB": contender.peak / 2**20,
        "ms a step": 1e3 * seconds,
        "CPU ms a step": 1e3 * cpu,
        "first step s": contender.first_seconds,
    }
