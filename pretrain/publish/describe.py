"""What Trifold reads of anybody's folder, in words: a folder comes in, the lines of `trifold import FOLDER`
go out.

Nothing is written. Cost: the weights are read once, as training from the folder would read them.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import num_parameters
from trifold.modeling.huggingface import ImportedModel, express
from trifold.modeling.huggingface.fields import token_roles
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import published_folder, weights
from trifold.pretrain.publish.carried import carried_files, carried_tensors
from trifold.pretrain.storage.json_files import read_json_object

_NORM_PLACES = {
    "pre": "before each layer",
    "inner": "after each layer, inside the sum",
    "post": "after each sum",
}
_DEFAULT_SCALES = {"attention": None, "embeddings": 1.0, "logits": 1.0}


def describe(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (property, value) lines about a folder that stock classes load.

    Raises UserError naming the file, setting or tensor that does not fit; weights in a pickle are not read.
    """
    stock_config, tensors = published_folder.read_config(folder), weights.read_tensors(folder)
    found = published_folder.recognise_folder(folder, stock_config, tensors)
    config, stock_class = found.config, found.architecture.stock_class

    yield "architecture", f"{stock_config['architectures'][0]}, read as {stock_class}: {config.family}"
    yield from _shape(config)
    yield "parameters", f"{num_parameters(config):,} ({_dtypes(tensors)})"
    if dropped := [name for name in found.dropped if name not in carried_tensors(found, tensors)]:
        yield "dropped", f"{', '.join(dropped)}: {stock_class} has no such tensors"
    if others := [*map(str, carried_files(folder)), *carried_tensors(found, tensors)]:
        yield "carried", f"{', '.join(others)}: not trained, and published again as they are"
    if found.fresh:
        yield "initialised", f"{', '.join(found.fresh)}: the folder has no weights for them"
    yield "dropout", f"{config.dropout:g}, in training too unless the recipe sets model.dropout"
    if found.untrained:
        yield (
            "not used",
            f"{', '.join(found.untrained)}: Trifold has dropout of sublayers and embeddings alone",
        )
    yield from _tokenizer(folder)
    yield "publishable", _publishable(found, token_roles(stock_config))


def _shape(config: ModelConfig) -> Iterator[tuple[str, str]]:
    is_both = config.family == "encoder-decoder"
    stacks = f"two stacks of {config.num_layers}" if is_both else str(config.num_layers)
    groups = "" if config.num_kv_heads == config.num_heads else f" in {config.num_kv_heads} groups"
    yield "layers", f"{stacks}, dim {config.dim}, {config.num_heads} heads of {config.head_dim}{groups}"

    gate, biases = ("gated " if config.gated else ""), ("biases" if config.bias else "no biases")
    yield "feed-forward", f"{config.mlp_dim}, {gate}{config.activation}, {biases}"
    yield "norms", f"{config.norm} (eps {config.norm_eps:g}) {', '.join(_norm_places(config))}"

    offset = f", counted from {config.position_offset}" if config.position_offset else ""
    yield "positions", f"{config.position}, at most {config.max_positions}{offset}"
    if config.local_window:
        every = config.global_every
        yield "window", f"{config.local_window} keys to each side; layers 0, {every}, ... see all"
    if scales := _scales(config):
        yield "scaled", ", ".join(scales)
    types = f", {config.token_types} token types" if config.token_types else ""
    yield "vocabulary", f"{config.vocab_size} rows{types}"
    yield "head", _head(config)


def _norm_places(config: ModelConfig) -> list[str]:
    places = [_NORM_PLACES[place] for place in config.norm_places]
    if config.embed_norm:
        places.append("on the embeddings")
    if config.final_norm:
        places.append("at the end")
    return places


def _scales(config: ModelConfig) -> list[str]:
    """The scales that differ from the usual ones."""
    scales = {
        "attention": config.attention_scale,
        "embeddings": config.embed_scale,
        "logits": config.logit_scale,
    }
    return [f"{name} by {scale:.4g}" for name, scale in scales.items() if scale != _DEFAULT_SCALES[name]]


def _head(config: ModelConfig) -> str:
    if config.labels:
        return f"labels {', '.join(config.labels)}"
    if config.outputs:
        return "start and end of an answer"
    tied = "tied to the embeddings" if config.tie_embeddings else "separate weights"
    dense = ", after a dense layer" if config.head_dense else ""
    bias = {True: ", with a bias", False: "", "fixed": ", with a bias that is not trained"}[config.logit_bias]
    return tied + dense + bias


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return f"{', '.join(dtypes)} in {len(tensors)} tensors"


def _tokenizer(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        tokenizer = Tokenizer.open(folder)
    except UserError as reason:
        yield "tokenizer", f"none that Trifold can use: {reason}"
        yield "trainable", "no: it has no tokenizer"
        return
    kind = read_json_object(folder / "tokenizer.json")["model"]["type"]
    yield "tokenizer", f"{kind}, {tokenizer.vocab_size} tokens"
    yield "trainable", f"yes: trifold pretrain CONFIG {shlex.quote(f'model.from={folder}')}"


def _publishable(found: ImportedModel, special: Mapping[str, int]) -> str:
    try:
        architecture, _ = express(found.config, special)
    except UserError as reason:
        return f"no: {reason}"
    return f"yes, as {architecture.stock_class}"
