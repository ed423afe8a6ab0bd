"""`trifold compare`: trains models of the same size on the same rows, measures them alike and draws one
report.

Configs come in, each of a run that is new, started or finished; recipes of one task are compared with each
other. Out comes a folder with report.html, which needs no other file, and a PNG of each figure. Finished runs
are not trained again, so the same command resumes after a stop, and one more recipe adds one more model.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from trifold.finetune.run import open_rows as task_rows
from trifold.finetune.tasks import open_tasks
from trifold.finetune.tasks.scores import SacreBleu, bootstrap_intervals
from trifold.launch.commands.finetune import finetune
from trifold.launch.commands.pretrain import pretrain
from trifold.launch.compare import report
from trifold.launch.compare.measured import Bin, Point, Run, curve
from trifold.launch.compare.probes import ends, maps, opened, reach, speed
from trifold.launch.recipe.reader import resolve
from trifold.launch.recipe.schema import AnyRecipe, FinetuneRecipe, PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import num_parameters
from trifold.pretrain.config.flatten import flatten
from trifold.pretrain.config_changes import differences
from trifold.pretrain.data.rows import RowSource
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.initial_model import load_initial_model
from trifold.pretrain.monitor.run_folder import last_outcome
from trifold.pretrain.run import open_rows as text_rows
from trifold.pretrain.storage.json_files import read_json_object
from trifold.pretrain.storage.jsonl import read_lines

LARGEST = 1.1  # times as many parameters as the smallest
# In what compared recipes may differ.
IGNORED_KEYS = (
    "run",
    "model.",
    "task.crf",
    "optimizer.",
    "schedule.",
    "engine.",
    "checkpoints.",
    "cluster.",
    "scoring.",
)
ELSEWHERE = (
    "run",
    "cluster.",
    "engine.",
    "checkpoints.",
    "scoring.",
    "trackers",
)  # by what no result of a finished run changes
BINS = 6  # of sentence length: each a sixth of the sentences


def compare(
    recipes: Sequence[AnyRecipe], out: Path, sentence: str | None, word: str | None, console: Terminal
) -> Path:
    """Train what is not trained yet, measure, and write the report. Raises UserError where the recipes are
    not comparable.
    """
    report.ready(out)  # this, and what follows, is refused before anything is trained
    if word:
        ends(sentence or "", word)
    comparable(recipes)
    finished = [config for config in recipes if _finished(config)]
    _same_rows(finished)
    for config in recipes:
        if config not in finished:
            console.rule(config.run)
            finetune(config, console) if isinstance(config, FinetuneRecipe) else pretrain(config, console)
    _same_rows(recipes)
    runs = []
    for config in recipes:
        console.print(f"measuring {config.run}", highlight=False)
        runs.append(_measured(config, sentence, word))
    return report.write(out, runs)


def comparable(recipes: Sequence[AnyRecipe]) -> None:
    """Refuse models of one group that differ by more than a tenth in parameters, and recipes that differ in
    what is learned from.
    """
    if not recipes:
        raise UserError("there is no recipe to compare: name some, such as configs/compare/world-*.yaml.")
    for a, b in combinations(recipes, 2):
        if Path(a.run).resolve() == Path(b.run).resolve():
            raise UserError(f"two recipes have the run folder {a.run}: give each its own `run`.")
        if _group(a) != _group(b):
            continue
        if Path(a.run).name == Path(b.run).name:
            raise UserError(
                f"{a.run} and {b.run} end in the same name, which the report knows them by: rename one."
            )
        small, large = sorted(((num_parameters(_shape(r)), r.run) for r in (a, b)), key=lambda pair: pair[0])
        if large[0] > LARGEST * small[0]:
            raise UserError(
                f"{large[1]} has {large[0]:,} parameters and {small[1]} {small[0]:,},"
                f" {large[0] / small[0] - 1:.0%} more:"
                f" models are compared at the same size, up to {LARGEST - 1:.0%}. Change model.dim of one."
            )
        left, right = (flatten(r.model_dump(mode="json")) for r in (a, b))
        left["vocabulary"], right["vocabulary"] = _shape(a).vocab_size, _shape(b).vocab_size
        for key in left | right:
            if not key.startswith(IGNORED_KEYS) and left.get(key) != right.get(key):
                values = f"{left.get(key)!r} in {a.run} and {right.get(key)!r} in {b.run}"
                raise UserError(f"{key} is {values}: models that are compared learn from the same.")


def _group(config: AnyRecipe) -> str:
    return config.task.kind if isinstance(config, FinetuneRecipe) else config.objective.kind


def _shape(config: AnyRecipe) -> ModelConfig:
    return load_initial_model(config.model, Path(config.run))[0]


def _finished(config: AnyRecipe) -> bool:
    """Whether the run is at its end, by this very recipe: a changed one goes to training, which refuses it or
    scores the model anew.
    """
    file = Path(config.run) / "config.yaml"
    if not file.exists() or any(
        not change.key.startswith(ELSEWHERE)
        for change in differences(resolve(file, kind=type(config)), config, config.steps)  # type: ignore[type-var]
    ):
        return False
    end = last_outcome(Path(config.run))
    steps = max((line["step"] for line in read_lines(Path(config.run) / "metrics.jsonl")), default=0)
    if isinstance(config, FinetuneRecipe):
        return end == "scored" and (steps >= config.steps or config.patience > 0)
    return end == "finished" and steps >= config.steps


def _same_rows(recipes: Sequence[AnyRecipe]) -> None:
    """Refuse runs of one group that learned from, or were scored on, unlike rows: their files have changed
    from one run to the other. Families may read the same examples in unlike rows.
    """
    for a, b in combinations(recipes, 2):
        if (_group(a), _shape(a).family) == (_group(b), _shape(b).family):
            left, right = (
                [e for e in read_lines(Path(r.run) / "events.jsonl") if e["event"] == "data"][-1]
                for r in (a, b)
            )
            for key in left.keys() & right.keys() & {"fingerprint", "heldout_fingerprint"}:
                if left[key] != right[key]:
                    raise UserError(
                        f"{a.run} has rows of {key} {left[key]}, and {b.run} of {right[key]}: the files that"
                        " both name (or, in another"
                        " version of Trifold, the way rows are made) have changed in between. Give one"
                        " another `run` folder."
                    )


def _rows(config: AnyRecipe) -> tuple[Any, Any]:
    """The rows that a run learns from at its end, and those held out."""
    if isinstance(config, PretrainRecipe):
        rows, heldout = text_rows(config)
        return rows[-1], heldout
    tokenizer = Tokenizer.open(Path(config.run) / "tokenizer")
    return task_rows(config, open_tasks(config, tokenizer, _shape(config).family), tokenizer)


def _measured(config: AnyRecipe, sentence: str | None, word: str | None) -> Run:
    folder = Path(config.run)
    model, tokenizer = opened(folder), Tokenizer.open(folder / "tokenizer")
    heldout, first = _heldout(config, tokenizer)
    points = curve(folder)
    by_length = _by_length(folder) if _group(config) == "translation" else []
    return Run(
        name=folder.name,
        group=_group(config),
        cell=model.config.cell,
        attends=model.config.cell == "attention" or model.config.alignment != "none",
        on_cpu=config.cluster.gpus_per_worker == 0,
        parameters=num_parameters(model.config),
        steps=config.steps,
        curve=points,
        scores=_scores(folder, points, by_length),
        by_length=by_length,
        reach=reach(model, heldout),
        speed=speed(model.config),
        maps=maps(model, tokenizer, sentence or first, word),
    )


def _heldout(config: AnyRecipe, tokenizer: Tokenizer) -> tuple[RowSource, str]:
    """Held-out rows, and a text of theirs to look at."""
    heldout = _rows(config)[1]
    if isinstance(config, PretrainRecipe):
        row = heldout.row(0)
        return heldout, tokenizer.decode([int(i) for i in row.tokens[row.segments == 1][1:25]])
    lines = read_lines(Path(config.run) / "predictions.jsonl")
    texts = sorted(
        (line["source"] for line in lines if "source" in line), key=lambda text: abs(len(text.split()) - 14)
    )
    return heldout, texts[0] if texts else "She said that it was late."


def _scores(folder: Path, points: list[Point], by_length: list[Bin]) -> dict[str, str]:
    last = points[-1]
    values = {
        "tokens": f"{last.tokens:,}",
        "seconds": f"{last.seconds:,.0f}",
        "CPU seconds": f"{last.cpu_seconds:,.0f}",
    }
    values["held-out nats"] = f"{last.loss:.3f}"
    if (folder / "scores.json").exists():
        scores_file = read_json_object(folder / "scores.json")
        low, high = scores_file["intervals"][scores_file["best"]]
        values[scores_file["best"]] = (
            f"{scores_file['scores'][scores_file['best']]:.2f} ({low:.2f} to {high:.2f})"
        )
    if by_length:
        for which, part in (("shortest", by_length[0]), ("longest", by_length[-1])):
            values[f"BLEU of the {which} sixth"] = f"{part.score:.2f} ({part.low:.2f} to {part.high:.2f})"
    return values


def _by_length(folder: Path) -> list[Bin]:
    """BLEU of the dev sentences, cut by the number of words of their sources into bins of equal size."""
    lines = sorted(read_lines(folder / "predictions.jsonl"), key=lambda line: len(line["source"].split()))
    bleu, bins = SacreBleu("BLEU"), []
    for part in np.array_split(np.arange(len(lines)), BINS):
        chosen = [lines[i] for i in part]
        counts = bleu.statistics(
            [line["prediction"] for line in chosen], [line["references"] for line in chosen]
        )
        low, high = bootstrap_intervals(counts, lambda total: {"bleu": bleu.score(total)}, resamples=200)[
            "bleu"
        ]
        words = float(np.mean([len(line["source"].split()) for line in chosen]))
        bins.append(Bin(words, bleu.score(counts.sum(axis=0)), low, high))
    return bins
