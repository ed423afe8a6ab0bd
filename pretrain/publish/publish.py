"""From a run's newest verified checkpoint to a folder that stock Hugging Face classes load: published means
verified.

In: a run folder. Out: the published folder (pretrain/publish/published_folder.py says what is in it). It is
written as a hidden folder beside its place and renamed once verify.py has found nothing wrong with it; after
a refusal nothing of it is left.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Literal
from uuid import uuid4

import torch
from safetensors import SafetensorError

from trifold.modeling.config import Generation, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.lora import merge_lora
from trifold.pretrain.checkpoint import lease
from trifold.pretrain.checkpoint.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    OnEvent,
    newest_verified,
    open_checkpoint,
)
from trifold.pretrain.checkpoint.checkpoint import verify as verify_checkpoint
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import model_card, published_folder
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage import storage

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
    shard_bytes: int = published_folder.SHARD_BYTES,
) -> Path:
    """Publish a run's newest verified checkpoint, or that of step `checkpoint`, as the folder `out`. Returns
    `out`.

    `weights` are those of the moving average ("ema", the default where the checkpoint has them) or the
    "trained" ones. A newer checkpoint that was passed over is reported to `on_event`. Raises UserError where
    there is nothing to publish, no average was kept, `out` exists, no published architecture expresses the
    model, or the gate finds something wrong (each failed check by name).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not overwritten: give another folder, or move it away")
    source = initial_model_of(run, on_event, checkpoint)
    partial = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        reference = _write(run, source, _weights(source, weights), partial, DTYPES[dtype], shard_bytes)
        report = verify(partial, reference)
        if not report.ok:
            raise UserError(
                f"{out} was not published, because it is not what it should be: {report.failures}"
            )
        os.rename(partial, out)
        storage.sync_folder(out.parent)
    except (OSError, SafetensorError) as error:  # a full disk, most often
        said = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else str(error)
        raise UserError(f"{out} was not published: {said}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def initial_model_of(run: Path, on_event: OnEvent, checkpoint: int | None) -> Checkpoint:
    """The checkpoint to publish: that of a step, or the newest that verifies. Raises UserError where there is
    none.
    """
    return _newest(run, on_event) if checkpoint is None else _checkpoint_of_step(run, checkpoint)


def model_of(
    source: Checkpoint, weights: Weights | None = None
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A checkpoint's model, its adapters merged in; `weights` as for `publish`."""
    config = ModelConfig.model_validate_json(
        json.dumps(source.state.extra.get("model") or source.state.config["model"])
    )
    ema = _weights(source, weights) == "ema"
    averaged = {
        name for name in source.names if ema and "ema" in source.keys(name)
    }  # frozen ones have no average
    state = {name: source.full(name, "ema" if name in averaged else "fp32") for name in source.names}
    scale = source.state.extra.get("lora_scale")
    return config, state if scale is None else merge_lora(state, scale)


def _newest(run: Path, on_event: OnEvent) -> Checkpoint:
    source = newest_verified(lease.checkpoint_root_of_run(run), on_event)
    if source is None:
        raise UserError(
            f"{run} has no checkpoint to publish: train it first (trifold pretrain), at least until"
            " checkpoints.every steps"
        )
    return source


def _checkpoint_of_step(run: Path, step: int) -> Checkpoint:
    committed = lease.valid_folders(lease.checkpoint_root_of_run(run))
    folders = [folder for folder in committed if lease.parse_folder_name(folder.name)[1] == step]
    if not folders:
        have = ", ".join(str(lease.parse_folder_name(folder.name)[1]) for folder in committed) or "none"
        raise UserError(f"{run} has no checkpoint of step {step}; there are those of: {have}")
    try:
        verify_checkpoint(folders[-1])
        return open_checkpoint(folders[-1])
    except CorruptCheckpoint as error:
        raise UserError(f"{folders[-1]} cannot be published: {error}") from None


def _weights(source: Checkpoint, asked: Weights | None) -> Weights:
    """Which weights to publish."""
    kept = any("ema" in source.keys(name) for name in source.names)
    if asked == "ema" and not kept:
        raise UserError(
            f"{source.folder} holds no averaged weights, because its recipe's `ema` was 0: publish the"
            " trained ones"
        )
    return asked or ("ema" if kept else "trained")


def _write(
    run: Path, source: Checkpoint, weights: Weights, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Everything that a published folder holds. Returns the model it was made of."""
    config, state = model_of(source, weights)
    tokenizer = Tokenizer.open(run / "tokenizer")
    told = source.state.config.get("generation")
    how = None if told is None else Generation.model_validate_json(json.dumps(told))
    hf = published_folder.write_folder(folder, config, state, tokenizer, dtype, shard_bytes, how)
    origin = {
        "checkpoint": {
            "name": source.folder.name,
            "sha256": source.record["sha256"],
            "time": source.record["time"],
        },
        "weights": weights,
        "code": source.record["code"],
        "versions": source.record["versions"],
        "task": source.state.extra.get("task"),
    }
    record = published_folder.write_record(folder, config, tokenizer, source.state.fingerprint, origin)
    (folder / published_folder.CARD).write_text(
        model_card.render(run, source, record, hf["architectures"][0]), encoding="utf-8"
    )
    return config, state
