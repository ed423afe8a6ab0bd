"""The bar tells what ranks write, on a terminal and in a log, whatever lines are cut off or missing."""

import io
import re
import time
from pathlib import Path

from trifold.launch.terminal import Terminal
from trifold.launch.watch.progress import ProgressWatcher
from trifold.pretrain.storage.jsonl import append_line

STEP = {"loss": 2.5, "seconds": 0.5, "tokens_per_s": 12345.0, "mfu": 0.314}


def watched(folder: Path, terminal: bool, write) -> str:
    """What a console of 100 columns shows of a run of 20 steps that `write` writes."""
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=terminal, width=100, color_system=None)
    with ProgressWatcher(folder, 20, console, interval=0.0):
        write()
        time.sleep(0.8)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_a_log_shows_step_loss_speed_mfu_time_left_and_events(tmp_path):
    def write() -> None:
        append_line(tmp_path / "events.jsonl", {"event": "started", "world": 2, "zero_stage": 1})
        append_line(tmp_path / "metrics.jsonl", {"step": 10, **STEP})
        append_line(tmp_path / "metrics.jsonl", {"step": 10, "heldout_loss": 2.25, "bits_per_byte": 1.5})
        append_line(tmp_path / "events.jsonl", {"event": "failed", "rank": 1, "error": "killed [hard]"})

    shown = watched(tmp_path, False, write)
    assert "2 worker(s) started at ZeRO 1" in shown
    assert "rank 1 failed: killed [hard]" in shown
    assert (
        "step 10/20 · loss 2.500 · 12.3k tokens/s · MFU 31 % · 0:05 left · held out 2.250 (1.500 bits/byte)"
        in shown.splitlines()
    )


def test_a_terminal_shows_one_bar_and_ends_with_one_line(tmp_path):
    shown = watched(tmp_path, True, lambda: append_line(tmp_path / "metrics.jsonl", {"step": 7, **STEP}))
    assert "7/20" in shown and "loss 2.500 · 12.3k tokens/s" in shown
    assert shown.splitlines()[-1].startswith("step 7/20")


def test_an_old_runs_lines_are_not_told_again(tmp_path):
    append_line(tmp_path / "metrics.jsonl", {"step": 3, **STEP})
    assert "step 3/20" not in watched(tmp_path, False, lambda: None)


def test_half_lines_and_missing_facts_do_not_end_the_run(tmp_path):
    def write() -> None:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "los')
        append_line(tmp_path / "metrics.jsonl", {"step": 5, **STEP})
        append_line(tmp_path / "events.jsonl", {"event": "resumed"})

    shown = watched(tmp_path, False, write)
    assert "step 5/20" in shown and "continuing from ?" in shown
