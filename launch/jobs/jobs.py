"""Runs as jobs of a Ray cluster: submitted, followed, stopped with a save, resumed. This process may end at
any time; the job goes on.

In: a recipe and the address of the cluster's job server (http://HEAD:8265, token by Ray's own
RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token). Out: a job that runs `trifold pretrain` or `finetune` on the head,
named after its run folder. How a run stands is read from that folder, which the cluster and whoever asks must
share; whether its job lives, from Ray.
"""

import asyncio
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from rich.padding import Padding
from rich.text import Text

from trifold.launch.jobs import node_facts
from trifold.launch.jobs.findings import before_submit
from trifold.launch.recipe.reader import CLONE, resolve_any, write
from trifold.launch.recipe.schema import AnyRecipe
from trifold.launch.terminal import Terminal
from trifold.launch.watch.progress import run_status
from trifold.modeling.errors import UserError

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read by Ray when it is imported
import ray
import ray.exceptions
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

CODE = ("modeling", "pretrain", "finetune", "launch", "configs")  # what `--code` ships
ENDED = {
    JobStatus.SUCCEEDED: "finished",
    JobStatus.STOPPED: "stopped by Ray",
    JobStatus.FAILED: "ended with an error",
}


class Jobs:
    """The job server at `address`. Raises UserError where nobody answers, the token is wrong, or another Ray
    release runs there.
    """

    def __init__(self, address: str) -> None:
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address = (
            address  # Ray would prefer one that is set to what it is given
        )
        try:
            requests.head(address, timeout=5)  # Ray itself would wait for minutes
            self._client = JobSubmissionClient(address)
        except (requests.RequestException, ConnectionError) as error:
            raise UserError(
                f"no Ray cluster takes jobs at {address}: {_cause(error)}. Give its head's job server, such"
                " as http://10.0.0.1:8265."
            ) from error
        except ray.exceptions.AuthenticationError as error:
            raise UserError(
                f"{address} does not accept this token: put the cluster's into ~/.ray/auth_token, or name"
                " its file in RAY_AUTH_TOKEN_PATH."
            ) from error
        there = self._client._server_ray_version  # private: what the constructor has just asked for
        if there != ray.__version__:
            raise UserError(
                f"{address} runs Ray {there}, and here is {ray.__version__}: install the same release on"
                " both sides."
            )

    def submit(self, config: AnyRecipe, code: bool = False) -> str:
        """Start (or continue) a run; returns its name. `code`: with this working tree, not the Trifold that
        is installed there.
        """
        run = Path(config.run).resolve()
        earlier = [job for job in self._jobs() if job.metadata["name"] == run.name]
        if other := [job for job in earlier if job.metadata["run"] != str(run)]:
            raise UserError(
                f"{self.address} has a run {run.name} already, in {other[-1].metadata['run']}: give this one"
                " another `run` folder."
            )
        if alive := [job for job in earlier if not job.status.is_terminal()]:
            self._already(run, alive[-1].status)
        self._fit(run, code)
        with _shipped(code) as folder:
            write(config.model_copy(update={"run": str(run)}), folder / "recipe.yaml")
            try:
                self._client.submit_job(
                    submission_id=run.name
                    if not earlier
                    else f"{run.name}-{len(earlier) + 1}",  # Ray takes an id once
                    entrypoint=_trifold(f"{config.command} $shipped/recipe.yaml --address $RAY_ADDRESS"),
                    runtime_env={"working_dir": str(folder)},
                    metadata={"name": run.name, "run": str(run)},
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    self._already(run, JobStatus.PENDING)
                raise
        return run.name

    def follow(self, name: str, console: Terminal) -> None:
        """Show a run's log as it grows, its progress as one line on a terminal, until its job ends or Ctrl-C
        detaches from it.

        Raises UserError when the job did not end well.
        """
        job = self._find(name)
        try:
            asyncio.run(_shown(self._client.tail_job_logs(job.submission_id), console))
        except KeyboardInterrupt:
            ways = self._command("logs", name, "-f"), self._command("stop", name)
            return console.print(
                "{} goes on without you. Back to it: {}    End it: {}".format(name, *ways), **_PLAIN
            )
        status = self._client.get_job_status(job.submission_id)
        if status != JobStatus.SUCCEEDED:
            raise UserError(
                f"{name} {ENDED.get(status, status)}. Continue with: {self._command('resume', name)}"
            )

    def logs(self, name: str, console: Terminal) -> None:
        """What a run's newest job has said so far."""
        console.print(self._client.get_job_logs(self._find(name).submission_id), end="", **_PLAIN)

    def status(self, name: str | None, console: Terminal) -> None:
        """How every run stands, or one of them: from its folder, and from Ray whether its job lives."""
        newest = {job.metadata["name"]: job for job in ([self._find(name)] if name else self._jobs())}
        console.print(f"runs at {self.address}" + ("" if newest else ": none yet"), **_PLAIN)
        for run, job in newest.items():
            facts = run_status(Path(job.metadata["run"]), thorough=name is not None)
            console.print(f"{run}: {ENDED.get(job.status, job.status.value.lower())}", **_PLAIN)
            console.print(
                Padding(
                    Text(" · ".join(f"{what} {value}" for what, value in facts.items() if value)),
                    (0, 0, 0, 2),
                )
            )

    def stop(self, name: str, wait: float, console: Terminal) -> None:
        """Ask a run to save and end, and wait until it has; after `wait` seconds end its job without."""
        job = self._find(name)
        if job.status.is_terminal():
            raise UserError(f"{name} does not run any more: it {ENDED[job.status]}.")
        ask = self._folder(job) / "stop"
        console.print(f"{name} saves and stops", **_PLAIN)
        deadline = time.monotonic() + wait
        while not self._client.get_job_status(job.submission_id).is_terminal():
            if time.monotonic() > deadline:
                self._client.stop_job(job.submission_id)
                raise UserError(
                    f"{name} did not save within {wait:g} s, and its job was ended. What it saved before"
                    " stays:"
                    f" {self._command('status', name)}"
                )
            ask.touch()  # again: a run that is only beginning clears away old requests
            time.sleep(0.5)
        ask.unlink(missing_ok=True)
        self.status(name, console)

    def resume(self, name: str, code: bool = False) -> str:
        """Continue a run whose job has ended, from its folder."""
        job = self._find(name)
        return self.submit(resolve_any(self._folder(job) / "config.yaml"), code)

    def doctor(self, storage: Path, code: bool, console: Terminal) -> None:
        """Examine the cluster from its head, and show what that says; UserError where something must be
        mended.
        """
        self._fit(storage.resolve(), code)
        with _shipped(code) as folder, console.status("the head asks every node"):
            asked = f"doctor {shlex.quote(str(storage.resolve()))} --address $RAY_ADDRESS"
            status, said = self._short(_trifold(asked, console.width), folder)
        console.print(said.rstrip(), **_PLAIN)
        if status != JobStatus.SUCCEEDED:
            raise UserError(f"this cluster is not in order (trifold doctor --address {self.address}).")

    def _fit(self, run: Path, code: bool) -> None:
        """UserError where a job could not train into `run`: the head's versions, and whether it sees this
        folder. 2 s.
        """
        probe = node_facts.nearest(run) / f".trifold-probe-{uuid4().hex}"
        probe.write_text(probe.name)
        try:
            with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
                shutil.copy(node_facts.__file__, folder)
                _, said = self._short(f"python node_facts.py {shlex.quote(str(probe))}", Path(folder))
        finally:
            probe.unlink(missing_ok=True)
        found = next(
            (line.removeprefix("facts ") for line in said.splitlines() if line.startswith("facts ")), None
        )
        if found is None:
            raise UserError(
                f"the head of {self.address} could not run Python: {said.strip().splitlines()[-1]}."
            )
        if wrong := before_submit(node_facts.versions(), json.loads(found), str(probe.parent), code):
            raise UserError("\n".join(f"{sentence}." for sentence in wrong))

    def _short(self, entrypoint: str, folder: Path) -> tuple[JobStatus, str]:
        """Run a job that soon ends, with this folder; its status and what it said."""
        name = self._client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)})
        while not (status := self._client.get_job_status(name)).is_terminal():
            time.sleep(0.1)
        return status, self._client.get_job_logs(name).partition(entrypoint)[2] or self._client.get_job_info(
            name
        ).message or ""

    def _jobs(self) -> list[JobDetails]:
        """All jobs that `submit` made, oldest first."""
        jobs = [job for job in self._client.list_jobs() if job.metadata and "run" in job.metadata]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def _find(self, name: str) -> JobDetails:
        jobs = self._jobs()
        if mine := [job for job in jobs if job.metadata["name"] == name]:
            return mine[-1]
        known = ", ".join(dict.fromkeys(job.metadata["name"] for job in jobs)) or "none yet"
        raise UserError(f"{self.address} has no run {name}. The runs there: {known}.")

    def _folder(self, job: JobDetails) -> Path:
        folder = Path(job.metadata["run"])
        if not folder.is_dir():
            raise UserError(
                f"the run folder {folder} is not to be seen from here: ask from where the cluster's storage"
                " is mounted."
            )
        return folder

    def _command(self, *words: str) -> str:
        """What to type for another look at this cluster."""
        return shlex.join(["trifold", *words, "--address", self.address])

    def _already(self, run: Path, status: Any) -> NoReturn:
        raise UserError(
            f"{run} is being trained already ({status.value.lower()}): follow it with"
            f" {self._command('logs', run.name, '-f')}, or end it"
            f" with {self._command('stop', run.name)}"
        )


@contextmanager
def _shipped(code: bool) -> Iterator[Path]:
    """A folder that a job takes along; `code`: with this working tree, not the Trifold that is installed
    there.
    """
    with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
        for room in CODE if code else ():
            shutil.copytree(
                CLONE / room, Path(folder) / "trifold" / room, ignore=shutil.ignore_patterns("__pycache__")
            )
        yield Path(folder)


def _trifold(command: str, columns: int = 80) -> str:
    """The shell's words that run a command of Trifold in a job. Paths are those of here, where the cluster
    has this folder too.
    """
    python = f"exec env COLUMNS={columns} python -P -m trifold.launch.cli"  # -P: shipped code comes first
    return f"shipped=$PWD; cd {shlex.quote(os.getcwd())} 2>/dev/null; {python} {command}"


_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


async def _shown(chunks: AsyncIterator[str], console: Terminal) -> None:
    """Print a log's lines as they come; on a terminal those about a step replace each other."""
    rest = ""
    with console.status("waiting for the job") as live:
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                if console.is_terminal and line.startswith("step "):
                    live.update(line)
                else:
                    console.print(line, **_PLAIN)


def _cause(error: BaseException) -> str:
    """The operating system's word for why, out of three libraries' wrappings."""
    text = (
        "that is no http:// address"
        if isinstance(error, requests.exceptions.InvalidSchema | ValueError)
        else str(error)
    )
    known = ("Connection refused", "No route to host", "Name or service not known", "timed out")
    return (
        "what listens there does not speak HTTP"
        if "BadStatusLine" in text
        else next((why for why in known if why in text), text)
    )
