"""Runs as jobs of a real cluster of several hosts, asked from outside of it as a person would; and job
servers that cannot be used.
"""

import re
import select
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from tests.hosts import Hosts, missing
from tests.launch.jobs.cluster_runs import following, step, trifold, until, write_recipe
from trifold.launch.jobs.jobs import Jobs
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.jsonl import append_line, read_lines


@pytest.mark.proof
def test_a_run_is_submitted_left_alone_followed_stopped_with_a_save_and_resumed(hosts, tmp_path):
    recipe, run = write_recipe(tmp_path / "left", 100_000), tmp_path / "left" / "run-left"
    with following(hosts, "submit", str(recipe)) as client:
        until(lambda: step(run) > 5, 120)
        again = trifold(hosts, "submit", str(recipe))
        assert again.returncode == 1 and "is already being trained (running)" in again.stderr
        client.send_signal(signal.SIGKILL)
    before = step(run)
    until(lambda: step(run) > before + 20, 60)

    with following(hosts, "logs", "run-left", "-f") as client:
        until(lambda: step(run) > before + 40, 60)
        until(
            lambda: select.select([client.stdout], [], [], 0)[0], 60
        )  # it follows: before, Python imports, and may lose a Ctrl-C
        client.send_signal(signal.SIGINT)
        said = client.communicate(timeout=30)[0]
        assert (
            "2 worker(s) started" in said
            and "Detached; run-left keeps running. Reattach: trifold logs run-left -f" in said
        )
        assert client.returncode == 0
    assert re.search(r"run-left: running\n  step \d+ · loss", trifold(hosts, "status").stdout)

    stopped = trifold(hosts, "stop", "run-left")
    assert stopped.returncode == 0, stopped.stderr
    last = step(run)
    assert read_lines(run / "events.jsonl")[-1]["event"] == "stopped" and valid_folders(DiskPath(run))[
        -1
    ].name.startswith(f"step-{last:08d}")
    assert f"step-{last:08d}-g0001" in trifold(hosts, "status", "run-left").stdout
    assert "is not running" in trifold(hosts, "stop", "run-left").stderr

    with following(hosts, "resume", "run-left"):
        until(lambda: step(run) > last + 5, 120)
    assert [event["step"] for event in read_lines(run / "events.jsonl") if event["event"] == "resumed"] == [
        last
    ]
    assert trifold(hosts, "stop", "run-left").returncode == 0


def test_a_wrong_token_and_an_unknown_run_are_one_sentence_each(tmp_path):
    if why := missing():
        pytest.skip(why)
    (tmp_path / "token").write_text("not it")
    with Hosts(0) as hosts:
        said = trifold(hosts, "status", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
        assert said.returncode == 1 and f"{hosts.jobs} does not accept this token" in said.stderr
        said = trifold(
            hosts, "doctor", "--address", hosts.address, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")
        )
        assert (
            said.returncode == 1
            and "it does not accept this token" in said.stderr
            and said.stderr.count("\n") == 1
        ), said.stderr
        said = trifold(hosts, "logs", "nobody")
        assert (
            said.returncode == 1
            and f"{hosts.jobs} has no run nobody. The runs there: none yet." in said.stderr
        )


def test_every_fact_of_a_run_can_be_read_on_80_columns(tmp_path, monkeypatch):
    jobs, console = object.__new__(Jobs), Terminal(width=80, record=True, file=StringIO())
    jobs.address = "http://10.0.0.1:8265"
    job = SimpleNamespace(
        metadata={"name": "a-run-with-a-name", "run": str(tmp_path)}, status=JobStatus.STOPPED
    )
    monkeypatch.setattr(jobs, "_jobs", lambda: [job])
    append_line(tmp_path / "events.jsonl", {"event": "started", "world": 64})
    append_line(tmp_path / "metrics.jsonl", {"step": 123456, "loss": 3.412, "tokens_per_s": 123456.0})
    scores = {"novels/heldout_loss": 3.456, "wnut17/f1": 31.2}
    append_line(tmp_path / "metrics.jsonl", {"step": 123000, "checkpoint": "step-00123000-g0003", **scores})
    jobs.status(None, console)
    said = console.export_text()
    assert (
        all(len(line) <= 80 for line in said.splitlines()) and "a-run-with-a-name: stopped by Ray\n" in said
    )
    facts = "step 123456 · loss 3.412 · tokens/s 123.5k · workers 64 · restarts 0 · checkpoint none"
    assert f"{facts} · scores step 123000: novels/heldout_loss 3.456, wnut17/f1 31.200" in " ".join(
        said.split()
    )


def test_an_address_where_nobody_takes_jobs_is_refused_within_seconds():
    for address, why in (
        ("http://127.0.0.1:1", "Connection refused"),
        ("127.0.0.1:1", "that is not an http:// address"),
    ):
        with pytest.raises(
            UserError,
            match=rf"^no Ray cluster takes jobs at {address}: {why}\. Give its head's job server, such as"
            r" http://",
        ):
            Jobs(address)


def test_another_ray_release_is_refused_with_both_versions():
    class Old(BaseHTTPRequestHandler):
        """A job server of another release: all that its client asks first."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                b'{"version": "4", "ray_version": "2.9.3", "ray_commit": "", "session_name": ""}'
            )

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(
        UserError, match=r"runs Ray 2\.9\.3, and here is 2\.\d+\.\d+: install the same release on both sides"
    ):
        Jobs(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
