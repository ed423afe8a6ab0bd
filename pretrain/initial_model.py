"""The initial model of a run: its config, its weights (new, or from a published folder) and its tokenizer.

Both kinds of run start here. A published folder must not change while the run lives: every checkpoint
records its fingerprint.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import understand
from trifold.modeling.huggingface.fields import other_dropouts
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.checkpoint.checkpoint import Checkpoint
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.config.pretraining import InitialModelConfig, TokenizerConfig
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.data.tokenizer import tokenizer
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import carried, published_folder
from trifold.pretrain.storage.storage import checkpoint_root


def load_initial_model(
    model: ModelConfig | InitialModelConfig, run: Path
) -> tuple[ModelConfig, dict[str, Tensor] | None]:
    """The model that a run starts from, with its head, and its weights (fp32, by name); None for new weights.

    Raises UserError for a folder that is incomplete, or whose tokenizer is not the one that it was trained
    with, or not the run's.
    """
    if isinstance(model, ModelConfig):
        return model, None
    settings: dict[str, float] = {"label_smoothing": model.label_smoothing}
    if model.dropout is not None:
        settings["dropout"] = model.dropout
    if model.folder is None:
        assert model.config is not None
        return model.config.model_copy(update=settings), None
    folder = Path(model.folder)
    shape, state = published_folder.load_model(folder)
    published = published_folder.open_tokenizer(folder).fingerprint
    run_tokenizer = run / "tokenizer"
    if run_tokenizer.exists() and (own := Tokenizer.open(run_tokenizer).fingerprint) != published:
        raise UserError(
            f"{run_tokenizer} has the fingerprint {own}, and the tokenizer of {folder} has {published}: give"
            " another `run` folder."
        )
    return shape.model_copy(update=settings), None if model.random else state


def dropout_of(model: ModelConfig | InitialModelConfig) -> float:
    """The dropout that a run trains with: the recipe's, or else that of the folder that it starts from."""
    if model.dropout is not None:
        return model.dropout
    if model.folder is not None:
        return published_folder.load_config(Path(model.folder)).dropout
    assert model.config is not None
    return model.config.dropout


def start_notes(model: ModelConfig | InitialModelConfig) -> list[str]:
    """Sentences on the folder's dropout: what is trained with, and what Trifold does not have."""
    if isinstance(model, ModelConfig) or model.folder is None:
        return []
    stock_config = published_folder.read_config(Path(model.folder))
    architecture, _ = understand(stock_config)
    notes = []
    if model.dropout is None and (dropout := dropout_of(model)):
        notes.append(f"dropout {dropout:g}, as in {model.folder}; model.dropout in the recipe overrides it")
    unused = other_dropouts(stock_config, architecture.dropout)
    if unused:
        notes.append(f"{model.folder} sets {', '.join(unused)}, which Trifold does not train with")
    return notes


@dataclass(frozen=True)
class TokenizerSource:
    """Where a run's tokenizer comes from: a copy of the one at `path`, else trained on `texts`.

    `made_of` returns plain values that identify what it is trained on.
    """

    path: str | None
    family: Family  # of the model, for the settings that are saved beside a tokenizer
    texts: Callable[[], Iterable[str]]
    made_of: Callable[[], list[Any]]
    vocab_size: int


def ensure_tokenizer(
    config: TrainingConfig,
    settings: TokenizerConfig,
    source: TokenizerSource,
    progress: Callable[[str, int], None],
) -> Tokenizer:
    """The run's tokenizer, in its folder. It is made where there is none, and made again where its source has
    changed before a checkpoint was saved (later, the rows' fingerprint rejects other text).
    """
    run = Path(config.run)
    folder, temporary = run / "tokenizer", run / "tokenizer.incomplete"
    run.mkdir(parents=True, exist_ok=True)
    with (run / "tokenizer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and uses what the first made
        has_checkpoints = bool(valid_folders(checkpoint_root(run, config.checkpoints.storage)))
        if not folder.exists() or not has_checkpoints:
            made_of = _source_fingerprint(source, settings)
            record = folder / "made-of"
            if not record.exists() or record.read_text() != made_of:
                reason = " again: what it is made of has changed" if folder.exists() else ""
                progress(f"making the tokenizer{reason}", 0)
                shutil.rmtree(temporary, ignore_errors=True)
                if source.path is not None:
                    Tokenizer.open(source.path).save(temporary, source.family)
                else:
                    tokenizer.train(source.texts(), settings, source.vocab_size, temporary)
                (temporary / "made-of").write_text(made_of)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
    return Tokenizer.open(folder)


def _source_fingerprint(source: TokenizerSource, settings: TokenizerConfig) -> str:
    if source.path is not None:
        values: list[Any] = [Tokenizer.open(source.path).fingerprint, source.family]
    else:
        values = [settings.model_dump(), source.family, source.vocab_size, *source.made_of()]
    return sha256(json.dumps(values).encode()).hexdigest()


def carry_initial_folder(model: ModelConfig | InitialModelConfig, run: Path) -> None:
    """Keep what the initial folder holds and training does not use beside the run; publish writes it."""
    if isinstance(model, InitialModelConfig) and model.folder is not None and not model.random:
        carried.keep(Path(model.folder), run)


def build_initialised(config: ModelConfig, state: dict[str, Tensor] | None, seed: int) -> Transformer:
    """A model whose weights are `state`, and new where that lacks them or has another shape (a new head). New
    weights are a function of (seed, name).
    """
    model = build(config, seed)
    if state is not None:
        new = model.state_dict()
        missing = new.keys() - state.keys()
        assert all(name.startswith("head.") for name in missing), sorted(missing)
        fitting = {
            name: state[name] for name in new if name in state and state[name].shape == new[name].shape
        }
        model.load_state_dict({**new, **fitting})
    return model


def fingerprint(model: ModelConfig | InitialModelConfig) -> str | None:
    """The fingerprint of the config and the weights in the folder that a run starts from; None where it
    starts from none. Reads all of them.
    """
    if isinstance(model, ModelConfig) or model.folder is None:
        return None
    files = published_folder.measure(Path(model.folder))
    digests = [
        (name, file["sha256"])
        for name, file in sorted(files.items())
        if name == "config.json" or name.endswith(".safetensors")
    ]
    return sha256(repr(digests).encode()).hexdigest()[:32]


def check_same_start(
    checkpoint: Checkpoint, model: ModelConfig | InitialModelConfig, start: str | None
) -> None:
    """Raises UserError where the checkpoint's run started from other weights than those of fingerprint
    `start`.
    """
    recorded = checkpoint.state.start
    if recorded != start:
        folder = None if isinstance(model, ModelConfig) else model.folder
        raise UserError(
            f"{checkpoint.folder} comes from a run that started from weights of fingerprint {recorded}, and"
            f" {folder} has {start}: restore that folder, or give another `run` folder."
        )
