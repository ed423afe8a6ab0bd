"""The report of a comparison: in, measured runs; out, report.html, which needs no other file, and a PNG of each picture beside it.

A run has one colour in all pictures. matplotlib is imported in this file only (the extra `report`).
"""

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.config import Refused

if TYPE_CHECKING:
    from launch.compare import Run

_STYLE = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"  # noqa: E501


def write(out: Path, runs: Sequence["Run"]) -> Path:
    """The report in the folder `out`. Returns the path of report.html."""
    plt = _matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for group in dict.fromkeys(run.group for run in runs):
        members = [run for run in runs if run.group == group]
        colours = {run.name: plt.get_cmap("tab10")(i % 10) for i, run in enumerate(members)}
        parts += [f"<h2>{escape(group.capitalize())}</h2>", _table(members)]
        for name, (caption, draw, wanted) in PICTURES.items():
            if drawn := [run for run in members if wanted(run)]:
                parts.append(_picture(plt, out / f"{group}-{name}.png", caption, lambda: draw(plt, drawn, colours)))  # noqa: B023
        for run in members:
            if run.maps:
                caption = (
                    f"Where {run.name} looks: a row for each token that looks, white where it does not (0), black where there alone (1)."
                )
                parts.append(_picture(plt, out / f"{group}-{run.name}-looks.png", caption, lambda: _maps(plt, run)))  # noqa: B023
    file = out / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>Trifold: a comparison</title><style>{_STYLE}</style><h1>A comparison</h1>"
    said = "Models of a section were trained on the same rows in the same order and have the same number of parameters, up to a tenth."
    file.write_text("\n".join([head, f"<p>{said}</p>", *parts, ""]), encoding="utf-8")
    return file


def _table(runs: Sequence["Run"]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    rows = [["run", "parameters", "steps", *names]]
    rows += [[run.name, f"{run.parameters:,}", f"{run.steps:,}", *(run.scores.get(name, "") for name in names)] for run in runs]
    cells = [
        "".join(f"<{tag}>{escape(value)}</{tag}>" for value in row) for row, tag in zip(rows, ["th"] + ["td"] * len(runs), strict=True)
    ]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _picture(plt: Any, file: Path, caption: str, draw: Callable[[], Any]) -> str:
    figure = draw()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{escape(caption)}" src="data:image/png;base64,{data}"><br>{escape(caption)}</p>'


def _loss(plt: Any, runs: Sequence["Run"], colours: dict[str, Any]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for run in runs:
        style = {"color": colours[run.name], "marker": ".", "label": run.name}
        left.plot([p.tokens / 1e6 for p in run.curve], [p.loss for p in run.curve], **style)
        right.plot([p.seconds for p in run.curve], [p.loss for p in run.curve], **style)
    left.set(xlabel="tokens read, millions", ylabel="held-out loss, nats per target")
    right.set(xlabel="seconds of training steps")
    right.legend()
    return figure


def _by_length(plt: Any, runs: Sequence["Run"], colours: dict[str, Any]) -> Any:
    figure, axes = _one(plt, "words in the source sentence", "BLEU, with 95 % intervals")
    for i, run in enumerate(runs):
        shift = (i - (len(runs) - 1) / 2) * 0.12  # so that intervals stand beside each other
        middle = [b.score for b in run.by_length]
        beyond = [[b.score - b.low for b in run.by_length], [b.high - b.score for b in run.by_length]]
        x = [b.words + shift for b in run.by_length]
        axes.errorbar(x, middle, yerr=beyond, color=colours[run.name], marker="o", markersize=4, capsize=2, label=run.name)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _reach(plt: Any, runs: Sequence["Run"], colours: dict[str, Any]) -> Any:
    figure, axes = _one(plt, "tokens back", "gradient norm, relative to the last token read")
    for run in runs:
        axes.plot(run.reach, color=colours[run.name], label=run.name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yscale("log")
    axes.legend()
    return figure


def _speed(plt: Any, runs: Sequence["Run"], colours: dict[str, Any]) -> Any:
    figure, axes = _one(plt, "tokens in a row", "tokens a second, forward and backward")
    for run in runs:
        axes.plot(list(run.speed), list(run.speed.values()), color=colours[run.name], marker="o", markersize=4, label=run.name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(runs[0].speed), [str(length) for length in runs[0].speed])
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _maps(plt: Any, run: "Run") -> Any:
    """Each map in a panel of its own, large where there is one."""
    across = min(len(run.maps), 2)
    down = -(-len(run.maps) // across)
    side = max(3.5, 0.28 * max(max(len(m.columns), len(m.rows)) for m in run.maps))
    figure, panels = plt.subplots(down, across, figsize=(side * across, side * down), squeeze=False, layout="constrained")
    for axes, shown in zip(panels.flat, run.maps, strict=False):
        axes.imshow(shown.weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(shown.columns)), shown.columns, rotation=90, fontsize=8)
        axes.set_yticks(range(len(shown.rows)), shown.rows, fontsize=8)
        axes.set_title(shown.title, fontsize=10)
    for axes in panels.flat[len(run.maps) :]:
        axes.set_axis_off()
    return figure


def _one(plt: Any, x: str, y: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


PICTURES: dict[str, tuple[str, Callable[..., Any], Callable[["Run"], Any]]] = {  # name: caption, how, which runs have it
    "loss": ("Held-out loss against what was read and against time.", _loss, lambda run: run.curve),
    "length": ("The score by the length of the sentence, in bins of as many sentences each.", _by_length, lambda run: run.by_length),
    "reach": (
        "How much the last prediction of a text leans on what was read so many tokens before: the norm of the loss's gradient there.",
        _reach,
        lambda run: run.reach,
    ),
    "speed": ("Training speed by the length of rows, as many positions in each batch, on this machine.", _speed, lambda run: run.speed),
}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise Refused("drawing needs matplotlib: pip install 'trifold[report]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
