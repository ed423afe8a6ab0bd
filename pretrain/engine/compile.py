"""Training compiled by torch.compile: a model, before DeepSpeed takes it, is changed to run as graphs
wherever it computes gradients.

At ZeRO-1 and -2 the model is one graph. At ZeRO-3 weights are gathered and released by hooks around the
calls of modules, which no graph can contain, so each block is a leaf to DeepSpeed (zero/settings.py): hooks
gather all weights of a block before its call and again before its backward, and the block's own `forward`
inside them is compiled, one graph for all blocks of a kind. A graph keeps parameters for its backward,
never a view or a copy of a weight, so what ZeRO releases in between is freed
(tests/pretrain/engine/test_compile.py).

Evaluation and generation have no gradient and are not compiled: another graph takes a minute, and in torch
2.11 FlexAttention without a gradient then reads memory out of bounds. Dropout draws the same numbers as
uncompiled, so a run may change between both.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.block import Block
from trifold.modeling.transformer import Transformer

# graphs of one function: kinds of block, times lengths of row. Beyond it torch would continue uncompiled
RECOMPILE_LIMIT = 64


def compile_whole(model: Transformer, cuda_graphs: bool) -> None:
    """Compile the model as one graph. `cuda_graphs`: forward and backward are one launch each."""
    model.forward = _training(model.forward, "reduce-overhead" if cuda_graphs else None)  # type: ignore[method-assign]


def compile_blocks(model: Transformer) -> None:
    """Compile each block, inside the hooks that DeepSpeed will put around it."""
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(_with_gradient)
            module.forward = _training(module.forward, None)  # type: ignore[method-assign]


def restore_plain_linear() -> None:
    """Undo DeepSpeed's replacement of `linear` at ZeRO-3, as its own DeepCompile does.

    Its autograd function keeps a weight instead of a view of it, which graphs do anyway, and depends on the
    id of each weight, so that under torch 2.11 every block was compiled separately.
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
    """Make a block's input require a gradient, also where it comes from frozen embeddings.

    Otherwise DeepSpeed takes the leaf's backward as done before it began: it would reduce gradients that do
    not exist yet, and release weights that are still needed.
    """
    x_BTD, *shared = args
    if torch.is_grad_enabled() and not x_BTD.requires_grad:
        x_BTD = x_BTD.detach().requires_grad_()
    return x_BTD, *shared
