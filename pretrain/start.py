"""Where a run begins: in, the `model` of a recipe; out, the model's shape and its weights, from a published folder or new.

Pretraining and fine-tuning both begin here. The folder must stay as it is while the run lives: its fingerprint stands in every checkpoint.
"""

from hashlib import sha256
from pathlib import Path

from torch import Tensor

from modeling.config import ModelConfig, Refused
from modeling.transformer import Transformer, build
from pretrain import published
from pretrain.checkpoint import Checkpoint
from pretrain.config import Start
from pretrain.tokenizer import Tokenizer


def begin(model: ModelConfig | Start, run: Path) -> tuple[ModelConfig, dict[str, Tensor] | None]:
    """The model that a run starts from, with the head that it has, and its weights (fp32, by name); None for new ones.

    Raises Refused for a folder that is not whole, and one whose tokenizer is not the one it was trained with, or not the run's.
    """
    if isinstance(model, ModelConfig):
        return model, None
    dropout = {"dropout": model.dropout, "label_smoothing": model.label_smoothing}
    if model.folder is None:
        assert model.config is not None
        return model.config.model_copy(update=dropout), None
    folder = Path(model.folder)
    shape, state = published.load(folder)
    found = published.tokenizer(folder).fingerprint
    own = run / "tokenizer"
    if own.exists() and (mine := Tokenizer.open(own).fingerprint) != found:
        raise Refused(f"{own} has the fingerprint {mine}, and {folder} has {found}: give another `run` folder.")
    return shape.model_copy(update=dropout), None if model.random else state


def initialised(config: ModelConfig, state: dict[str, Tensor] | None, seed: int) -> Transformer:
    """New weights, keyed by (seed, name), and over them all that `state` has for this model: another head is new."""
    made = build(config, seed)
    if state is not None:
        new = made.state_dict()
        assert all(name.startswith("head.") for name in new.keys() - state.keys()), sorted(new.keys() - state.keys())
        made.load_state_dict({n: state[n] if n in state and state[n].shape == value.shape else value for n, value in new.items()})
    return made


def fingerprint(model: ModelConfig | Start) -> str | None:
    """Of the config and the weights of the folder that a run starts from; None where it starts from no folder. Costs a read of them."""
    if isinstance(model, ModelConfig) or model.folder is None:
        return None
    files = published.measure(Path(model.folder))
    weights = {name: file["sha256"] for name, file in files.items() if name == "config.json" or name.endswith(".safetensors")}
    return sha256(repr(sorted(weights.items())).encode()).hexdigest()[:32]


def check(checkpoint: Checkpoint, model: ModelConfig | Start, found: str | None) -> None:
    """Raises Refused where a run that is to be continued started from another folder than `found` is the fingerprint of."""
    began = checkpoint.state.extra.get("start", found)  # runs of before it was written down go on
    if began != found:
        folder = None if isinstance(model, ModelConfig) else model.folder
        raise Refused(
            f"{checkpoint.folder} comes from a run that started from weights of fingerprint {began}, and {folder} has {found}: restore that"
            " folder, or give another `run` folder."
        )
