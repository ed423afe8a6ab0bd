"""Runs as jobs of a Ray cluster: submitted, followed, stopped with a save, resumed. This process may end at
any time; the job keeps running.

A resolved recipe and the address of the cluster's job server (http://HEAD:8265) come in, with the token of
RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. The job runs `trifold pretrain` or `trifold finetune` on the head
and is named after its run folder. The status of a run is read from that folder, which the cluster and this
machine must share; whether its job is alive is asked of Ray.
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

import ray
import ray.exceptions
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.padding import Padding
from rich.text import Text

from trifold.launch.jobs import node_facts
from trifold.launch.jobs.findings import before_submit
from trifold.launch.recipe.reader import CLONE, resolve_any, write
from trifold.launch.recipe.schema import AnyRecipe
from trifold.launch.terminal import Terminal, visible
from trifold.launch.watch.progress import run_status
from trifold.modeling.errors import UserError

CODE = ("modeling", "pretrain", "finetune", "launch", "configs")  # the sub-packages that `--code` ships
ENDED = {
    JobStatus.SUCCEEDED: "finished",
    JobStatus.STOPPED: "stopped by Ray",
    JobStatus.FAILED: "ended with an error",
}


class Jobs:
    """The job server at `address`. Raises UserError where none answers, the token is wrong, or another Ray
    release runs there.
    """

    def __init__(self, address: str) -> None:
        # Ray prefers this variable to the address that it is given
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address = address
        try:
            requests.head(address, timeout=5)  # Ray itself would try for minutes
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
        version = self._client._server_ray_version  # private: the constructor has just asked for it
        if version != ray.__version__:
            raise UserError(
                f"{address} runs Ray {version}, and here is {ray.__version__}: install the same release on"
                " both sides."
            )

    def submit(self, config: AnyRecipe, code: bool = False) -> str:
        """Start (or continue) a run; returns its name. `code`: with this working tree, not the Trifold that
        is installed there.
        """
        run = Path(config.run).resolve()
        earlier = [job for job in self._jobs() if job.metadata["name"] == run.name]
        for job in earlier:
            if job.metadata["run"] != str(run):
                raise UserError(
                    f"{self.address} already has a run {run.name}, in {job.metadata['run']}: give this"
                    f" one another"
                    " `run` folder."
                )
            if not job.status.is_terminal():
                self._raise_running(run, job.status)
        self._check_head(run, code)
        with _shipped(code) as folder:
            write(config.model_copy(update={"run": str(run)}), folder / "recipe.yaml")
            try:
                self._client.submit_job(
                    submission_id=f"{run.name}-{len(earlier) + 1}" if earlier else run.name,  # unique
                    entrypoint=_trifold(f"{config.command} $shipped/recipe.yaml --address $RAY_ADDRESS"),
                    runtime_env={"working_dir": str(folder)},
                    metadata={"name": run.name, "run": str(run)},
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    self._raise_running(run, JobStatus.PENDING)
                raise
        return run.name

    def follow(self, name: str, console: Terminal) -> None:
        """Show a run's log as it grows (its progress as one line on a terminal) until its job ends or Ctrl-C
        detaches. Raises UserError when the job failed.
        """
        job = self._find(name)
        try:
            asyncio.run(_show_log(self._client.tail_job_logs(job.submission_id), console))
        except KeyboardInterrupt:
            logs, stop = self._command("logs", name, "-f"), self._command("stop", name)
            return console.print_line(f"Detached; {name} keeps running. Reattach: {logs}    Stop: {stop}")
        status = self._client.get_job_status(job.submission_id)
        if status != JobStatus.SUCCEEDED:
            raise UserError(
                f"{name} {ENDED.get(status, status)}. Continue with: {self._command('resume', name)}"
            )

    def logs(self, name: str, console: Terminal) -> None:
        """Print the log of a run's newest job."""
        console.print_line(self._client.get_job_logs(self._find(name).submission_id), end="")

    def status(self, name: str | None, console: Terminal) -> None:
        """Print the status of all runs, or of one: of its folder, and whether its job is alive."""
        newest = {job.metadata["name"]: job for job in ([self._find(name)] if name else self._jobs())}
        console.print_line(f"runs at {self.address}" + ("" if newest else ": none yet"))
        for run, job in newest.items():
            facts = run_status(Path(job.metadata["run"]), thorough=name is not None)
            console.print_line(f"{run}: {ENDED.get(job.status, job.status.value.lower())}")
            line = " · ".join(f"{name} {value}" for name, value in facts.items() if value)
            console.print(Padding(Text(visible(line)), (0, 0, 0, 2)))

    def stop(self, name: str, wait: float, console: Terminal) -> None:
        """Ask a run to save and end, and wait for that; after `wait` seconds kill its job."""
        job = self._find(name)
        if job.status.is_terminal():
            raise UserError(f"{name} is not running: it {ENDED[job.status]}.")
        request = self._folder(job) / "stop"
        console.print_line(f"{name} saves and stops")
        deadline = time.monotonic() + wait
        while not self._client.get_job_status(job.submission_id).is_terminal():
            if time.monotonic() > deadline:
                self._client.stop_job(job.submission_id)
                raise UserError(
                    f"{name} did not save within {wait:g} s, and its job was killed. Earlier checkpoints"
                    f" remain:"
                    f" {self._command('status', name)}"
                )
            request.touch()  # again: a run that is starting removes old requests
            time.sleep(0.5)
        request.unlink(missing_ok=True)
        self.status(name, console)

    def resume(self, name: str, code: bool = False) -> str:
        """Resume a run whose job has ended, from its folder."""
        job = self._find(name)
        return self.submit(resolve_any(self._folder(job) / "config.yaml"), code)

    def doctor(self, storage: Path, code: bool, console: Terminal) -> None:
        """Check the cluster from its head and show the result. Raises UserError where something must be
        fixed.
        """
        self._check_head(storage.resolve(), code)
        with _shipped(code) as folder, console.status("the head checks every node"):
            command = f"doctor {shlex.quote(str(storage.resolve()))} --address $RAY_ADDRESS"
            status, output = self._run_job(_trifold(command, console.width), folder)
        console.print_line(output.rstrip())
        if status != JobStatus.SUCCEEDED:
            raise UserError(
                f"the cluster check found problems, above (trifold doctor --address {self.address})."
            )

    def _check_head(self, run: Path, code: bool) -> None:
        """Raises UserError where a job could not train into `run`: by the head's versions, and whether it
        sees this folder. 2 s.
        """
        probe = node_facts.nearest(run) / f".trifold-probe-{uuid4().hex}"
        probe.write_text(probe.name)
        try:
            with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
                shutil.copy(node_facts.__file__, folder)
                _, output = self._run_job(f"python node_facts.py {shlex.quote(str(probe))}", Path(folder))
        finally:
            probe.unlink(missing_ok=True)
        facts = [line.removeprefix("facts ") for line in output.splitlines() if line.startswith("facts ")]
        if not facts:
            last = (output.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"the head of {self.address} could not run Python: {last}.")
        problems = before_submit(node_facts.versions(), json.loads(facts[0]), str(probe.parent), code)
        if problems:
            raise UserError("\n".join(f"{sentence}." for sentence in problems))

    def _run_job(self, entrypoint: str, folder: Path) -> tuple[JobStatus, str]:
        """Run a short job in this folder to its end; its status and output."""
        name = self._client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)})
        while not (status := self._client.get_job_status(name)).is_terminal():
            time.sleep(0.1)
        output = self._client.get_job_logs(name).partition(entrypoint)[2]
        return status, output or self._client.get_job_info(name).message or ""

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
                f"the run folder {folder} is not visible from this machine: run this where the cluster's"
                f" storage is"
                " mounted."
            )
        return folder

    def _command(self, *words: str) -> str:
        """A command for this cluster, as it is typed."""
        return shlex.join(["trifold", *words, "--address", self.address])

    def _raise_running(self, run: Path, status: Any) -> NoReturn:
        raise UserError(
            f"{run} is already being trained ({status.value.lower()}): follow it with"
            f" {self._command('logs', run.name, '-f')}, or stop it"
            f" with {self._command('stop', run.name)}"
        )


@contextmanager
def _shipped(code: bool) -> Iterator[Path]:
    """A folder that is shipped with a job. `code` adds this source tree as the package `trifold`, which comes
    before the one installed there.
    """
    with tempfile.TemporaryDirectory(prefix="trifold-") as folder:
        for name in CODE if code else ():
            target = Path(folder) / "trifold" / name
            shutil.copytree(CLONE / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        yield Path(folder)


def _trifold(command: str, columns: int = 80) -> str:
    """The shell command that runs Trifold in a job, in this working directory if the cluster has it too."""
    python = f"exec env COLUMNS={columns} python -P -m trifold.launch.cli"  # -P: shipped code comes first
    return f"shipped=$PWD; cd {shlex.quote(os.getcwd())} 2>/dev/null; {python} {command}"


async def _show_log(chunks: AsyncIterator[str], console: Terminal) -> None:
    """Print a log's lines as they come; on a terminal those about a step replace each other."""
    rest = ""
    with console.status("waiting for the job") as live:
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                if console.is_terminal and line.startswith("step "):
                    live.update(visible(line))
                else:
                    console.print_line(line)


def _cause(error: BaseException) -> str:
    """The operating system's reason, out of the wrappings of three libraries."""
    text = (
        "that is not an http:// address"
        if isinstance(error, requests.exceptions.InvalidSchema | ValueError)
        else str(error)
    )
    known = ("Connection refused", "No route to host", "Name or service not known", "timed out")
    return (
        "what listens there does not speak HTTP"
        if "BadStatusLine" in text
        else next((why for why in known if why in text), text)
    )
