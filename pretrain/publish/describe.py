"""What Trifold reads of anybody's folder, in words: in, a folder; out, the lines that `trifold import FOLDER`
prints.

Nothing is written. Cost: the weights are read once, as training from the folder would read them.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import num_parameters
from trifold.modeling.huggingface import Found, express, recognise
from trifold.modeling.huggingface.fields import token_roles
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import published_folder

_NORMS = {"pre": "before each layer", "inner": "after each layer, inside the sum", "post": "after each sum"}


def describe(folder: Path) -> Iterator[tuple[str, str]]:
    """(what, in words) of a folder that stock classes load.

    Raises UserError naming the file, setting or tensor that does not fit; weights that are a pickle are not
    read.
    """
    hf, tensors = published_folder.read_json(folder / "config.json"), published_folder.read_tensors(folder)
    found = recognise(hf, tensors)
    config = found.config
    yield (
        "architecture",
        f"{hf['architectures'][0]}, read as {found.architecture.stock_class}: {config.family}",
    )
    yield from _shape(config)
    yield "parameters", f"{num_parameters(config):,} ({_kinds(tensors)})"
    if found.dropped:
        yield "dropped", f"{', '.join(found.dropped)}: {found.architecture.stock_class} has no such part"
    if found.fresh:
        yield "not there", f"{', '.join(found.fresh)}: a head begins new"
    yield from _tokenizer(folder)
    yield "published again", _publishable(found, token_roles(hf))


def _shape(config: ModelConfig) -> Iterator[tuple[str, str]]:
    groups = "" if config.num_kv_heads == config.num_heads else f" in {config.num_kv_heads} groups"
    stacks = (
        f"two stacks of {config.num_layers}" if config.family == "encoder-decoder" else str(config.num_layers)
    )
    yield "layers", f"{stacks}, dim {config.dim}, {config.num_heads} heads of {config.head_dim}{groups}"
    gate = "gated " if config.gated else ""
    yield (
        "feed-forward",
        f"{config.mlp_dim}, {gate}{config.activation}{', biases' if config.bias else ', no biases'}",
    )
    places = [_NORMS[place] for place in config.norm_places]
    around = [
        name
        for name, there in (("on the embeddings", config.embed_norm), ("at the end", config.final_norm))
        if there
    ]
    yield "norms", f"{config.norm} (eps {config.norm_eps:g}) {', '.join(places + around)}"
    offset = f", counted from {config.position_offset}" if config.position_offset else ""
    yield "positions", f"{config.position}, at most {config.max_positions}{offset}"
    if config.local_window:
        yield (
            "window",
            f"{config.local_window} keys to each side; layers 0, {config.global_every}, ... see all",
        )
    usual = {"attention": None, "embeddings": 1.0, "logits": 1.0}
    scales = {
        "attention": config.attention_scale,
        "embeddings": config.embed_scale,
        "logits": config.logit_scale,
    }
    if said := [f"{name} by {scale:.4g}" for name, scale in scales.items() if scale != usual[name]]:
        yield "scaled", ", ".join(said)
    types = f", {config.token_types} token types (the first is read)" if config.token_types else ""
    yield "vocabulary", f"{config.vocab_size} rows{types}"
    yield "head", _head(config)


def _head(config: ModelConfig) -> str:
    if config.outputs:
        return f"labels {', '.join(config.labels)}" if config.labels else "where an answer begins and ends"
    dense = ", after a dense layer" if config.head_dense else ""
    bias = {True: ", with a bias", False: "", "fixed": ", with a bias that is not trained"}[config.logit_bias]
    return ("tied to the embeddings" if config.tie_embeddings else "its own") + dense + bias


def _kinds(tensors: Mapping[str, Tensor]) -> str:
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return f"{', '.join(kinds)} in {len(tensors)} tensors"


def _tokenizer(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        tokenizer = Tokenizer.open(folder)
    except UserError as reason:
        yield "tokenizer", f"none that Trifold can use: {reason}"
        yield "trained on", "not before it has one"
        return
    kind = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"]
    yield "tokenizer", f"{kind}, {tokenizer.vocab_size} pieces"
    yield "trained on", f"yes: trifold pretrain CONFIG {shlex.quote(f'model.from={folder}')}"


def _publishable(found: Found, special: Mapping[str, int]) -> str:
    try:
        architecture, _ = express(found.config, special)
    except UserError as reason:
        return f"no: {reason}"
    return f"yes, as {architecture.stock_class}"
