"""What trackers are told of a run: real clients where they are installed, writing files that are read
back.
"""

import json
from pathlib import Path

import pytest

from tests.launch.cluster.stand_in import recipe
from tests.launch.command_line import trifold, write_tiny
from trifold.launch.terminal import Terminal
from trifold.launch.watch import trackers
from trifold.launch.watch.trackers import tracking
from trifold.modeling.errors import UserError
from trifold.pretrain.storage.jsonl import append_line

SECRET = "0123456789abcdef" * 3


@pytest.fixture
def keys(monkeypatch) -> None:
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run_to(run: Path, first: int, last: int, event: str = "stopped") -> None:
    for step in range(first, last + 1):
        append_line(run / "metrics.jsonl", {"step": step, "loss": 1 / step, "rows": [0, 1], "generation": 1})
    append_line(run / "events.jsonl", {"event": event, "step": last})


def told_of(
    run: Path, name: str, first: int, last: int, event: str = "stopped", console: Terminal | None = None
) -> None:
    with tracking(recipe(run).model_copy(update={"trackers": (name,)}), console or Terminal()):
        run_to(run, first, last, event)


def whole(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_resumed_run_is_one_run_in_mlflow_with_every_step_and_its_recipe(tmp_path, keys):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    told_of(tmp_path, "mlflow", 1, 5)
    told_of(tmp_path, "mlflow", 4, 9, "finished")  # from the checkpoint of step 3

    client = MlflowClient(f"file:{tmp_path / 'mlflow'}")
    (found,) = client.search_runs([client.get_experiment_by_name("trifold").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["optimizer.lr"] == "0.001"
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "loss")]
    assert sorted(losses) == sorted((step, 1 / step) for step in (1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9))
    assert SECRET.encode() not in whole(tmp_path)


def test_a_resumed_run_is_one_run_in_wandb(tmp_path, keys):
    pytest.importorskip("wandb")
    told_of(tmp_path, "wandb", 1, 5)
    told_of(tmp_path, "wandb", 4, 9, "finished")
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"]
    files = list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert (
        len(files) in (1, 2) and b"loss" in files[-1].read_bytes()
    )  # one part for each start, which `wandb sync` puts together
    assert SECRET.encode() not in whole(tmp_path)


def test_a_tracker_that_is_away_holds_nothing_up_and_gets_it_all_from_the_next_start(tmp_path, monkeypatch):
    class Away:
        """A tracker whose server is away while `away` holds."""

        away, took, closed = True, [], []

        def __init__(self, recipe: object, known: str | None) -> None:
            self.id = known or "the one"

        def send(self, records: list[dict[str, object]]) -> None:
            if Away.away:
                raise ConnectionError("nobody there\nand more of it")
            Away.took += [record["step"] for record in records]

        def close(self, ended: str) -> None:
            Away.closed.append(ended)

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Away)
    console = Terminal(record=True, width=200)
    told_of(tmp_path, "mlflow", 1, 3, console=console)
    assert (
        console.export_text()
        == "mlflow did not accept the newest metrics (nobody there): they will be sent again.\n"
    )
    assert Away.took == [] and json.loads((tmp_path / "trackers.json").read_text()) == {
        "mlflow": {"id": "the one", "place": 0}
    }
    Away.away = False
    told_of(tmp_path, "mlflow", 4, 5, "finished")
    assert Away.took == [1, 2, 3, 4, 5] and Away.closed == ["finished"]


def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    def absent(recipe: object, known: str | None) -> None:
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", absent)
    with pytest.raises(
        UserError,
        match=r"trackers: wandb is not installed .* pip install -c constraints\.txt -e '\.\[wandb\]'",
    ):
        told_of(tmp_path, "wandb", 1, 1)


def test_pretraining_sends_its_metrics_to_the_trackers_of_its_recipe(tmp_path):
    pytest.importorskip("mlflow")
    result = trifold(write_tiny(tmp_path), "pretrain", "tiny.yaml", "trackers=[mlflow]", "steps=3")
    assert result.code == 0, result.err
    (loss,) = tmp_path.glob("run/mlflow/*/*/metrics/loss")
    assert [line.split()[2] for line in loss.read_text().splitlines()] == ["1", "2", "3"]
