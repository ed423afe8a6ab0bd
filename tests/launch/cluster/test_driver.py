"""Real Ray, real processes, a small stand-in for training that steps, records, saves, stops, and can be
killed.
"""

import json
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from ray.util import placement_group_table

from tests.launch.cluster.stand_in import kill_when, kinds, recipe, stand_in
from tests.launch.command_line import start, trifold, until, write_tiny
from trifold.launch.cluster import capacity, connection, driver
from trifold.launch.cluster.attempt import Failure
from trifold.launch.cluster.timing import Timing
from trifold.launch.cluster.worker import is_peer_failure
from trifold.launch.commands.run import stopping
from trifold.modeling.errors import UserError
from trifold.pretrain.storage.jsonl import append_line, read_lines


def descendants(pid: int) -> list[int]:
    """The process ids of all children of a process, and of theirs."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children + [below for child in children for below in descendants(child)]


QUICK = Timing(resize=0.2, stack=1.0, monitor=0.3, peer_failure=2.0)


def test_killed_worker_is_restarted_from_the_newest_checkpoint(ray_cluster, tmp_path):
    kill_when(tmp_path, 12)
    driver.run(recipe(tmp_path), stand_in(), timing=QUICK)
    events = read_lines(tmp_path / "events.jsonl")
    events = [event for event in events if event["event"] != "placed"]
    assert [event["event"] for event in events] == ["started", "failed", "restarting", "started", "finished"]
    assert events[1]["rank"] == 1 and "was killed" in events[1]["error"]
    assert events[3]["step"] >= 10 and events[3]["step"] % 5 == 0
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 40


def test_a_run_on_this_machine_listens_on_its_loopback_alone(ray_cluster, tmp_path):
    def train(recipe, place):
        import torch.distributed as dist

        if place.init_method:
            dist.init_process_group("gloo", place.init_method, rank=place.rank, world_size=place.world)
        dist.barrier()
        mine = {
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        }
        for line in [
            line.split()
            for kind in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
        ]:
            if (
                line[3] == "0A" and f"socket:[{line[9]}]" in mine
            ):  # listening; addresses are hexadecimal words, as they lie in memory
                append_line(
                    tmp_path / "listening.jsonl", {"loopback": line[1].split(":")[0].endswith("0100007F")}
                )
        dist.barrier()

    driver.run(recipe(tmp_path), train)
    found = [record["loopback"] for record in read_lines(tmp_path / "listening.jsonl")]
    assert found and all(found)


def test_without_restarts_left_the_verdict_says_who_why_what_is_saved_and_how_to_go_on(ray_cluster, tmp_path):
    with pytest.raises(UserError) as verdict:
        driver.run(recipe(tmp_path, max_restarts=0), stand_in(crash=True), timing=QUICK)
    said = str(verdict.value)
    assert (
        "rank 1 of 2 failed" in said
        and "RuntimeError: something broke" in said
        and "No checkpoint was saved yet." in said
    )
    assert said.endswith(f"trifold pretrain {tmp_path}/config.yaml")
    assert kinds(tmp_path) == ["started", "failed"]
    assert (
        re.search(r"at starting, before its first step|at pretending, in step 1, rows 1 to 1", said)
        and "Last log lines:" in said
    )
    assert said in (tmp_path / "failures.log").read_text()


def test_a_rank_that_sleeps_for_ever_is_named_with_its_stack_and_ended(ray_cluster, tmp_path):
    with pytest.raises(UserError) as verdict:
        driver.run(recipe(tmp_path, max_restarts=0, step_timeout=6), stand_in(sleep_at=7), timing=QUICK)
    said = str(verdict.value)
    assert (
        "rank 1 of 2 failed on" in said
        and "no rank made progress for 6 s; this one is furthest behind" in said
    )
    assert "It was at pretending, in step 7, rows 7 to 7." in said and "rank 0 on" in said
    innermost = said.split("innermost call first")[1].splitlines()[1]
    assert "stand_in.py" in innermost and innermost.endswith("in train") and "step-00000005" in said
    assert "all_reduce" in (tmp_path / "workers" / "rank-00000.stack").read_text()
    assert kinds(tmp_path) == ["started", "hanging", "failed"]


def test_a_host_that_comes_is_taken_in_and_one_that_goes_is_left_both_after_a_save(
    ray_cluster, tmp_path, monkeypatch
):
    room = [1]
    monkeypatch.setattr(capacity, "free_workers", lambda *_: capacity.FreeWorkers(room[0], room[0]))

    def events(kind: str) -> list[dict[str, object]]:
        return [event for event in read_lines(tmp_path / "events.jsonl") if event["event"] == kind]

    def come_and_go() -> None:
        while not read_lines(tmp_path / "metrics.jsonl"):
            time.sleep(0.02)
        room[0] = 2
        while len(events("started")) < 2:
            time.sleep(0.02)
        os.kill(json.loads((tmp_path / "workers" / "rank-00001.json").read_text())["pid"], signal.SIGTERM)

    threading.Thread(target=come_and_go, daemon=True).start()
    driver.run(recipe(tmp_path, min_workers=1, steps=60), stand_in(), timing=QUICK)
    assert [event["world"] for event in events("started")] == [1, 2, 2]
    assert [event["step"] for event in events("stopped")] == [event["step"] for event in events("started")][
        1:
    ]
    assert not events("failed") and read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 60


def test_a_run_begins_beside_another_with_what_is_free_and_takes_the_rest_in_when_that_ends(
    ray_cluster, tmp_path, monkeypatch
):
    connection.join()
    import ray

    @ray.remote
    class Other:
        """Another run's worker."""

    remote: Any = Other
    other = remote.options(num_cpus=ray.cluster_resources()["CPU"] - 1).remote()
    ray.get(other.__ray_ready__.remote())
    with pytest.raises(UserError, match=r"2 workers need 2 CPUs \(\d present, 1 of them free\): 1 fit"):
        driver.run(recipe(tmp_path), stand_in(), timing=QUICK)

    def end_it() -> None:
        while not read_lines(tmp_path / "metrics.jsonl"):
            time.sleep(0.02)
        ray.kill(other)

    threading.Thread(target=end_it, daemon=True).start()
    driver.run(recipe(tmp_path, min_workers=1, steps=100), stand_in(), timing=QUICK)
    assert [
        event["world"] for event in read_lines(tmp_path / "events.jsonl") if event["event"] == "started"
    ] == [1, 2]
    assert "failed" not in kinds(tmp_path)


def test_a_refusal_inside_a_worker_is_told_as_it_is_and_not_tried_again(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"^the disk is full: 0 bytes left$"):
        driver.run(recipe(tmp_path), stand_in(refuse_at=3), timing=QUICK)
    assert kinds(tmp_path) == ["started"]


def test_sigterm_asks_every_rank_to_save_and_return(ray_cluster, tmp_path):
    import ray

    ray.shutdown()  # so that it starts inside, where it takes SIGTERM for itself

    def terminate() -> None:
        while not read_lines(tmp_path / "metrics.jsonl"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with stopping(tmp_path) as stop:
        driver.run(recipe(tmp_path), stand_in(), stop_requested=stop.requested, timing=QUICK)
    assert stop.number == signal.SIGTERM
    last = read_lines(tmp_path / "metrics.jsonl")[-1]["step"]
    assert last < 40 and (tmp_path / "checkpoints" / f"step-{last:08d}-g0001" / "commit.json").exists()
    assert not (tmp_path / "stop").exists()


def test_more_than_the_cluster_has_is_refused_with_both_numbers(ray_cluster, tmp_path):
    connection.join()
    with pytest.raises(
        UserError,
        match=r"900 workers need 900 CPUs \(\d+ present, \d+ of them free\): \d+"
        r" fit.*cluster.wait_at_start=600",
    ):
        driver.run(recipe(tmp_path, workers=900), stand_in(), timing=QUICK)


def test_a_run_that_saves_between_its_failures_outlives_more_of_them_than_max_restarts(tmp_path, monkeypatch):
    lost = Failure(0, RuntimeError("lost"), died=False)
    saves = iter([False, True, True, False, False])
    monkeypatch.setattr(driver, "join", lambda *_: None)
    monkeypatch.setattr(capacity, "free_workers", lambda *_: capacity.FreeWorkers(2, 2))

    def ends(*_: object) -> Failure:
        if next(saves):
            append_line(tmp_path / "events.jsonl", {"event": "save_committed"})
        return lost

    monkeypatch.setattr(driver, "attempt", ends)
    with pytest.raises(UserError, match=r"1 of 1 restarts used: RuntimeError: lost"):
        driver.run(recipe(tmp_path, max_restarts=1), stand_in(), timing=QUICK)
    assert kinds(tmp_path).count("failed") == 4 and next(saves) is False


@pytest.mark.parametrize(
    ("limit", "told"), [(30.0, ["failed", "waiting", "restarting"]), (0.6, ["failed", "waiting"])]
)
def test_below_its_least_workers_a_run_waits_for_hosts_until_its_limit(tmp_path, monkeypatch, limit, told):
    ends, rooms = iter([Failure(0, RuntimeError("lost"), died=False), None]), iter([2, 1, 1, 1, 2])
    monkeypatch.setattr(
        driver, "join", lambda *_: None
    )  # no Ray and no training: what the driver makes of hosts and ends
    monkeypatch.setattr(capacity, "free_workers", lambda *_: capacity.FreeWorkers(fit := next(rooms), fit))
    for which in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(capacity.ray, which, lambda: {"CPU": 1.0})
    monkeypatch.setattr(driver, "attempt", lambda *_: next(ends))
    if limit > 1:
        driver.run(recipe(tmp_path, wait_after_loss=limit), stand_in(), timing=QUICK)
    else:
        with pytest.raises(
            UserError,
            match=r"(?s)2 workers need 2 CPUs .* after 0.6 s: 1 fit.*rank 0 of 2 failed.*lost.*Continue"
            r" with: trifold",
        ):
            driver.run(recipe(tmp_path, wait_after_loss=limit), stand_in(), timing=QUICK)
    assert kinds(tmp_path) == told


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "no-port"])
def test_an_address_where_nobody_answers_is_refused_at_once(tmp_path, address):
    with pytest.raises(UserError, match=f"no Ray cluster answers at {address} "):
        connection.join(address)


def test_a_job_server_given_for_a_head_is_told_apart_at_once():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(
        UserError,
        match=r"that is a web server, such as the job server \(trifold submit\); a head listens at port"
        r" 6379",
    ):
        connection.join(f"127.0.0.1:{server.server_port}")
    server.shutdown()


def test_a_head_of_another_release_and_what_is_no_head_are_told_in_one_sentence(monkeypatch):
    from ray._private.utils import check_version_info
    from ray.exceptions import RpcError

    def of_another_release(**_: object) -> None:  # what ray.init asks once it has reached a head
        check_version_info({"ray_version": "2.9.3", "python_version": "3.10.1"}, "node 10.0.0.1:6379")

    def unheard(
        **_: object,
    ) -> None:  # what Ray says after 40 s; test_jobs.py meets a head that refuses its token
        raise RpcError("Timed out while waiting for GCS to become available.")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr("ray._raylet.GcsClient", lambda **_: None)
        monkeypatch.setattr("ray.init", of_another_release)
        with pytest.raises(
            UserError,
            match=r"it runs Ray 2\.9\.3 and Python 3\.10\.1, and here are Ray 2\.\S+ and Python 3\.\S+:"
            r" install the same",
        ):
            connection.join(address)
        monkeypatch.setattr("ray._raylet.GcsClient", unheard)
        with pytest.raises(UserError, match=r": what listens there is not a Ray head\.$"):
            connection.join(address)


def test_a_driver_that_was_superseded_reports_and_does_not_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "join", lambda *_: None)
    monkeypatch.setattr(capacity, "free_workers", lambda *_: capacity.FreeWorkers(2, 2))
    checks = iter([None, UserError("the run was taken over")])

    def check_claim() -> None:
        if (error := next(checks)) is not None:
            raise error

    monkeypatch.setattr(driver, "attempt", lambda *_: Failure(0, RuntimeError("ended"), died=True))
    with pytest.raises(UserError, match=r"(?s)^the run was taken over\nrank 0 of 2 failed.*Continue with"):
        driver.run(recipe(tmp_path), stand_in(), check_claim=check_claim, timing=QUICK)
    assert kinds(tmp_path) == ["failed"]


@pytest.mark.proof
def test_a_killed_controller_leaves_no_placement_group_and_the_run_restarts(ray_cluster, tmp_path):
    def kill_controller() -> None:
        while len(read_lines(tmp_path / "metrics.jsonl")) < 7:
            time.sleep(0.02)
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if b"ray::TrainController" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    threading.Thread(target=kill_controller, daemon=True).start()
    driver.run(recipe(tmp_path, wait_after_loss=20), stand_in(), timing=QUICK)
    assert kinds(tmp_path) == ["started", "failed", "restarting", "started", "finished"]
    states = [group["state"] for group in placement_group_table().values()]
    assert states.count("REMOVED") == len(states)


@pytest.mark.proof
@pytest.mark.parametrize("killed", ["raylet", "gcs_server"])
def test_when_ray_ends_the_driver_there_is_a_report_and_the_command_that_continues(tmp_path, killed):
    process = start(write_tiny(tmp_path), "pretrain", "tiny.yaml", "steps=1000000", "--workers", "1")
    until(lambda: len(read_lines(tmp_path / "run" / "metrics.jsonl")) > 3, process)
    for child in descendants(process.pid):
        with suppress(OSError):
            if f"/{killed}" in Path(f"/proc/{child}/cmdline").read_text().split("\0")[0]:
                os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=150)
    assert process.returncode != 0
    assert "Continue with: trifold pretrain run/config.yaml" in err, out + err
    assert any(event["event"] == "failed" for event in read_lines(tmp_path / "run" / "events.jsonl"))
    steps = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] + 5
    resumed = trifold(tmp_path, "pretrain", "run/config.yaml", "--workers", "0", f"steps={steps}")
    assert resumed.code == 0, resumed.err


def test_rays_start_is_tried_a_second_time(monkeypatch):
    tries = []

    def fail(*_: object, **__: object) -> None:
        tries.append(1)
        raise TimeoutError("the raylet did not start within 30 s")

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(connection.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="Ray could not start on this machine: the raylet did not start"):
        connection.join()
    assert len(tries) == 2


def test_the_clusters_token_is_readable_by_its_owner_alone(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError):
        connection.join("127.0.0.1:1")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


def test_a_lost_peer_is_recognised_by_the_type_and_place_of_its_error():
    import torch.distributed as dist

    def collective() -> None:
        raise RuntimeError("[gloo] Connection closed by peer")

    inside = FunctionType(
        collective.__code__, {**globals(), "__name__": "torch.distributed.distributed_c10d"}
    )

    def error_of(function) -> BaseException:
        try:
            function()
        except Exception as error:
            return error
        raise AssertionError

    assert is_peer_failure(error_of(inside))
    assert is_peer_failure(ConnectionResetError()) and is_peer_failure(dist.DistBackendError("NCCL"))
    assert not is_peer_failure(error_of(collective))  # says so, and is not
    assert not is_peer_failure(OSError("No space left on the connection's device"))
