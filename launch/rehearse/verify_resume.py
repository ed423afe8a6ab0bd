"""`trifold verify-resume`: does this recipe resume exactly? A short run undisturbed is compared with the same
run under kill -9 at random moments.

A recipe comes in. Out come RUN/verify-resume/ with three short fp32 runs, a table of the kills, and a
verdict. `straight` is not disturbed. `same` is killed and resumes with as many workers at the same ZeRO
stage: rows and losses must be bit for bit equal. `moved` resumes with other workers or at another stage after
each kill: the same rows, losses within 1e-5 relative. A kill is aimed by what the run writes (a step done, a
save started, an evaluation due); where it really happened is read from what the run had written by then.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from rich.table import Table

from trifold.finetune import run as finetuning
from trifold.launch.recipe.changes import reconcile_run_folder
from trifold.launch.recipe.reader import resolve_any
from trifold.launch.recipe.schema import AnyRecipe, PretrainRecipe
from trifold.launch.rehearse.processes import Ranks, Train
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain import run as pretraining
from trifold.pretrain.checkpoint.lease import newest_generation
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.jsonl import read_lines

EVERY = 3  # steps between saves, and between evaluations
WINDOW = 2 * EVERY  # steps in which one kill falls
CLOSE = 1e-5  # relative, between losses in fp32 on other workers or at other stages
TRAIN: dict[str, Train] = {"pretrain": pretraining.train, "finetune": finetuning.train}


class Leg(NamedTuple):
    """One attempt of a run, on so many workers at this ZeRO stage, and what is killed in it: this rank, when
    the run is at `moment` of `step`, after `delay` of the time that a step takes. The last attempt of a run
    is left alone.
    """

    run: str
    workers: int
    stage: Literal[1, 2, 3]
    moment: Literal["step", "save", "evaluation"] | None = None
    step: int = 0
    rank: int = 0
    delay: float = 0.0


class Difference(NamedTuple):
    """Between a run and the straight one."""

    rows: list[int]  # the steps whose rows differ, or that only one of the two took
    largest: float  # relative, between losses, of training and held out


def verify_resume(recipe: str, changes: list[str], kills: int, seed: int, console: Terminal) -> None:
    """Rehearse a recipe's continuation. Raises UserError where a killed run is not the straight one."""
    config = resolve_any(recipe, changes)
    home = Path(config.run) / "verify-resume"
    shutil.rmtree(home, ignore_errors=True)
    short = {
        name: resolve_any(recipe, [*changes, *_short(config, home, name, kills)])
        for name in ("straight", "same", "moved")
    }
    legs = draw_legs(config, kills, seed)
    table = Table(
        title=f"{config.run}: {kills} kills (seed {seed}) in runs of {short['straight'].steps} steps"
    )
    for column in ("run", "workers", "ZeRO", "from step", "rank killed", "aimed at", "fell in"):
        table.add_column(column)
    for leg in legs:
        one = short[leg.run].model_copy(
            update={"engine": short[leg.run].engine.model_copy(update={"zero_stage": leg.stage})}
        )
        if not (home / leg.run).exists():
            _prepare(one, console)
        fell = _trained(one, leg, home / "straight")
        row = (leg.run, str(leg.workers), str(leg.stage), str(_began(home / leg.run)))
        table.add_row(
            *row, *((str(leg.rank), f"{leg.moment} {leg.step}", fell) if leg.moment else ("-", "-", fell))
        )
        console.print(
            f"{leg.run}, {leg.workers} workers at ZeRO {leg.stage}: {fell}", style="dim", highlight=False
        )
    console.print(table)
    wrong = [
        name
        for name, most in (("same", 0.0), ("moved", CLOSE))
        if not _equal(home / name, home / "straight", most, console)
    ]
    if wrong:
        raise UserError(
            f"{config.run} does not resume exactly: see the differences of {' and '.join(wrong)}; the runs"
            f" are in {home}."
        )
    console.print(f"{config.run} resumes exactly.", style="green", highlight=False)


def draw_legs(config: AnyRecipe, kills: int, seed: int) -> list[Leg]:
    """The straight run; half of the kills (or one more) for `same`, the others for `moved`; each in its own
    window of steps.
    """
    draw = random.Random(seed)
    sharing = config.engine.sequence_parallel
    most = max(2, config.cluster.workers) // sharing * sharing
    worlds = range(sharing, most + 1, sharing)
    stages = (1, 2) if config.engine.fp8 else (1, 2, 3)
    usual = (most, config.engine.zero_stage)
    legs = [Leg("straight", *usual)]
    for run, count in (("same", kills - kills // 2), ("moved", kills // 2)):
        setup: tuple[int, Any] = usual
        for number in range(count):
            moment: Any = draw.choice(("step", "save", "evaluation"))
            step = WINDOW * number + (
                draw.randint(2, WINDOW) if moment == "step" else EVERY * draw.randint(1, WINDOW // EVERY)
            )
            legs.append(Leg(run, *setup, moment, step, draw.randrange(setup[0]), draw.random()))
            if run == "moved":
                setup = draw.choice(
                    [(workers, stage) for workers in worlds for stage in stages if (workers, stage) != setup]
                )
        legs.append(Leg(run, *setup))
    return legs


def differences(straight: Path, other: Path) -> Difference:
    """What a run differs in from the straight one; the last line of a step counts."""
    ours, theirs = _losses_and_rows(straight), _losses_and_rows(other)
    keys = sorted(ours.keys() | theirs.keys())
    rows = [
        step
        for step, name in keys
        if name == "rows_hash" and ours.get((step, name)) != theirs.get((step, name))
    ]
    pairs = [(ours.get(key, math.nan), theirs.get(key, math.nan)) for key in keys if key[1] != "rows_hash"]
    relative = [abs(b - a) / (abs(a) or 1.0) for a, b in pairs]
    return Difference(rows, max(math.inf if math.isnan(value) else value for value in relative))


def _short(config: AnyRecipe, home: Path, name: str, kills: int) -> Iterator[str]:
    """The changes that make a recipe short: few steps, saves and evaluations every few, the data and the
    tokenizer shared.
    """
    early = len(config.stages) if isinstance(config, PretrainRecipe) else 0
    steps = WINDOW * (kills - kills // 2 + 1) + EVERY * early
    yield from (
        f"run={_text(home / name)}",
        "checkpoints.storage=null",
        f"steps={steps}",
        f"evaluate_every={EVERY}",
        f"checkpoints.every={EVERY}",
        "engine.precision=fp32",
    )
    yield from (f"stages.{number}.steps={EVERY}" for number in range(early))
    yield f"schedule.warmup_steps={min(config.schedule.warmup_steps, steps // 4)}"
    yield f"schedule.decay_steps={min(config.schedule.decay_steps, steps // 4)}"
    if isinstance(config, PretrainRecipe):
        yield f"data.cache={_text(config.data.cache or Path(config.run) / 'shards')}"
    else:
        yield from ("patience=0", f"evaluate_examples={min(config.evaluate_examples, 20)}")
    if name != "straight":
        yield f"tokenizer.path={_text(home / 'straight' / 'tokenizer')}"


def _text(path: str | Path) -> str:
    """A path as a value of an override, whatever characters it has: YAML reads JSON's strings."""
    return json.dumps(str(path), ensure_ascii=False)


def _prepare(config: AnyRecipe, console: Terminal) -> None:
    reconcile_run_folder(config)
    with console.status(f"preparing {config.run}"):
        if isinstance(config, PretrainRecipe):
            pretraining.prepare(config, 1, lambda what, done: None)
        else:
            finetuning.prepare(config, lambda what, done: None)


def _trained(config: AnyRecipe, leg: Leg, straight: Path) -> str:
    """One attempt, to its end or its kill; where that fell. Raises UserError where it ended otherwise."""
    run = Path(config.run)
    generation, log = newest_generation(DiskPath(run)) + 1, run / "ranks.log"
    with Ranks(config, TRAIN[config.command], leg.workers, log) as ranks:
        if leg.moment is not None:
            while ranks.alive and not _reached(leg, run, generation):
                time.sleep(0.005)
            time.sleep(
                leg.delay
                * median(
                    line["seconds"] for line in read_lines(straight / "metrics.jsonl") if "seconds" in line
                )
            )
            if ranks.kill(leg.rank):
                ranks.wait(5)  # the others lose their connection; who does not is ended with the group
                return _fell(run, generation)
        codes = ranks.wait()
    if any(codes):
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise UserError(
            f"{config.run}: ranks that nobody killed ended with {codes}; {log} ends with: {''.join(last)}"
        )
    return "its end" if leg.moment is None else "nothing: it had ended"


def _reached(leg: Leg, run: Path, generation: int) -> bool:
    """Whether the attempt has come to the moment that is aimed at, or is past it."""
    metrics, events = _of(run, "metrics", generation), _of(run, "events", generation)
    if leg.moment == "save":
        return any(event["event"] == "save_started" and event["step"] >= leg.step for event in events)
    if leg.moment == "evaluation":
        return any(
            "loss" in line and line["step"] >= leg.step and line["step"] % EVERY == 0 for line in metrics
        )
    return any("loss" in line and line["step"] >= leg.step - 1 for line in metrics)


def _fell(run: Path, generation: int) -> str:
    """What the attempt was doing when it died."""
    metrics, events = _of(run, "metrics", generation), _of(run, "events", generation)
    last = max((line["step"] for line in metrics if "loss" in line), default=None)
    scored = {line["step"] for line in metrics if "heldout_loss" in line}
    saves = [event for event in events if event["event"] in ("save_started", "save_committed")]
    if last is None:
        doing = ["its start"]
    elif last % EVERY == 0 and last not in scored:
        doing = [f"the evaluation at {last}"]
    else:
        doing = [f"step {last + 1}"]
    if saves and saves[-1]["event"] == "save_started":
        doing.append(f"the save of {saves[-1]['step']}")
    return " and ".join(doing)


def _began(run: Path) -> int:
    """The step from which the newest attempt went on."""
    return max(
        (
            event["step"]
            for event in _of(run, "events", newest_generation(DiskPath(run)))
            if event["event"] == "resumed"
        ),
        default=0,
    )


def _of(run: Path, name: str, generation: int) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / f"{name}.jsonl") if line["generation"] == generation]


def _losses_and_rows(run: Path) -> dict[tuple[int, str], Any]:
    """Losses and row hashes by step and name."""
    lines = read_lines(run / "metrics.jsonl")
    return {
        (line["step"], name): line[name]
        for line in lines
        for name in ("loss", "rows_hash", "heldout_loss")
        if name in line
    }


def _equal(run: Path, straight: Path, most: float, console: Terminal) -> bool:
    """Print a run's verdict: whether it is the straight one."""
    difference = differences(straight, run)
    expected = "to the last bit" if most == 0 else f"within {most:g}"
    equal = not difference.rows and difference.largest <= most
    rows = f"other rows at steps {difference.rows}" if difference.rows else "the same rows"
    message = (
        f"{run.name}: {rows}, losses differ by up to {difference.largest:.1e} relative"
        f" (promised: equal {expected})"
    )
    console.print(message, style="green" if equal else "red", highlight=False, soft_wrap=True)
    return equal
