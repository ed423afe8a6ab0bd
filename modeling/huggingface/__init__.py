"""Published architectures: ModelConfig and state dict -> stock config and tensors, and back.

A model comes in as (ModelConfig, state dict) and leaves as config.json's content and stock tensors
(`export`), or the other way round (`recognise`, `restore`). Each architecture has a file with its name table
and its config in both directions; tables.py reads the tables, fields.py has what the configs share,
task_heads.py the classes with labels or spans, generation.py generation_config.json, and adapters.py PEFT's
adapters.

`export` takes the first architecture that expresses the model. Which one does is found by writing its config
and reading it back: a field that does not return cannot be expressed. `recognise` does the same with a stock
config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.huggingface.bart import BART
from trifold.modeling.huggingface.bert import BERT, BERT_SPANS, BERT_TOKENS
from trifold.modeling.huggingface.fields import (
    check_sizes,
    lost,
    other_dropouts,
    token_roles,
    unexpressed,
)
from trifold.modeling.huggingface.generation import read_generation
from trifold.modeling.huggingface.gpt2 import GPT2, GPT2_SPANS, GPT2_TOKENS
from trifold.modeling.huggingface.llama import LLAMA, LLAMA_SPANS, LLAMA_TOKENS
from trifold.modeling.huggingface.m2m100 import M2M100
from trifold.modeling.huggingface.mbart import MBART
from trifold.modeling.huggingface.modernbert import MODERNBERT, MODERNBERT_SPANS, MODERNBERT_TOKENS
from trifold.modeling.huggingface.recurrent import RECURRENT
from trifold.modeling.huggingface.roberta import ROBERTA, ROBERTA_SPANS, ROBERTA_TOKENS
from trifold.modeling.huggingface.t5 import T5
from trifold.modeling.huggingface.t5gemma import T5GEMMA, T5GEMMA_TOKENS
from trifold.modeling.huggingface.tables import Architecture, from_stock, known_names, spell, to_stock
from trifold.modeling.transformer import Transformer, reset

ARCHITECTURES = (
    RECURRENT,
    *(LLAMA, MODERNBERT, T5GEMMA),
    *(GPT2, BERT, ROBERTA, T5, BART, MBART, M2M100),
    *(LLAMA_TOKENS, MODERNBERT_TOKENS, T5GEMMA_TOKENS, GPT2_TOKENS, BERT_TOKENS, ROBERTA_TOKENS),
    *(LLAMA_SPANS, MODERNBERT_SPANS, GPT2_SPANS, BERT_SPANS, ROBERTA_SPANS),
)


@dataclass(frozen=True)
class ImportedModel:
    """A stock folder as Trifold reads it."""

    architecture: Architecture
    config: ModelConfig
    state: dict[str, Tensor]  # fp32, by our names
    dropped: list[str]  # tensors of the folder that the architecture does not have
    fresh: list[str]  # tensors of ours that the folder lacks: the head of a bare class
    untrained: list[str]  # dropout settings of the folder, `field = value`, that Trifold does not have


def export(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    special: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(stock config, stock state dict) of a model. `special` has the ids of pad, bos and eos.

    Raises UserError naming the field when no published architecture expresses the config.
    """
    architecture, hf = express(config, special)
    stock = to_stock(architecture.table, config, state)
    dtype_name = str(dtype).removeprefix("torch.")
    return {**hf, "dtype": dtype_name}, {name: tensor.to(dtype) for name, tensor in stock.items()}


def restore(
    hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, fp32 state dict) of a stock folder's config.json and tensors, by `recognise`."""
    imported = recognise(hf_config, hf_state)
    return imported.config, imported.state


def recognise(hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]) -> ImportedModel:
    """A stock folder's config.json and tensors. The head that a bare class lacks is initialised (seed 0).

    Raises UserError naming the setting that Trifold does not have, or the tensor that is missing, unexpected
    or of another shape.
    """
    architecture, config = understand(hf_config)
    named = known_names(architecture.table, architecture.prefix, config, hf_state)
    if config.tie_embeddings and _has_untied_head(architecture, config, named):
        config = config.model_copy(update={"tie_embeddings": False})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}

    bare = hf_config["architectures"][0] in architecture.also
    state, dropped = from_stock(architecture.table, config, shapes, named, headless=bare)
    fresh = sorted(shapes.keys() - state.keys())
    for name in fresh:
        state[name] = torch.empty(shapes[name])
        reset(name, state[name], config, seed=0)
    untrained = other_dropouts(hf_config, architecture.dropout)
    return ImportedModel(architecture, config, state, dropped, fresh, untrained)


def _has_untied_head(architecture: Architecture, config: ModelConfig, named: Mapping[str, Tensor]) -> bool:
    """Whether the folder's head differs from its embeddings: stock classes then never tie them."""
    tensors: dict[str, Tensor] = {}
    for line in spell(architecture.table, config):
        for source in line.sources:
            if line.stock in named:
                tensors.setdefault(source, named[line.stock])  # the first name is the tensor's own
    head, embed = tensors.get("head.weight"), tensors.get("embed.weight")
    return head is not None and embed is not None and not torch.equal(head, embed)


def decoding(hf_config: Mapping[str, Any], hf_generation: Mapping[str, Any]) -> Generation:
    """A stock folder's generation settings: those of generation_config.json over those of config.json."""
    settings = {**hf_config, **hf_generation}
    if not settings.get("is_encoder_decoder"):  # stock decoders force an end only where this file says so
        settings["forced_eos_token_id"] = hf_generation.get("forced_eos_token_id")
    return read_generation(settings, token_roles(settings))


def express(config: ModelConfig, special: Mapping[str, int]) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that publishes a model, and its stock config.

    Raises UserError naming the fields that the nearest architecture lacks.
    """
    rejections = []
    for architecture in ARCHITECTURES:
        try:
            hf = architecture.write(config, special)
            expressed = ModelConfig.model_construct(**architecture.read(architecture.complete(hf)))
        except UserError as reason:
            # Further away than one that lacks a few fields.
            rejections.append((50, f"{architecture.stock_class}: {reason}"))
            continue
        fields = lost(config, expressed)
        if not fields:
            return architecture, hf
        distance = len(fields) + 100 * (expressed.family != config.family)
        rejections.append((distance, f"{architecture.stock_class} has no {', '.join(fields)}"))
    _, nearest = min(rejections)
    raise UserError(f"no published architecture expresses this model; the nearest, {nearest}")


def understand(hf_config: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture of a stock config and the model it describes.

    Raises UserError naming a setting that Trifold does not have, or a size that no model has.
    """
    names = hf_config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = {
        stock_class: architecture
        for architecture in ARCHITECTURES
        for stock_class in (architecture.stock_class, *architecture.also)
    }
    if not isinstance(name, str) or name not in known:
        raise UserError(f"config.json names the architecture {name}; Trifold reads {', '.join(known)}")
    architecture = known[name]
    check_sizes(hf_config, allow_zero=architecture is RECURRENT)  # its sizes of attention are 0
    try:
        hf = architecture.complete(dict(hf_config))
        config = ModelConfig(**architecture.read(hf))
        clauses = list(unexpressed(hf, _rewritten(architecture, config, hf)))
    except KeyError as missing:
        raise UserError(f"config.json of {name} lacks {missing.args[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its settings"
        raise UserError(
            f"config.json of {name} describes no model that Trifold has: {field}: {first['msg']}"
        ) from None
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json of {name} has a value of the wrong kind: {error}") from None
    if clauses:
        raise UserError(f"config.json of {name} {clauses[0]}")
    return architecture, config


def _rewritten(architecture: Architecture, config: ModelConfig, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The stock config of a model that was read from `hf`."""
    try:
        return architecture.write(config, token_roles(hf))
    except UserError as reason:
        raise UserError(
            f"config.json of {architecture.stock_class} describes a model whose {reason}"
        ) from None
