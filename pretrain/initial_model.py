"""Where a run begins: in, the `model` of a recipe; out, the model's shape and its weights, from a published
folder or new; its tokenizer.

Pretraining and fine-tuning both begin here. The folder must stay as it is while the run lives: its
fingerprint stands in every checkpoint.
"""

import fcntl
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.checkpoint.checkpoint import Checkpoint
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.config.pretraining import InitialModelConfig
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import published_folder
from trifold.pretrain.storage.storage import checkpoint_root


def load_initial_model(
    model: ModelConfig | InitialModelConfig, run: Path
) -> tuple[ModelConfig, dict[str, Tensor] | None]:
    """The model that a run starts from, with the head that it has, and its weights (fp32, by name); None for
    new ones.

    Raises UserError for a folder that is not whole, and one whose tokenizer is not the one it was trained with,
    or not the run's.
    """
    if isinstance(model, ModelConfig):
        return model, None
    dropout = {"dropout": model.dropout, "label_smoothing": model.label_smoothing}
    if model.folder is None:
        assert model.config is not None
        return model.config.model_copy(update=dropout), None
    folder = Path(model.folder)
    shape, state = published_folder.load_model(folder)
    found = published_folder.open_tokenizer(folder).fingerprint
    own = run / "tokenizer"
    if own.exists() and (mine := Tokenizer.open(own).fingerprint) != found:
        raise UserError(
            f"{own} has the fingerprint {mine}, and {folder} has {found}: give another `run` folder."
        )
    return shape.model_copy(update=dropout), None if model.random else state


def ensure_tokenizer(
    config: TrainingConfig,
    origin: Callable[[], Any],
    make: Callable[[Path], Any],
    progress: Callable[[str, int], None],
) -> Tokenizer:
    """The run's tokenizer: what stands in its folder. `make` writes it where there is none, and anew where
    `origin`, plain values that say what it is made of, has changed before a checkpoint was saved: later the
    rows' fingerprint refuses other text.
    """
    run = Path(config.run)
    folder, fresh = run / "tokenizer", run / "tokenizer.incomplete"
    run.mkdir(parents=True, exist_ok=True)
    with (run / "tokenizer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and uses what the first made
        if not folder.exists() or not valid_folders(checkpoint_root(run, config.checkpoints.storage)):
            made_of = sha256(json.dumps(origin()).encode()).hexdigest()
            if not (folder / "made-of").exists() or (folder / "made-of").read_text() != made_of:
                progress(
                    "making the tokenizer" + " anew: what it is made of has changed" * folder.exists(), 0
                )
                shutil.rmtree(fresh, ignore_errors=True)
                make(fresh)
                (fresh / "made-of").write_text(made_of)
                shutil.rmtree(folder, ignore_errors=True)
                fresh.rename(folder)
    return Tokenizer.open(folder)


def build_initialised(config: ModelConfig, state: dict[str, Tensor] | None, seed: int) -> Transformer:
    """New weights, keyed by (seed, name), and over them all that `state` has for this model: another head is
    new.
    """
    made = build(config, seed)
    if state is not None:
        new = made.state_dict()
        assert all(name.startswith("head.") for name in new.keys() - state.keys()), sorted(
            new.keys() - state.keys()
        )
        made.load_state_dict(
            {
                n: state[n] if n in state and state[n].shape == value.shape else value
                for n, value in new.items()
            }
        )
    return made


def fingerprint(model: ModelConfig | InitialModelConfig) -> str | None:
    """Of the config and the weights of the folder that a run starts from; None where it starts from no
    folder. Costs a read of them.
    """
    if isinstance(model, ModelConfig) or model.folder is None:
        return None
    files = published_folder.measure(Path(model.folder))
    weights = {
        name: file["sha256"]
        for name, file in files.items()
        if name == "config.json" or name.endswith(".safetensors")
    }
    return sha256(repr(sorted(weights.items())).encode()).hexdigest()[:32]


def check_same_start(
    checkpoint: Checkpoint, model: ModelConfig | InitialModelConfig, found: str | None
) -> None:
    """Raises UserError where a run that is to be continued started from another folder than `found` is the
    fingerprint of.
    """
    began = checkpoint.state.extra.get("start", found)  # runs of before it was written down go on
    if began != found:
        folder = None if isinstance(model, ModelConfig) else model.folder
        raise UserError(
            f"{checkpoint.folder} comes from a run that started from weights of fingerprint {began}, and"
            f" {folder} has {found}: restore that"
            " folder, or give another `run` folder."
        )
