"""Metrics sent to the trackers that a recipe names, MLflow and Weights & Biases. (TensorBoard files are
written by the run itself.)

The driver follows metrics.jsonl of the run folder and sends its numbers to each tracker, as one tracked run
however often the run is resumed. No tracker delays or ends training: what it did not accept is sent again, at
the latest by the next `trifold pretrain`. Addresses and keys are each tracker's own environment variables
(MLFLOW_TRACKING_URI, WANDB_API_KEY, ...), which are not read here.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from trifold.launch.recipe.schema import AnyRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain.config.flatten import flatten
from trifold.pretrain.monitor.run_folder import last_outcome
from trifold.pretrain.storage.atomic import replace_file
from trifold.pretrain.storage.jsonl import read_from

PROJECT = "trifold"  # unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT names another
_Record = dict[str, Any]


class Mlflow:
    """A tracked run in MLflow: at MLFLOW_TRACKING_URI, or as files in the run folder (mlflow server
    --backend-store-uri).
    """

    def __init__(self, config: AnyRecipe, known: str | None) -> None:
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        # newest releases ask for a database; files need no further packages
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        folder, self.metric = Path(config.run).resolve(), Metric
        self.client = MlflowClient(None if mlflow.is_tracking_uri_set() else f"file:{folder / 'mlflow'}")
        if known:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
        params = [
            Param(key, str(value)[:500]) for key, value in flatten(config.model_dump(mode="json")).items()
        ]
        for first in range(0, len(params), 100):  # its limit per request
            self.client.log_batch(self.id, params=params[first : first + 100])

    def send(self, records: list[_Record]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self.metric(name, value, now, record["step"])
            for record in records
            for name, value in _numbers(record).items()
        ]
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def close(self, ended: str) -> None:
        self.client.set_terminated(
            self.id, {"finished": "FINISHED", "scored": "FINISHED", "stopped": "KILLED"}.get(ended, "FAILED")
        )


class Wandb:
    """A tracked run in W&B: online with WANDB_API_KEY, in files in the run folder with WANDB_MODE=offline
    (wandb sync).
    """

    def __init__(self, config: AnyRecipe, known: str | None) -> None:
        import wandb

        self.id = known or uuid4().hex[:12]
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=Path(config.run).name,
                id=self.id,
                resume="allow",
                dir=config.run,
                config=flatten(config.model_dump(mode="json")),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"trackers: W&B cannot be used ({error}). Set WANDB_API_KEY, or WANDB_MODE=offline."
            ) from None
        # W&B's own counter never goes back, and the steps of a resumed run do
        self.run.define_metric("*", step_metric="step")

    def send(self, records: list[_Record]) -> None:
        for record in records:
            self.run.log(_numbers(record) | {"step": record["step"]})

    def close(self, ended: str) -> None:
        self.run.finish(exit_code=0 if ended in ("finished", "scored", "stopped") else 1)


TRACKERS: dict[str, Callable[[AnyRecipe, str | None], Mlflow | Wandb]] = {"mlflow": Mlflow, "wandb": Wandb}


@contextmanager
def tracking(config: AnyRecipe, console: Terminal, every: float = 2.0) -> Iterator[None]:
    """While inside, send what the run records to the recipe's trackers, every few seconds. Raises UserError
    where one cannot be used.
    """
    connections = [_Connection(name, config, console) for name in config.trackers]
    done = threading.Event()

    def follow() -> None:
        while not done.wait(every):
            for connection in connections:
                connection.send_new()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for connection in connections:
            connection.send_new(last_outcome(Path(config.run)))


def _summary(error: Exception) -> str:
    """The first line of an error, or its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _Connection:
    """One tracker, and how much of metrics.jsonl it has accepted (kept in RUN/trackers.json)."""

    def __init__(self, name: str, config: AnyRecipe, console: Terminal) -> None:
        self.name, self.console, self.run = name, console, Path(config.run)
        self.file = self.run / "trackers.json"
        self.healthy = True
        try:
            saved = self._saved().get(name, {"id": None, "place": 0})
            self.offset: int = saved["place"]
            self.tracker = TRACKERS[name](config, saved["id"])
        except UserError:
            raise
        except ImportError:
            raise UserError(
                f"trackers: {name} is not installed where the run is started: pip install -c constraints.txt"
                f" -e '.[{name}]'"
            ) from None
        except Exception as error:  # anything that a tracker's client raises where its server is away
            raise UserError(
                f"trackers: {name} cannot be used ({_summary(error)}). Fix its address, start without it"
                f" (trackers=[]), or remove {self.file}"
                " to start another tracked run."
            ) from error
        self._save()

    def send_new(self, ended: str | None = None) -> None:
        """Send what is new; `ended` closes the tracked run. What a tracker does not accept is sent again next
        time, and that is printed once.
        """
        records, offset = read_from(self.run / "metrics.jsonl", self.offset)
        try:
            if records:
                self.tracker.send(records)
                self.offset = offset
                self._save()
            if ended is not None:
                self.tracker.close(ended)
            self.healthy = True
        except (
            Exception
        ) as error:  # anything that a client raises when its server is away: training continues
            if self.healthy or ended is not None:
                reason = _summary(error)
                self.console.print_line(
                    f"{self.name} did not accept the newest metrics ({reason}): they will be sent again.",
                    style="yellow",
                )
            self.healthy = False

    def _saved(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def _save(self) -> None:
        saved = self._saved() | {self.name: {"id": self.tracker.id, "place": self.offset}}
        replace_file(self.file, json.dumps(saved))


def _numbers(record: _Record) -> dict[str, float]:
    """The numbers that TensorBoard shows too."""
    return {name: value for name, value in record.items() if isinstance(value, float)}
