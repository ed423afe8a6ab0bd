"""Draw docs/images/flow.svg: the flow of a run through the packages.    python docs/images/flow.py"""

from pathlib import Path

ROWS = [
    (
        "pretrain/data",
        ["corpus", "tokenizer", "prepare, shards", "packing, row_order", "objectives, collate", "loader"],
    ),
    ("modeling", ["batch", "position, attention", "block", "transformer", "heads"]),
    ("pretrain/engine", ["optimizer", "auto", "engine", "zero/", "spikes"]),
    ("pretrain/checkpoint", ["saving", "format", "lease", "retention"]),
    ("pretrain/publish", ["publish", "parity, verify", "published_folder", "model_card"]),
    ("finetune", ["examples", "tasks", "rows", "evaluation"]),
    ("launch", ["recipe", "commands", "cluster", "jobs", "watch"]),
]
LABELS = {
    "pretrain/data": "text to rows of tokens",
    "modeling": "rows to a loss",
    "pretrain/engine": "one optimizer step over all ranks",
    "pretrain/checkpoint": "state to storage, and back at any number of ranks",
    "pretrain/publish": "a checkpoint to a folder that stock classes load",
    "finetune": "a published folder and examples to a task and its scores",
    "launch": "recipes, Ray, the command line: what starts and watches all of the above",
}
WIDTH, HEIGHT, TOP = 900, 64, 20
FONT = 'font-family="sans-serif"'


def main() -> None:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + HEIGHT * len(ROWS)}" role="img"'
        ' aria-label="From text to scores, one row for each package">',
        f'<rect width="{WIDTH}" height="{TOP + HEIGHT * len(ROWS)}" fill="#ffffff"/>',
    ]
    for row, (package, files) in enumerate(ROWS):
        y = TOP + row * HEIGHT
        parts.append(
            f'<text x="12" y="{y + 12}" {FONT} font-size="14" font-weight="bold" fill="#1a1a1a">'
            f"{package}</text>"
        )
        parts.append(
            f'<text x="180" y="{y + 12}" {FONT} font-size="13" fill="#555555">{LABELS[package]}</text>'
        )
        width = (WIDTH - 24 - 16 * (len(files) - 1)) / len(files)
        for column, file in enumerate(files):
            x = 12 + column * (width + 16)
            parts.append(
                f'<rect x="{x:.0f}" y="{y + 20}" width="{width:.0f}" height="28" rx="5" fill="#e8eef7"'
                ' stroke="#4a6fa5"/>'
                f'<text x="{x + width / 2:.0f}" y="{y + 39}" {FONT} font-size="12" text-anchor="middle"'
                f' fill="#1a1a1a">{file}</text>'
            )
            if column and row < 2:  # one file hands to the next; below, files stand side by side
                parts.append(
                    f'<path d="M{x - 14:.0f} {y + 34} h9 m-4 -4 l4 4 l-4 4" stroke="#4a6fa5" fill="none"/>'
                )
    Path(__file__).with_suffix(".svg").write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
