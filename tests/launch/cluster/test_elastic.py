"""A run whose hosts are lost and come back, on a head and three hosts: no row is lost, the losses stay, and
every host is used.
"""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts import Hosts
from tests.launch.jobs.cluster_runs import step, until, write_recipe
from trifold.pretrain.checkpoint.lease import all_folders, is_valid
from trifold.pretrain.monitor import heartbeat
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.jsonl import read_lines

OBJECTIVES = [
    ("decoder", {"kind": "causal"}),
    ("encoder", {"kind": "masked"}),
    ("encoder-decoder", {"kind": "spans", "density": 0.3}),
]


def recipe_of(folder: Path, which: int, **cluster: Any) -> Path:
    """A recipe of one of the families, without an end, in fp32."""
    file = write_recipe(folder, 100_000, threads_per_worker=1, **cluster)
    values = yaml.safe_load(file.read_text())
    family, objective = OBJECTIVES[which % len(OBJECTIVES)]
    values["model"] |= {"family": family, "dropout": 0.1, "embed_scale": 4.0}
    # at the rate of other tests, 1e-2, and with embeddings near zero, whose norms make spikes of gradients, a
    # rounding grows ten thousandfold in 300 steps, whatever made it
    values |= {"objective": objective, "engine": {"precision": "fp32"}, "optimizer": {"lr": 1e-3}}
    file.write_text(yaml.safe_dump(values))
    return file


@contextmanager
def driving(hosts: Hosts, recipe: Path) -> Iterator[subprocess.Popen[str]]:
    """`trifold pretrain` on the head; its output goes to driver.txt beside the recipe."""
    command = [
        "ip",
        "netns",
        "exec",
        "trifold-host0",
        sys.executable,
        "-m",
        "trifold.launch.cli",
        "pretrain",
        str(recipe),
        "--address",
        hosts.address,
    ]
    with (recipe.parent / "driver.txt").open("w") as out:
        process = subprocess.Popen(
            command, env=hosts.environment, stdout=out, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["event"] == kind]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and bool(Path(f"/proc/{pid}/cmdline").read_bytes())


def losses(run: Path) -> dict[int, tuple[float, str]]:
    return {
        line["step"]: (line["loss"], line["rows_hash"])
        for line in read_lines(run / "metrics.jsonl")
        if "loss" in line
    }


def undisturbed(recipe: Path, steps: int) -> dict[int, tuple[float, str]]:
    """The same recipe in one process on this machine, for at least as many steps."""
    run = recipe.parent / "straight"
    command = [
        sys.executable,
        "-m",
        "trifold.launch.cli",
        "pretrain",
        str(recipe),
        f"run={run}",
        "cluster.workers=0",
        "cluster.min_workers=null",
    ]
    with (recipe.parent / "straight.txt").open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    until(lambda: step(run) >= steps or process.poll() is not None, 250)
    process.terminate()
    process.wait()
    return losses(run)


@pytest.mark.proof
@pytest.mark.parametrize("again", range(5))
@pytest.mark.parametrize("way", ["killed", "cut"])
def test_a_lost_host_costs_no_row_and_a_returned_one_is_used_again(
    way: str, again: int, hosts: Hosts, tmp_path: Path
) -> None:
    recipe, run = (
        recipe_of(tmp_path / f"{way}{again}", again, workers=3, min_workers=2),
        tmp_path / f"{way}{again}" / f"run-{way}{again}",
    )
    with driving(hosts, recipe) as driver:
        until(lambda: step(run) > 25, 120)
        first = heartbeat.read(run)
        rank = (
            0 if way == "cut" else random.Random(again).randrange(3)
        )  # the rank that commits, on a host that lives
        lost = int(first[rank].host.removeprefix("host-"))
        gone = time.time()
        hosts.kill(lost) if way == "killed" else hosts.cut(lost)
        until(lambda: len(events(run, "stepping")) == 2, 120)
        assert events(run, "failed")[0]["rank"] == rank and events(run, "placed")[1]["workers"] == 2
        until(lambda: not alive(first[rank].pid), 30)  # it ends by itself, though nobody reaches it

        if way == "cut":
            hosts.mend(lost)
            hosts.kill(lost)  # what Ray left there
        hosts.start(lost)
        until(lambda: len(events(run, "stepping")) == 3, 120)
        assert events(run, "placed")[2]["workers"] == 3 and f"host-{lost}" in [
            beat.host for beat in heartbeat.read(run).values()
        ]
        stopped, resumed = events(run, "stopped")[0]["step"], events(run, "resumed")[-1]["step"]
        assert stopped == resumed and len(events(run, "failed")) == 1
        reached = step(run)
        until(lambda: step(run) > reached + 20, 120)
        (run / "stop").touch()
        assert driver.wait(60) == 143
    _say(run, way, gone)
    assert all(is_valid(folder) for folder in all_folders(DiskPath(run)) if (folder / "commit.json").exists())
    mine = losses(run)
    straight = undisturbed(recipe, max(mine))
    assert [mine[step][1] for step in sorted(mine)] == [straight[step][1] for step in sorted(mine)]
    largest = max(abs(loss / straight[step][0] - 1) for step, (loss, _) in mine.items())
    print(f"{len(mine)} steps, largest relative difference of losses {largest:.1e}")
    assert largest <= 1e-5


@pytest.mark.proof
def test_a_host_that_is_to_be_taken_away_is_left_after_a_save(hosts: Hosts, tmp_path: Path) -> None:
    recipe, run = (
        recipe_of(tmp_path / "drained", 1, workers=3, min_workers=2),
        tmp_path / "drained" / "run-drained",
    )
    with driving(hosts, recipe) as driver:
        until(lambda: step(run) > 25, 120)
        beat = heartbeat.read(run)[1]
        lost = int(beat.host.removeprefix("host-"))
        notice = (
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot",
            "--deadline-remaining-seconds=100",
        )
        told = hosts.on(
            0, "ray", "drain-node", f"--address={hosts.address}", f"--node-id={beat.node}", *notice
        )
        assert told.returncode == 0, told.stdout + told.stderr
        until(lambda: len(events(run, "stepping")) == 2, 90)
        assert beat.host not in [other.host for other in heartbeat.read(run).values()] and not events(
            run, "failed"
        )
        assert events(run, "stopped")[0]["step"] == events(run, "resumed")[-1]["step"]
        (run / "stop").touch()
        assert driver.wait(60) == 143
    assert "2 workers fit now: the 3 save, and 2 go on" in (recipe.parent / "driver.txt").read_text()
    hosts.kill(lost)
    hosts.start(lost)  # for the tests after this


SLEEPS = """
import sys
from trifold.launch.cluster import driver
from trifold.launch.recipe.reader import resolve
from trifold.modeling.errors import UserError
from trifold.pretrain import run

def train(recipe, place):
    import time
    from trifold.pretrain.engine.engine import Engine
    step = Engine.train_step

    def sleeps(self, *given):
        if place.rank == 1 and self.optimizer_step == 12:
            time.sleep(1e6)
        return step(self, *given)

    Engine.train_step = sleeps
    run.train(recipe, place)

recipe = resolve(sys.argv[1])
run.prepare(recipe, 1, lambda what, done: None)
try:
    driver.run(recipe, train, sys.argv[2])
except UserError as refusal:
    sys.exit(str(refusal))
"""


@pytest.mark.proof
def test_a_rank_that_sleeps_for_ever_is_named_with_its_stack(hosts: Hosts, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "sleeps", 0, workers=3, max_restarts=0, step_timeout=10)
    command = [sys.executable, "-c", SLEEPS, str(recipe), hosts.address]
    done = subprocess.run(
        ["ip", "netns", "exec", "trifold-host0", *command],
        env=hosts.environment,
        capture_output=True,
        text=True,
    )
    print(done.stderr)
    assert done.returncode == 1
    assert re.search(
        r"^rank 1 of 3 failed on host-\d \(process \d+\), 0 of 0 restarts used: no rank made progress"
        r" for 10 s",
        done.stderr,
    )
    assert re.search(r"It was at agreeing on a step, in step 13, rows 72 to 77\.", done.stderr)
    assert re.search(r'innermost call first.*\n    File "<string>", line \d+ in sleeps\n', done.stderr)
    assert (
        re.search(r"rank 0 on host-\d: at .*, in step 13, rows 72 to 77", done.stderr)
        and "trifold pretrain" in done.stderr
    )


@pytest.mark.proof
def test_a_rank_that_the_kernel_kills_for_memory_is_named(hosts: Hosts, tmp_path: Path) -> None:
    recipe, run = (
        recipe_of(tmp_path / "memory", 1, workers=3, max_restarts=0),
        tmp_path / "memory" / "run-memory",
    )
    group = Path("/sys/fs/cgroup/memory/trifold-test")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("4M")
    except OSError as error:
        pytest.skip(f"no memory cgroups here: {error}")
    try:
        with driving(hosts, recipe) as driver:
            until(lambda: step(run) > 10, 120)
            beat = heartbeat.read(run)[2]
            (group / "cgroup.procs").write_text(str(beat.pid))
            assert driver.wait(90) == 1
        said = (recipe.parent / "driver.txt").read_text()
        print(said)
        assert (
            f"rank 2 of 3 failed on {beat.host} (process {beat.pid})" in said
            and "by the kernel for lack of memory" in said
        )
        assert (
            re.search(r"It was at .*, in step \d+, rows \d+ to \d+\.", said)
            and "Continue with: trifold pretrain" in said
        )
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), 30)
        group.rmdir()


def _say(run: Path, way: str, gone: float) -> None:
    """The seconds of each part, for LOG.md."""
    failed, placed, stepping, resizing = (
        events(run, kind) for kind in ("failed", "placed", "stepping", "resizing")
    )
    print(
        f"\n{run.name}: {way}: noticed {failed[0]['time'] - gone:.1f} s, placed"
        f" {placed[1]['time'] - failed[0]['time']:.1f} s, stepping"
        f" {stepping[1]['time'] - placed[1]['time']:.1f} s; taken in: placed"
        f" {placed[2]['time'] - resizing[0]['time']:.1f} s, stepping"
        f" {stepping[2]['time'] - placed[2]['time']:.1f} s; because {failed[0]['error']}"
    )
