"""The command as a person meets it: real processes, what they print, and how they exit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trifold.launch.demo.world import write_world
from trifold.pretrain.storage.jsonl import read_lines

TINY = """
model: {family: decoder, vocab_size: 500, dim: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2,
  head_dim: 16, mlp_dim: 64, max_positions: 64}
data: {sources: [{path: world/train.txt}], heldout: [{path: world/heldout.txt}], row_length: 64}
objective: {kind: causal}
optimizer: {lr: 1e-3}
run: run
steps: 4000
step_rows: 2
micro_rows: 1
evaluate_every: 4000
evaluate_rows: 2
cluster: {workers: 0, threads_per_worker: 1}
"""


@pytest.fixture
def place(tmp_path) -> Path:
    write_world(tmp_path / "world", train=300, heldout=20)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from trifold.launch.cli import main; main()",
        *arguments,
    ]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_storage_where_a_run_of_that_name_stands_takes_no_other_and_does_not_forget_a_renamed_one(place):
    def pretrain(*arguments: str) -> tuple[int, str]:
        process = start(
            place, "pretrain", "tiny.yaml", "steps=2", f"checkpoints.storage={place / 'store'}", *arguments
        )
        said = process.communicate(timeout=120)[1]
        return process.returncode, " ".join(said.split())

    assert pretrain("run=a/base")[0] == 0
    code, said = pretrain("run=b/base", "seed=7")
    assert code == 1 and "store/base is a run of another recipe" in said and "seed: 0 there, 7 here" in said
    (place / "a/base").rename(place / "a/other")
    code, said = pretrain("run=a/other")
    assert code == 1 and "has trained 2 steps" in said and "Give the folder back its name" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "tiny.yaml", "optimizer.lrr=1"],
            "there is no key `optimizer.lrr`; did you mean `optimizer.lr`?",
        ),
        (["pretrain", "none.yaml"], "there is no recipe none.yaml"),
        (
            ["pretrain", "tiny.yaml", "--address", "127.0.0.1:1", "cluster.workers=1"],
            "no Ray cluster answers at 127.0.0.1:1",
        ),
        (["pretrain", "tiny.yaml", "data.sources.0.path=nowhere.txt"], "nowhere.txt"),
        (["pretrain", "tiny.yaml", "run=tiny.yaml"], "File exists (tiny.yaml)"),
        (["publish", "nowhere", "--out", "out"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
        (["generate", "nowhere", "text"], "nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_1_without_a_traceback(place, arguments, message):
    process = start(place, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in err and "Traceback" not in err + out
    assert err.startswith("trifold: ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_exits_with_its_signal_and_the_run_goes_on_from_there(place, number, code):
    process = start(place, "pretrain", "tiny.yaml")
    while not any(record["step"] > 2 for record in read_lines(place / "run" / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "Continue with: trifold pretrain run/config.yaml" in out
    stopped = read_lines(place / "run" / "events.jsonl")[-1]
    assert stopped["event"] == "stopped"

    process = start(place, "pretrain", "run/config.yaml", f"checkpoints.keep_last={1}", "evaluate_every=5000")
    while not any(event["event"] == "resumed" for event in read_lines(place / "run" / "events.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    resumed = [event for event in read_lines(place / "run" / "events.jsonl") if event["event"] == "resumed"]
    assert resumed[0]["step"] == stopped["step"]
