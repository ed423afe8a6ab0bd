"""Small published folders of random weights, for other people's programs to read."""

from pathlib import Path
from typing import Any

from tests.published import MODELS, random_model, tokenizer
from trifold.modeling.transformer import Transformer
from trifold.pretrain.publish import published_folder

LINES = ("Ada and Bob met by the river", "who knows why?", "town number 7", "  two  spaces, and tokyo 東京")


def write_random(folder: Path, name: str, **changes: Any) -> Transformer:
    """A model of tests/published.py in a folder as `publish` writes it. Returns the model."""
    model = random_model(MODELS[name].model_copy(update={"vocab_size": tokenizer().vocab_size, **changes}))
    folder.mkdir(parents=True)
    published_folder.write_folder(folder, model.config, model.state_dict(), tokenizer())
    return model
