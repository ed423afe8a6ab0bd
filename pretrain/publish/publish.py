"""From a run's newest verified checkpoint to a folder that stock Hugging Face classes load: published means
verified.

A run folder comes in, the published folder goes out (published_folder.py lists its files). It is written as a
hidden folder beside its final name and renamed once verify.py finds nothing wrong with it; after a failure
nothing of it is left.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.lora import merge_lora
from trifold.pretrain.checkpoint import checkpoint as checkpoints
from trifold.pretrain.checkpoint import lease
from trifold.pretrain.checkpoint.checkpoint import Checkpoint
from trifold.pretrain.checkpoint.format import CorruptCheckpoint, parse_folder_name
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.publish import carried, model_card, published_folder
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.publish.weights import SHARD_BYTES
from trifold.pretrain.storage.atomic import hidden_sibling, replace_folder
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.storage_path import StoragePath

Weights = Literal["ema", "trained"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def publish(
    run: Path,
    out: Path,
    *,
    on_event: OnEvent,
    checkpoint: int | None = None,
    weights: Weights | None = None,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    root: StoragePath | None = None,
) -> Path:
    """Publish a run's newest verified checkpoint, or that of step `checkpoint`, as the folder `out`. Returns
    `out`. `root` is where the run's checkpoints are, if not in its own folder.

    `weights` are those of the moving average ("ema", the default where the checkpoint has them) or the
    "trained" ones. A newer checkpoint that does not verify is reported to `on_event`. Raises UserError where
    there is no checkpoint, no average was kept, `out` exists, no published architecture expresses the model,
    or the verification fails (each failed check by name).
    """
    out = out.absolute()  # "." has no name to put a hidden folder beside
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not overwritten: give another folder, or move it away")
    source = find_checkpoint(run, on_event, checkpoint, root)
    weights = choose_weights(source, weights)
    try:
        with _new_folder(out) as folder:
            reference = _write_folder(run, source, weights, folder, DTYPES[dtype], shard_bytes)
            report = verify(folder, reference)
            if not report.ok:
                raise UserError(
                    f"{out} was not published, because it failed its verification: {report.failures}"
                )
    except (OSError, SafetensorError) as error:  # a full disk, most often
        reason = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else str(error)
        raise UserError(f"{out} was not published: {reason}; nothing was left behind") from error
    return out


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends. The working directory is filled in place: a
    shell would remain in the folder that was replaced.
    """
    if out != Path.cwd():
        with replace_folder(out, overwrite=False) as folder:
            yield folder
        return
    filled = hidden_sibling(out / published_folder.RECORD)
    with replace_folder(filled) as folder:
        yield folder
    for path in sorted(filled.iterdir(), key=lambda path: path.name == published_folder.RECORD):
        path.rename(out / path.name)
    filled.rmdir()


def find_checkpoint(
    run: Path, on_event: OnEvent, step: int | None, root: StoragePath | None = None
) -> Checkpoint:
    """The verified checkpoint of a step, or the newest one that verifies. Raises UserError where there is
    none.
    """
    root = root or DiskPath(run)
    if step is not None:
        return checkpoints.open_checkpoint(verified_folder_of_step(root, step))
    source = checkpoints.newest_verified(root, on_event)
    if source is None:
        raise UserError(
            f"{run} has no checkpoint to publish: train it first (trifold pretrain), at least until"
            " checkpoints.every steps"
        )
    return source


def verified_folder_of_step(root: StoragePath, step: int) -> StoragePath:
    """The committed checkpoint of a step (of the last generation that saved one), its content verified.
    Raises UserError where there is none, or it is damaged.
    """
    committed = lease.valid_folders(root)
    folders = [folder for folder in committed if parse_folder_name(folder.name)[1] == step]
    if not folders:
        steps = ", ".join(str(parse_folder_name(folder.name)[1]) for folder in committed) or "none"
        raise UserError(f"{root} has no checkpoint of step {step}; there are those of: {steps}")
    try:
        checkpoints.verify(folders[-1])
    except CorruptCheckpoint as error:
        raise UserError(f"{folders[-1]} is damaged and cannot be used: {error}") from None
    return folders[-1]


def read_checkpoint_model(
    source: Checkpoint, weights: Weights | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A checkpoint's model, its adapters merged in: (config, fp32 state dict). `weights` as for `publish`."""
    config = ModelConfig.model_validate_json(json.dumps(source.state.model))
    averaged: set[str] = set()
    if choose_weights(source, weights) == "ema":  # frozen parameters have no average
        averaged = {name for name in source.names if "ema" in source.keys(name)}
    state = {name: source.full(name, "ema" if name in averaged else "fp32") for name in source.names}
    scale = source.state.lora_scale
    return config, state if scale is None else merge_lora(state, scale)


def choose_weights(source: Checkpoint, requested: Weights | None) -> Weights:
    """Which weights to publish: those requested, else the averaged ones where the checkpoint has them."""
    has_average = any("ema" in source.keys(name) for name in source.names)
    if requested == "ema" and not has_average:
        raise UserError(
            f"{source.folder} holds no averaged weights, because its recipe's `ema` was 0: publish the"
            " trained ones"
        )
    return requested or ("ema" if has_average else "trained")


def _write_folder(
    run: Path, source: Checkpoint, weights: Weights, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Write all files of a published folder. Returns the model that they hold."""
    config, state = read_checkpoint_model(source, weights)
    tokenizer = Tokenizer.open(run / "tokenizer")
    settings = source.state.config.get("generation")
    generation = None if settings is None else Generation.model_validate_json(json.dumps(settings))
    extra_tensors = carried.kept_tensors(run)
    stock_config = published_folder.write_folder(
        folder,
        config,
        state,
        tokenizer,
        dtype,
        shard_bytes,
        generation,
        extra_tensors=extra_tensors,
        initial_generation=carried.kept_generation(run),
    )
    carried.restore(run, folder)

    record = published_folder.write_record(
        folder,
        config,
        tokenizer,
        source.state.fingerprint,
        _origin(source, weights) | {"carried": sorted(extra_tensors)},
    )
    card = model_card.render(run, source, record, stock_config["architectures"][0], tokenizer)
    (folder / published_folder.CARD).write_text(card, encoding="utf-8")
    return config, state


def _origin(source: Checkpoint, weights: Weights) -> dict[str, Any]:
    """Where the weights come from, for trifold.json."""
    marker, task = source.marker, source.state.task
    return {
        "checkpoint": {"name": source.folder.name, "sha256": marker.sha256, "time": marker.time},
        "weights": weights,
        "code": marker.origin.code,
        "versions": marker.origin.versions,
        "task": task
        and {
            "kind": task.kind,
            "prompt": task.prompt,
            "picks": task.picks,
            "threshold": source.state.scores.get("threshold"),
        },
        "generation": source.state.config.get("generation"),
    }
