"""A run told to the trackers that its recipe names, MLflow and W&B. (TensorBoard's files are written by the
run itself.)

In: the growing metrics.jsonl of a run folder, followed from the driver. Out: its numbers in each tracker,
under one tracked run however often the run is resumed. No tracker holds up or ends training: what it did not
take is offered again, at last by the next `trifold pretrain`. Addresses and keys are each tracker's own
environment variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...) and are not read here.
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
from trifold.pretrain.storage.jsonl import read_from

PROJECT = "trifold"  # unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT says another
_Record = dict[str, Any]


class Mlflow:
    """A tracked run in MLflow: where MLFLOW_TRACKING_URI says, else in files in the run folder (mlflow server
    --backend-store-uri).
    """

    def __init__(self, config: AnyRecipe, known: str | None) -> None:
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        os.environ.setdefault(
            "MLFLOW_ALLOW_FILE_STORE", "true"
        )  # its newest releases ask for a database; files need no more packages
        folder, self.metric = Path(config.run).resolve(), Metric
        self.client = MlflowClient(None if mlflow.is_tracking_uri_set() else f"file:{folder / 'mlflow'}")
        if known:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.id = self.client.create_run(experiment, run_name=folder.name).info.run_id
        params = [
            Param(key, str(value)[:500]) for key, value in flatten(config.model_dump(mode="json")).items()
        ]
        for first in range(0, len(params), 100):  # as many as it takes at once
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
        self.run.define_metric(
            "*", step_metric="step"
        )  # its own counter never goes back, and a resumed run's steps do

    def send(self, records: list[_Record]) -> None:
        for record in records:
            self.run.log(_numbers(record) | {"step": record["step"]})

    def close(self, ended: str) -> None:
        self.run.finish(exit_code=0 if ended in ("finished", "scored", "stopped") else 1)


TRACKERS: dict[str, Callable[[AnyRecipe, str | None], Mlflow | Wandb]] = {"mlflow": Mlflow, "wandb": Wandb}


@contextmanager
def tracking(config: AnyRecipe, console: Terminal, every: float = 2.0) -> Iterator[None]:
    """While inside, the recipe's trackers are told what the run records, every few seconds. UserError where one
    cannot be used.
    """
    followed = [_Followed(name, config, console) for name in config.trackers]
    done = threading.Event()

    def follow() -> None:
        while not done.wait(every):
            for one in followed:
                one.tell()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for one in followed:
            one.tell(last_outcome(Path(config.run)))


def _said(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _Followed:
    """One tracker, and how much of metrics.jsonl it has taken: kept in the run folder, in trackers.json."""

    def __init__(self, name: str, config: AnyRecipe, console: Terminal) -> None:
        self.name, self.console, self.run = name, console, Path(config.run)
        self.file = self.run / "trackers.json"
        self.well = True
        try:
            known = self._known().get(name, {"id": None, "place": 0})
            self.place: int = known["place"]
            self.tracker = TRACKERS[name](config, known["id"])
        except UserError:
            raise
        except ImportError:
            raise UserError(
                f"trackers: {name} is not installed where the run is started: pip install -c constraints.txt"
                f" -e '.[{name}]'"
            ) from None
        except (
            Exception
        ) as error:  # whatever a tracker's client raises where its server is away or does not know the run
            raise UserError(
                f"trackers: {name} cannot be used ({_said(error)}). Mend its address, start without it"
                f" (trackers=[]), or remove {self.file}"
                " to begin another tracked run."
            ) from error
        self._keep()

    def tell(self, ended: str | None = None) -> None:
        """Send what is new. A tracker that does not take it is asked again next time; the person hears of it
        once.
        """
        records, place = read_from(self.run / "metrics.jsonl", self.place)
        try:
            if records:
                self.tracker.send(records)
                self.place = place
                self._keep()
            if ended is not None:
                self.tracker.close(ended)
            self.well = True
        except (
            Exception
        ) as error:  # whatever a tracker's client raises when its server is away: training is worth more
            if self.well or ended is not None:
                said = (
                    f"{self.name} did not take the newest metrics ({_said(error)}): they are offered again."
                )
                self.console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
            self.well = False

    def _known(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def _keep(self) -> None:
        known = self._known() | {self.name: {"id": self.tracker.id, "place": self.place}}
        fresh = self.file.with_name(self.file.name + ".fresh")
        fresh.write_text(json.dumps(known))
        fresh.replace(self.file)


def _numbers(record: _Record) -> dict[str, float]:
    """What TensorBoard shows too."""
    return {name: value for name, value in record.items() if isinstance(value, float)}
