"""Several seeds of one fine-tuning recipe (`seeds: 3`): a run folder for each, and their scores together.

    RUN/seed-0/, RUN/seed-1/   complete run folders, each resumable: `seed`, `seed` + 1, ...
    RUN/seeds.json             the scores of each, their mean and standard deviation, and which is the best

The best on dev is what `trifold publish RUN` publishes; the card of the published folder shows mean and
spread.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from trifold.finetune.config import FinetuneConfig
from trifold.modeling.errors import UserError
from trifold.pretrain.storage.json_files import read_json_object, write_json

ConfigT = TypeVar("ConfigT", bound=FinetuneConfig)

SUMMARY = "seeds.json"


def seed_configs(config: ConfigT) -> list[ConfigT]:
    """The config of each seed: its own run folder and, in a shared storage, its own folder there."""
    configs = []
    for seed in range(config.seed, config.seed + config.seeds):
        checkpoints = config.checkpoints
        if checkpoints.storage is not None:
            name = Path(config.run).resolve().name
            checkpoints = checkpoints.model_copy(
                update={"storage": f"{checkpoints.storage.rstrip('/')}/{name}"}
            )
        run = str(Path(config.run) / f"seed-{seed}")
        changes = {"seed": seed, "seeds": 1, "run": run, "checkpoints": checkpoints}
        configs.append(config.model_copy(update=changes))
    return configs


def summarise_seeds(config: FinetuneConfig) -> dict[str, Any]:
    """Write RUN/seeds.json from the scores.json of each seed's folder, and return it.

    The best seed has the highest dev score; of equal ones the lowest held-out loss, then the lowest seed.
    """
    results = {
        Path(one.run).name: read_json_object(Path(one.run) / "scores.json") for one in seed_configs(config)
    }
    best_score = next(iter(results.values()))["best"]

    def rank(name: str) -> tuple[float, float]:
        result = results[name]
        return -result["scores"][best_score], result.get("heldout_loss", 0.0)

    names = list(next(iter(results.values()))["scores"])
    values = {name: [result["scores"][name] for result in results.values()] for name in names}
    summary = {
        "task": config.task.kind,
        "best": best_score,
        "published": min(results, key=rank),
        "seeds": {folder: _of_seed(result) for folder, result in results.items()},
        "mean": {name: mean(scores) for name, scores in values.items()},
        "spread": {name: stdev(scores) for name, scores in values.items()},
    }
    write_json(Path(config.run) / SUMMARY, summary)
    return summary


def run_to_publish(run: Path) -> Path:
    """The folder of the best seed where `run` has several seeds, else `run`. Raises UserError where they
    are not all finished.
    """
    if (run / SUMMARY).exists():
        return run / str(read_json_object(run / SUMMARY)["published"])
    if any(run.glob("seed-*/config.yaml")):
        raise UserError(
            f"{run} has several seeds, and they are not all finished: run `trifold finetune"
            f" {run}/config.yaml`, or publish one of their folders."
        )
    return run


def _of_seed(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("step", "heldout_loss", "scores") if key in result}
