"""The result of a benchmark: rows of plain values become one table, a JSON file and a bar chart."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError

Row = dict[
    str, Any
]  # the first value is its name; numbers keep their precision here and lose it in the table


def machine(device: str, threads: int) -> str:
    """The machine and versions that the figures come from, in a line."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name(0)}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{threads} thread(s) of {names[0] if names else platform.machine()}, {versions}"


def show(console: Terminal, title: str, rows: Sequence[Row], out: Path | None = None) -> None:
    """The table; with `out` also OUT.json and OUT.png."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(format_value(row.get(name)) for name in names))
    (console if console.is_terminal else Terminal(file=console.file, width=160)).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(
            json.dumps({"title": title, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
        drawn = chart(title, rows, out.with_suffix(".png"))
        console.print(f"{out.with_suffix('.json')}{f' and {drawn}' if drawn else ''}", highlight=False)


def format_value(value: Any) -> str:
    """A number with three significant figures; nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def chart(title: str, rows: Sequence[Row], file: Path) -> Path | None:
    """A bar for each row that has the first number of any; None where nothing was measured. Raises UserError
    where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the chart needs matplotlib: pip install 'trifold[report]'") from None
    what = next((name for row in rows for name, value in row.items() if isinstance(value, float)), None)
    bars = [
        (str(next(iter(row.values()))), row[what])
        for row in rows
        if what is not None and isinstance(row.get(what), float)
    ]
    if what is None:
        return None
    figure = Figure(figsize=(10, 1 + 0.4 * len(bars)), layout="constrained")
    axes = figure.subplots()
    peers = any("Trifold" in name for name, _ in bars)  # what is ours stands out among them
    colours = ["#b8bec6" if peers and "Trifold" not in name else "#4878a8" for name, _ in bars]
    drawn = axes.barh([name for name, _ in bars], [value for _, value in bars], color=colours)
    axes.bar_label(drawn, [format_value(value) for _, value in bars], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel(what)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=120)
    return file
