"""The report of a comparison: in, measured runs; out, report.html, which needs no other file, and a PNG of
each picture beside it, and report.json with the numbers that they show.

A run has one line in all pictures. matplotlib is imported in this file only (the extra `report`).
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trifold.modeling.errors import UserError

if TYPE_CHECKING:
    from trifold.launch.compare.measured import Run

Lines = dict[str, dict[str, Any]]  # of each run: colour and dashes
_KINDS = {False: "the decoder begins from one vector", True: "the decoder looks at the whole source"}
_LOOK = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
}
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:.85em}"
    "td{white-space:nowrap}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def ready(out: Path) -> None:
    """Raises UserError or OSError where a report cannot be drawn or written to `out`."""
    _matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    (out / ".writable").touch()
    (out / ".writable").unlink()


def write(out: Path, runs: Sequence["Run"]) -> Path:
    """The report in the folder `out`. Returns the path of report.html."""
    plt = _matplotlib()
    parts = []
    for group in dict.fromkeys(run.group for run in runs):
        members = [run for run in runs if run.group == group]
        lines = _lines(plt, members)
        parts += [f"<h2>{escape(group.capitalize())}</h2>", _table(members)]
        for name, (caption, draw, applies) in PICTURES.items():
            if drawn := [run for run in members if applies(run)]:
                parts.append(
                    _picture(plt, out / f"{group}-{name}.png", caption, lambda: draw(plt, drawn, lines))  # noqa: B023
                )
        for run in members:
            if run.maps:
                caption = (
                    f"What {run.name} attends to: one row per attending token, from white (weight 0) to black"
                    " (weight 1)."
                )
                parts.append(
                    _picture(plt, out / f"{group}-{run.name}-looks.png", caption, lambda: _maps(plt, run))  # noqa: B023
                )
    file = out / "report.html"
    head = (
        "<!doctype html><meta charset=utf-8><title>Trifold: a comparison</title>"
        f"<style>{_STYLE}</style><h1>A comparison</h1>"
    )
    note = (
        "Models of a section were trained on the same rows in the same order and have the same number of"
        " parameters, up to a tenth."
        " A colour is a kind of layer; solid lines attend, dashed ones do not."
    )
    file.write_text("\n".join([head, f"<p>{note}</p>", *parts, ""]), encoding="utf-8")
    (out / "report.json").write_text(
        json.dumps([asdict(run) for run in runs], ensure_ascii=False, indent=1), encoding="utf-8"
    )
    return file


def _lines(plt: Any, runs: Sequence["Run"]) -> Lines:
    """A colour for each kind of layer, dashed where the model does not attend; runs alike in both differ in
    how strong the colour is.
    """
    cells = list(dict.fromkeys(run.cell for run in runs))
    lines: Lines = {}
    for run in runs:
        alike = sum(
            other.name in lines and (other.cell, other.attends) == (run.cell, run.attends) for other in runs
        )
        colour = plt.get_cmap("tab10")(cells.index(run.cell))
        lines[run.name] = {"color": colour, "linestyle": "-" if run.attends else "--", "alpha": 0.6**alike}
    return lines


def _table(runs: Sequence["Run"]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    rows = [["run", "parameters", "steps", *names]]
    rows += [
        [run.name, f"{run.parameters:,}", f"{run.steps:,}", *(run.scores.get(name, "") for name in names)]
        for run in runs
    ]
    cells = [
        "".join(f"<{tag}>{escape(value)}</{tag}>" for value in row)
        for row, tag in zip(rows, ["th"] + ["td"] * len(runs), strict=True)
    ]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _picture(plt: Any, file: Path, caption: str, draw: Callable[[], Any]) -> str:
    figure = draw()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{escape(caption)}" src="data:image/png;base64,{data}"><br>{escape(caption)}</p>'


def _loss(plt: Any, runs: Sequence["Run"], lines: Lines) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    on_cpu = all(run.on_cpu for run in runs)
    for run in runs:
        points = [p for p in run.curve if p.tokens]  # before its first step each model guesses
        losses, seconds = [p.loss for p in points], [p.cpu_seconds if on_cpu else p.seconds for p in points]
        left.plot([p.tokens / 1e6 for p in points], losses, marker=".", label=run.name, **lines[run.name])
        right.plot(seconds, losses, marker=".", **lines[run.name])
    left.set(xlabel="tokens read, millions", ylabel="held-out loss, nats per target")
    right.set(
        xlabel="CPU seconds of training steps, of one process" if on_cpu else "seconds of training steps"
    )
    return _with_legend(figure)


def _by_length(plt: Any, runs: Sequence["Run"], lines: Lines) -> Any:
    """A panel for the models that know their source as one vector, and one for those that look at all of
    it.
    """
    panels = [
        (title, drawn)
        for kind, title in _KINDS.items()
        if (drawn := [run for run in runs if run.attends == kind])
    ]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + 4.75 * len(panels), 4.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (title, drawn) in zip(axes[0], panels, strict=True):
        for i, run in enumerate(drawn):
            shift = (i - (len(drawn) - 1) / 2) * 0.15  # so that intervals stand beside each other
            middle = [b.score for b in run.by_length]
            beyond = [[b.score - b.low for b in run.by_length], [b.high - b.score for b in run.by_length]]
            x = [b.words + shift for b in run.by_length]
            panel.errorbar(
                x, middle, yerr=beyond, marker="o", markersize=4, capsize=2, label=run.name, **lines[run.name]
            )
        panel.set(xlabel="words in the source sentence", title=title)
    axes[0][0].set(ylabel="BLEU, with 95 % intervals", ylim=(0, None))
    return _with_legend(figure)


def _reach(plt: Any, runs: Sequence["Run"], lines: Lines) -> Any:
    figure, axes = _one(plt, "tokens back", "gradient norm, relative to the last token read")
    for run in runs:
        axes.plot(run.reach, label=run.name, **lines[run.name])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yscale("log")
    return _with_legend(figure)


def _speed(plt: Any, runs: Sequence["Run"], lines: Lines) -> Any:
    figure, axes = _one(plt, "tokens in a row", "thousand tokens a CPU second")
    for run in runs:
        axes.plot(
            list(run.speed),
            [rate / 1e3 for rate in run.speed.values()],
            marker="o",
            markersize=4,
            label=run.name,
            **lines[run.name],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(runs[0].speed), [str(length) for length in runs[0].speed])
    axes.set_ylim(bottom=0)
    return _with_legend(figure)


def _maps(plt: Any, run: "Run") -> Any:
    """Each map in a panel of its own, two side by side; a token takes as much room in each."""
    across = min(len(run.maps), 2)
    heights = [max(len(m.rows) for m in run.maps[i : i + across]) for i in range(0, len(run.maps), across)]
    size = (
        across * (0.2 * max(len(m.columns) for m in run.maps) + 1.2),
        sum(0.2 * height + 1.2 for height in heights),
    )
    figure, panels = plt.subplots(
        len(heights),
        across,
        figsize=size,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [h + 6 for h in heights]},
    )
    for axes, shown in zip(panels.flat, run.maps, strict=False):
        axes.imshow(shown.weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        as_it_is: dict[str, Any] = {
            "fontsize": 8,
            "parse_math": False,
        }  # a piece may be "$$", which is no formula
        axes.set_xticks(range(len(shown.columns)), shown.columns, rotation=90, **as_it_is)
        axes.set_yticks(range(len(shown.rows)), shown.rows, **as_it_is)
        axes.set_title(shown.title, fontsize=10, parse_math=False)
        axes.grid(False)
    for axes in panels.flat[len(run.maps) :]:
        axes.set_axis_off()
    return figure


def _one(plt: Any, x: str, y: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _with_legend(figure: Any) -> Any:
    """One legend for all panels, beside them."""
    handles = {
        name: handle
        for axes in figure.axes
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    return figure


PICTURES: dict[
    str, tuple[str, Callable[..., Any], Callable[["Run"], Any]]
] = {  # name: caption, how, which runs have it
    "loss": ("Held-out loss against what was read and against time.", _loss, lambda run: run.curve),
    "length": (
        "The score by the length of the sentence, in bins of as many sentences each.",
        _by_length,
        lambda run: run.by_length,
    ),
    "reach": (
        "How much the last prediction of a text leans on what was read so many tokens before: the norm of"
        " the loss's gradient there.",
        _reach,
        lambda run: run.reach,
    ),
    "speed": (
        "Training speed by the length of rows: forward and backward of as many positions in each batch, in"
        " one thread of this machine.",
        _speed,
        lambda run: run.speed,
    ),
}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'trifold[report]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(_LOOK)
    return plt
