"""Training compiled: in, a model before it is DeepSpeed's; out, the same, run as torch.compile's graphs
wherever there is a gradient.

At ZeRO-1 and -2 the whole model is one graph. At ZeRO-3 weights come and go by hooks around the calls of
modules, which no graph holds, so there each block is a leaf to DeepSpeed (zero.py): hooks gather all weights
of a block before its call and again before its backward, and what is compiled is the block's own `forward`
inside of them, one graph for all blocks of a kind. A graph keeps parameters for its backward, never a view or
a copy of a weight, so what ZeRO releases in between is freed (tests/pretrain/engine/test_compile.py).

Evaluation and generation have no gradient and are not compiled: another graph takes a minute, and in torch
2.11 FlexAttention without a gradient then reads memory that is not its own. Dropout draws the very numbers
that it draws uncompiled, so runs go on either way.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.block import Block
from trifold.modeling.transformer import Transformer

RECOMPILE_LIMIT = (
    64  # graphs of one function: kinds of block, times lengths of row; beyond it torch would go on uncompiled
)


def compile_whole(model: Transformer, cuda_graphs: bool) -> None:
    """The model as one graph; `cuda_graphs`: forward and backward are launched as one each."""
    model.forward = _training(model.forward, "reduce-overhead" if cuda_graphs else None)  # type: ignore[method-assign]


def compile_blocks(model: Transformer) -> None:
    """Each block, inside of the hooks that DeepSpeed will put around it."""
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(_with_gradient)
            module.forward = _training(module.forward, None)  # type: ignore[method-assign]


def restore_plain_linear() -> None:
    """Undo what DeepSpeed did to linear maps when it took the model at ZeRO-3, as its own DeepCompile does:
    its autograd function keeps a weight instead of a view of it, which graphs do by themselves, and looks at
    each weight's number, so that under torch 2.11 every block was another graph.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk


def _training(plain: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._inductor.config.fallback_random = True
    compiled = torch.compile(plain, dynamic=False, mode=mode)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _with_gradient(block: Block, args: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """What comes from frozen embeddings has no gradient, and DeepSpeed takes a leaf's backward for done
    before it began if its input has none: it reduces gradients that are not there yet, and lets go of weights
    that are still needed.
    """
    x_BTD, *shared = args
    if torch.is_grad_enabled() and not x_BTD.requires_grad:
        x_BTD = x_BTD.detach().requires_grad_()
    return x_BTD, *shared
