"""Published architectures: ModelConfig and state dict -> stock config and tensors, and back. One file per architecture.

`export` takes the first architecture that expresses the model; which one does is found by writing its config and reading it
back: a dial that does not return is one it cannot say. `restore` asks the same of a stock config.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from modeling.config import ModelConfig, Refused
from modeling.huggingface.fields import lost, unexpressed
from modeling.huggingface.llama import LLAMA, LLAMA_SPANS, LLAMA_TOKENS
from modeling.huggingface.modernbert import MODERNBERT, MODERNBERT_SPANS, MODERNBERT_TOKENS
from modeling.huggingface.t5gemma import T5GEMMA, T5GEMMA_TOKENS
from modeling.huggingface.tables import Architecture, from_stock, to_stock
from modeling.transformer import Transformer

ARCHITECTURES = (
    *(LLAMA, MODERNBERT, T5GEMMA),
    *(LLAMA_TOKENS, MODERNBERT_TOKENS, T5GEMMA_TOKENS),
    *(LLAMA_SPANS, MODERNBERT_SPANS),
)


def export(
    config: ModelConfig, state: Mapping[str, Tensor], special: Mapping[str, int], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(stock config, stock state dict) of a model. `special` gives the ids of pad, bos and eos.

    Raises Refused naming the dial when no published architecture expresses the config.
    """
    architecture, hf = express(config, special)
    stock = to_stock(architecture.table, config, state)
    return {**hf, "dtype": str(dtype).removeprefix("torch.")}, {name: tensor.to(dtype) for name, tensor in stock.items()}


def restore(hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, fp32 state dict) of a stock folder's config.json and tensors.

    Raises Refused naming the setting that Trifold does not have, or the tensor that is missing, unexpected or of another shape.
    """
    architecture, config = understand(hf_config)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    return config, from_stock(architecture.table, config, shapes, hf_state)


def express(config: ModelConfig, special: Mapping[str, int]) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that publishes a model, and its stock config. Raises Refused naming the dial that none has."""
    refusals = []
    for architecture in ARCHITECTURES:
        try:
            hf = architecture.write(config, special)
            said = ModelConfig.model_construct(**architecture.read(architecture.complete(hf)))
        except Refused as reason:
            refusals.append((1, f"{architecture.stock_class}: {reason}"))
            continue
        dials = lost(config, said)
        if not dials:
            return architecture, hf
        refusals.append((len(dials) + 100 * (said.family != config.family), f"{architecture.stock_class} has no {', '.join(dials)}"))
    raise Refused(f"no published architecture expresses this model; the nearest, {min(refusals)[1]}")


def understand(hf_config: Mapping[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture of a stock config and the model it means. Raises Refused naming a setting that Trifold does not have."""
    named = hf_config.get("architectures") or [None]
    known = {architecture.stock_class: architecture for architecture in ARCHITECTURES}
    if named[0] not in known:
        raise Refused(f"config.json names the architecture {named[0]}; Trifold reads {', '.join(known)}")
    architecture = known[named[0]]
    try:
        hf = architecture.complete(dict(hf_config))
        config = ModelConfig(**architecture.read(hf))
    except KeyError as missing:
        raise Refused(f"config.json of {named[0]} lacks {missing.args[0]}") from None
    except ValidationError as error:
        raise Refused(f"config.json of {named[0]} means no model that Trifold has: {error.errors()[0]['msg']}") from None
    for clause in unexpressed(hf, architecture.write(config, {"pad": 0, "bos": 0, "eos": 0})):
        raise Refused(f"config.json of {named[0]} {clause}")
    return architecture, config
