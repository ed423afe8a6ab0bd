"""Published architectures: ModelConfig and state dict -> stock config and tensors, and back. One file per
architecture.

`export` takes the first architecture that expresses the model; which one does is found by writing its config
and reading it back: a dial that does not return is one it cannot say. `restore` asks the same of a stock
config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from trifold.modeling.config import Generation, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface.bart import BART
from trifold.modeling.huggingface.bert import BERT, BERT_SPANS, BERT_TOKENS
from trifold.modeling.huggingface.fields import lost, token_roles, unexpressed
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
class Found:
    """A stock folder as we read it."""

    architecture: Architecture
    config: ModelConfig
    state: dict[str, Tensor]  # fp32, ours by name
    dropped: list[str]  # the folder's tensors that the architecture does not have
    fresh: list[str]  # our tensors that the folder has none for: a bare class has no head


def export(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    special: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(stock config, stock state dict) of a model. `special` gives the ids of pad, bos and eos.

    Raises UserError naming the dial when no published architecture expresses the config.
    """
    architecture, hf = express(config, special)
    stock = to_stock(architecture.table, config, state)
    return {**hf, "dtype": str(dtype).removeprefix("torch.")}, {
        name: tensor.to(dtype) for name, tensor in stock.items()
    }


def restore(
    hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, fp32 state dict) of a stock folder's config.json and tensors: what `recognise` finds, where
    only the model matters.
    """
    found = recognise(hf_config, hf_state)
    return found.config, found.state


def recognise(hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]) -> Found:
    """A stock folder's config.json and tensors. A head that a bare class lacks begins fresh (seed 0).

    Raises UserError naming the setting that Trifold does not have, or the tensor that is missing, unexpected or
    of another shape.
    """
    architecture, config = understand(hf_config)
    named = known_names(architecture.table, architecture.prefix, config, hf_state)
    if config.tie_embeddings and _own_head(architecture, config, named):
        config = config.model_copy(update={"tie_embeddings": False})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    bare = hf_config["architectures"][0] in architecture.also
    state, dropped = from_stock(architecture.table, config, shapes, named, headless=bare)
    fresh = sorted(shapes.keys() - state.keys())
    for name in fresh:
        reset(name, state.setdefault(name, torch.empty(shapes[name])), config, seed=0)
    return Found(architecture, config, state, dropped, fresh)


def _own_head(architecture: Architecture, config: ModelConfig, named: Mapping[str, Tensor]) -> bool:
    """Whether the folder holds a head beside the embeddings that is not their copy. Stock classes then do not
    tie, whatever is said.
    """
    spelled = reversed(
        list(spell(architecture.table, config))
    )  # the first name of a tensor is its own, later ones are copies
    of = {source: named[line.stock] for line in spelled for source in line.sources if line.stock in named}
    return (
        "head.weight" in of
        and "embed.weight" in of
        and not torch.equal(of["head.weight"], of["embed.weight"])
    )


def decoding(hf_config: Mapping[str, Any], hf_generation: Mapping[str, Any]) -> Generation:
    """How a stock folder writes text, from config.json and generation_config.json (which wins)."""
    fields = {**hf_config, **hf_generation}
    if not fields.get("is_encoder_decoder"):  # stock decoders force an end only where this file says so
        fields["forced_eos_token_id"] = hf_generation.get("forced_eos_token_id")
    return read_generation(fields, token_roles(fields))


def express(config: ModelConfig, special: Mapping[str, int]) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that publishes a model, and its stock config. Raises UserError naming the dial that none
    has.
    """
    refusals = []
    for architecture in ARCHITECTURES:
        try:
            hf = architecture.write(config, special)
            said = ModelConfig.model_construct(**architecture.read(architecture.complete(hf)))
        except UserError as reason:
            refusals.append(
                (50, f"{architecture.stock_class}: {reason}")
            )  # further away than one that lacks a few dials
            continue
        dials = lost(config, said)
        if not dials:
            return architecture, hf
        refusals.append(
            (
                len(dials) + 100 * (said.family != config.family),
                f"{architecture.stock_class} has no {', '.join(dials)}",
            )
        )
    raise UserError(f"no published architecture expresses this model; the nearest, {min(refusals)[1]}")


def understand(hf_config: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture of a stock config and the model it means. Raises UserError naming a setting that Trifold
    does not have.
    """
    named = hf_config.get("architectures") or [None]
    known = {
        name: architecture
        for architecture in ARCHITECTURES
        for name in (architecture.stock_class, *architecture.also)
    }
    if named[0] not in known:
        raise UserError(f"config.json names the architecture {named[0]}; Trifold reads {', '.join(known)}")
    architecture = known[named[0]]
    try:
        hf = architecture.complete(dict(hf_config))
        config = ModelConfig(**architecture.read(hf))
    except KeyError as missing:
        raise UserError(f"config.json of {named[0]} lacks {missing.args[0]}") from None
    except ValidationError as error:
        raise UserError(
            f"config.json of {named[0]} means no model that Trifold has: {error.errors()[0]['msg']}"
        ) from None
    for clause in unexpressed(hf, architecture.write(config, token_roles(hf))):
        raise UserError(f"config.json of {named[0]} {clause}")
    return architecture, config
