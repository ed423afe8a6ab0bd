"""`seeds: 2`: a resumable run folder for each, the best one published, and mean and spread on its card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.finetune.small_tasks import folder_of
from tests.finetune.training import tags
from tests.launch.command_line import trifold
from trifold.finetune.evaluation.seeds import run_to_publish, seed_configs, summarise_seeds
from trifold.launch.recipe.schema import FinetuneRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.storage.jsonl import read_lines


def write_recipe(folder: Path, **changes: Any) -> None:
    recipe = {
        "run": "run",
        "model": {"from": str(folder_of(folder, "encoder"))},
        "task": tags(folder),
        "row_length": 64,
        "seeds": 2,
        "seed": 4,
        "steps": 8,
        "step_rows": 6,
        "micro_rows": 6,
        "optimizer": {"lr": 3e-3},
        "evaluate_every": 4,
        "checkpoints": {"every": 4},
        "cluster": {"workers": 0, "threads_per_worker": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line}


def stop_at(step: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the run to stop when it takes the step."""
    train_step = Engine.train_step

    def ask(self: Engine, *given: Any) -> Any:
        if self.optimizer_step + 1 == step and (run / "metrics.jsonl").exists():
            (run / "stop").touch()
        return train_step(self, *given)

    monkeypatch.setattr(Engine, "train_step", ask)


def test_each_seed_resumes_and_the_best_is_published_with_mean_and_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(6, tmp_path / "run" / "seed-5", patch)
        stopped = trifold(tmp_path, "finetune", "recipe.yaml")
    assert stopped.code == 143 and "For all 2 seeds: trifold finetune run/config.yaml" in stopped.out
    assert len(losses(tmp_path / "run" / "seed-4")) == 8 and len(losses(tmp_path / "run" / "seed-5")) == 6
    with pytest.raises(UserError, match="has several seeds, and they are not all finished"):
        run_to_publish(tmp_path / "run")

    finished = trifold(tmp_path, "finetune", "run/config.yaml")
    assert finished.code == 0 and "run/seed-4 is finished." in finished.out
    alone = trifold(tmp_path, "finetune", "recipe.yaml", "run=alone", "seeds=1", "seed=5")
    assert alone.code == 0 and losses(tmp_path / "run" / "seed-5") == losses(tmp_path / "alone")

    summary = json.loads((tmp_path / "run" / "seeds.json").read_text())
    scores = {
        seed: json.loads((tmp_path / "run" / seed / "scores.json").read_text())["scores"]["f1"]
        for seed in ("seed-4", "seed-5")
    }
    assert summary["mean"]["f1"] == pytest.approx(np.mean([*scores.values()]))
    assert summary["spread"]["f1"] == pytest.approx(np.std([*scores.values()], ddof=1))
    best = max(scores, key=scores.__getitem__)
    assert scores["seed-4"] != scores["seed-5"] and summary["published"] == best

    published = trifold(tmp_path, "publish", "run", "--out", "published")
    assert published.code == 0, published.err
    card = (tmp_path / "published" / "README.md").read_text()
    expected = f"| f1 | {summary['mean']['f1']:.2f} | {summary['spread']['f1']:.2f} | {scores[best]:.2f} |"
    assert "| 2 seeds | mean | standard deviation | this model |" in card and expected in card


def test_equal_scores_are_decided_by_the_loss_and_a_storage_is_not_shared(tmp_path: Path) -> None:
    write_recipe(tmp_path, run=str(tmp_path / "run"), seeds=3, seed=0)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["checkpoints"]["storage"] = str(tmp_path / "store")
    config = FinetuneRecipe.model_validate_json(json.dumps(recipe))
    seeds = seed_configs(config)
    assert [(one.seed, one.seeds, Path(one.run).name) for one in seeds] == [
        (0, 1, "seed-0"),
        (1, 1, "seed-1"),
        (2, 1, "seed-2"),
    ]
    assert {one.checkpoints.storage for one in seeds} == {str(tmp_path / "store" / "run")}
    for one, loss in zip(seeds, (0.3, 0.1, 0.2), strict=True):
        Path(one.run).mkdir(parents=True)
        result = {"best": "f1", "step": 4, "heldout_loss": loss, "scores": {"f1": 50.0}}
        (Path(one.run) / "scores.json").write_text(json.dumps(result))
    summary = summarise_seeds(config)
    assert summary["published"] == "seed-1" and summary["spread"] == {"f1": 0.0}
    assert run_to_publish(tmp_path / "run") == tmp_path / "run" / "seed-1"
