"""Matrix products inside blocks in fp8, by torchao: what `engine.fp8` does to a model.

The linear maps inside blocks multiply in 8 bits: inputs and weights as e4m3 (4 bits of significand),
gradients as e5m2 (3), each tensor scaled so that its largest element is the format's largest. Parameters,
their names and dtypes do not change, so masters, checkpoints and published folders are the same.
Embeddings, head, norms and attention stay in bf16. It pays when compiled, where the casts are fused into
the kernels around them.
"""

import logging

import torch
from torch import nn

from trifold.modeling.errors import UserError
from trifold.modeling.lora import LoraLinear
from trifold.modeling.transformer import Transformer
from trifold.pretrain.config.training import EngineConfig

# fp8 products require both sizes of a weight to be multiples of this; torchao pads the number of tokens
MULTIPLE = 16


def to_fp8(model: Transformer, engine: EngineConfig, device: str, emulate: bool = False) -> None:
    """Change the linear maps inside blocks. `emulate`, for tests: the same rounding, multiplied in fp32, on
    any device.

    Raises UserError where the device has no fp8, or another setting or a size of the model excludes it.
    """
    if not emulate:
        check_device(device)
        _check_capability()
    if engine.precision != "bf16":
        raise UserError(f"engine.fp8 requires engine.precision bf16, got {engine.precision}.")
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError(
            "engine.fp8 cannot be combined with lora, whose frozen weights and thin products gain nothing"
            " from it: remove one of them."
        )
    linear = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and ".blocks." in name
    }
    if not linear:
        raise UserError(
            f"engine.fp8 changes the linear maps of blocks, and a model of cell {model.config.cell} has none:"
            " set it to false."
        )
    for name, module in linear.items():
        rows, columns = module.weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            raise UserError(
                f"engine.fp8 requires sizes that are multiples of {MULTIPLE}, and {name}.weight is {rows} x"
                f" {columns}: change the model's dim, head_dim or mlp_dim, or set it to false."
            )

    # it would name each of its own kernels that this build of torch cannot load
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(
            "engine.fp8 needs Trifold's extra `fp8`: pip install -c constraints.txt -e '.[fp8]'"
        ) from error
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in linear)


def check_device(device: str) -> None:
    """Raises UserError for the CPU."""
    if device != "cuda":
        raise UserError(
            "engine.fp8 requires a GPU that multiplies in fp8 (compute capability 8.9), and this runs on the"
            " CPU: set it to false."
        )


def _check_capability() -> None:
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        raise UserError(
            f"engine.fp8 requires a GPU of compute capability 8.9, and {torch.cuda.get_device_name()} has"
            f" {capability[0]}.{capability[1]}: set it to false."
        )
