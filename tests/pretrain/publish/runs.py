"""Runs to publish: real checkpoints of random models, as a run of one rank writes them."""

from pathlib import Path
from typing import Any

from tests.published import MODELS, random_model, tokenizer
from trifold.modeling.config import ModelConfig
from trifold.modeling.generation.config import Generation
from trifold.modeling.transformer import Transformer
from trifold.pretrain.checkpoint import lease
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.checkpoint.writing import commit, find_origin, write_rank
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.json_files import write_json
from trifold.pretrain.storage.jsonl import append_line


def no_event(event: str, **facts: Any) -> None:
    raise AssertionError(f"{event}: {facts}")


def save(
    run: Path,
    model: Transformer,
    step: int,
    average: Transformer | None = None,
    generation: Generation | None = None,
) -> None:
    """A real checkpoint of a model, as a run of one rank writes it; with an average, all but its first
    parameter are trained.
    """
    run_lease = lease.take_generation(DiskPath(run))
    folder = lease.checkpoint_folder(DiskPath(run), step, run_lease.generation)
    slices = {
        name: Slice(0, tuple(p.shape), {"fp32": p.detach().flatten()}) for name, p in model.named_parameters()
    }
    for name, p in list(average.named_parameters())[1:] if average else []:
        slices[name].tensors["ema"] = p.detach().flatten()
    write_rank(folder, run_lease, 0, 1, slices)
    recipe = {
        "run": str(run),
        "model": model.config.model_dump(mode="json"),
        "ema": 0.99 if average else 0.0,
        "generation": None if generation is None else generation.model_dump(mode="json"),
        "data": {"sources": [{"path": "books.txt", "hub": None}], "heldout": [], "cache": None},
    }
    state = CheckpointState(
        step=step,
        cursor=step * 8,
        optimizer_step=step,
        skips=[],
        fingerprint="rows-fingerprint",
        config=recipe,
        model=model.config.model_dump(mode="json"),
        tokens=12345,
        heldout_loss=3.5,
    )
    commit(folder, run_lease, 1, state, find_origin(), timeout=5)


def make_run(
    run: Path, name: str, steps: tuple[int, ...] = (10,), generation: Generation | None = None, **changes: Any
) -> tuple[ModelConfig, Transformer]:
    config = MODELS[name].model_copy(update={"vocab_size": tokenizer().vocab_size, **changes})
    tokenizer().save(run / "tokenizer", config.family)
    for step in steps:
        model = random_model(config, seed=step)
        save(run, model, step, generation=generation)
    append_line(
        run / "metrics.jsonl",
        {"step": steps[-1], "heldout_loss": 3.25, "bits_per_byte": 2.125, "generation": 1},
    )
    shards = run / "shards" / "source-0" / "train"
    shards.mkdir(parents=True)
    write_json(shards / "index.json", {"documents": 1000, "tokens": 77777, "bytes": 300000})
    return config, model
