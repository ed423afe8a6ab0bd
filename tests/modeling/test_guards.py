"""Counts that no machine changes, so that a step cannot grow slower or larger unseen: graphs, operations,
bytes, host syncs.

The numbers were recorded on torch 2.13. Lower ones are welcome: write them down. Times stand in
docs/performance.md only.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.modeling.families import CONFIGS
from tests.modeling.operation_counts import Calls, batch
from trifold.modeling import attention
from trifold.modeling.activation_memory import measure_micro_memory
from trifold.modeling.attention import Visibility
from trifold.modeling.batch import Batch
from trifold.modeling.transformer import Stack, build

FAMILIES = ("llama", "modernbert", "t5gemma")
OPERATIONS = {
    "llama": 192,
    "modernbert": 158,
    "t5gemma": 583,
}  # of one more layer (two blocks in an encoder-decoder), both ways
KEPT = {
    "llama": 20544,
    "modernbert": 22080,
    "t5gemma": 62016,
}  # bytes that the backward of one more layer reads, for 24 positions


def deeper(name: str, more: int) -> Any:
    """A config with `more` times three layers beyond three."""
    return CONFIGS[name].model_copy(update={"num_layers": 3 + 3 * more})


class RecordingBackend:
    """A backend of torch.compile that runs the graphs as they are, and records their operations."""

    def __init__(self) -> None:
        self.graphs = 0
        self.operations: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        self.operations += [str(node.target) for node in graph.graph.nodes]
        return graph


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_compiles_once_as_one_graph_with_the_gradients_of_eager_and_one_table_of_angles(
    name: str,
) -> None:
    """For packed rows of changing content. Angles are computed once for each kind of layer."""
    torch._dynamo.reset()
    backend = RecordingBackend()
    model = build(CONFIGS[name].model_copy(update={"num_layers": 2}), 0)
    model.recompute(name == "llama")
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # fullgraph: a graph break is an error
    for seed in range(3):
        expected = _gradients(model, model, batch(name, seed))
        torch.testing.assert_close(_gradients(model, compiled, batch(name, seed)), expected)
    assert backend.graphs == 1

    kinds_of_layers = {"llama": 1, "modernbert": 2, "t5gemma": 2}
    assert sum("trifold.waves" in operation for operation in backend.operations) == kinds_of_layers[name]
    assert not {"cos", "sin"} & set(backend.operations)
    torch._dynamo.reset()


def _gradients(model: nn.Module, called: Any, given: Batch) -> dict[str, Tensor | None]:
    model.zero_grad()
    called(given).total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.proof) for name in ("modernbert", "t5gemma"))]
)
def test_packed_rows_in_bf16_compile_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = build(CONFIGS[name].model_copy(update={"num_layers": 2}), 1).bfloat16()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given = batch(name, 0)
    assert compiled(given).total.item() == pytest.approx(model(given).total.item(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_that_are_given_a_mask_of_blocks_are_compiled_once_a_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA at ZeRO-3 (pretrain/engine/compile.py), forward alone: FlexAttention has no backward on the
    CPU.
    """
    torch._dynamo.reset()
    graphs = CompileCounter()
    monkeypatch.setattr(attention, "_flex", lambda: (flex_attention, create_block_mask))
    monkeypatch.setattr(Visibility, "_mask", Visibility.blocks)
    model = build(CONFIGS["modernbert"], 0)
    with torch.no_grad():
        expected = [model(batch("modernbert", seed)).total for seed in range(3)]
        assert isinstance(model.encoder, Stack)
        for block in model.encoder.blocks:
            block.forward = torch.compile(block.forward, dynamic=False, backend=graphs, fullgraph=True)
        assert [model(batch("modernbert", seed)).total for seed in range(3)] == expected
    assert graphs.frame_count == 2  # with a window and without
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_has_no_more_operations_than_were_recorded(name: str) -> None:
    def operations(more: int) -> int:
        model = build(deeper(name, more), 0)
        with Calls() as calls:
            model(batch(name, 0)).total.backward()
        assert not calls.of["_local_scalar_dense"], "the host waits for the device inside the model"
        return calls.of.total()

    result = (operations(1) - operations(0)) / 3
    print(name, result)
    assert result <= OPERATIONS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_keeps_no_more_bytes_for_its_backward_than_were_recorded(name: str) -> None:
    shallow, deep = (
        measure_micro_memory(deeper(name, more), batch(name, 0), "bf16", False, "cuda").kept
        for more in (0, 1)
    )
    print(name, (deep - shallow) / 3)
    assert (deep - shallow) / 3 <= KEPT[name]
