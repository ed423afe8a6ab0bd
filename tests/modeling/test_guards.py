"""Counts that no machine changes, so that a step cannot grow slower or larger unseen: graphs, operations,
bytes, host syncs.

The numbers were recorded on torch 2.13. Lower ones are welcome: write them down. Times stand in
docs/performance.md only.
"""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.modeling.families import CONFIGS
from tests.modeling.operation_counts import Calls, batch
from trifold.modeling import attention
from trifold.modeling.activation_memory import measure_micro_memory
from trifold.modeling.attention import Visibility
from trifold.modeling.transformer import build

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
    """A config with `more` layers of each kind than three."""
    return CONFIGS[name].model_copy(update={"num_layers": 3 + 3 * more})


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_of_changing_content_run_in_one_graph_that_is_compiled_once(name: str) -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()
    model = build(CONFIGS[name], 0)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)  # fullgraph: a graph break is an error
    for seed in range(3):
        compiled(batch(name, seed)).backward()
    assert graphs.frame_count == 1
    torch._dynamo.reset()


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
        expected = [model(batch("modernbert", seed)) for seed in range(3)]
        for block in model.encoder.blocks:
            block.forward = torch.compile(block.forward, dynamic=False, backend=graphs, fullgraph=True)
        assert [model(batch("modernbert", seed)) for seed in range(3)] == expected
    assert graphs.frame_count == 2  # with a window and without
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_model_makes_its_angles_once_a_kind_of_layer_and_not_in_every_layer(name: str) -> None:
    torch._dynamo.reset()
    made: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(build(deeper(name, 1), 0), backend=backend, fullgraph=True)(batch(name, 0))
    assert (
        sum("trifold.waves" in target for target in made) == {"llama": 1, "modernbert": 2, "t5gemma": 2}[name]
    )
    assert not {"cos", "sin"} & set(made)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_has_no_more_operations_than_were_recorded(name: str) -> None:
    def operations(more: int) -> int:
        model = build(deeper(name, more), 0)
        with Calls() as calls:
            model(batch(name, 0)).backward()
        assert not calls.of["_local_scalar_dense"], "the host waits for the device inside the model"
        return calls.of.total()

    found = (operations(1) - operations(0)) / 3
    print(name, found)
    assert found <= OPERATIONS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_keeps_no_more_bytes_for_its_backward_than_were_recorded(name: str) -> None:
    shallow, deep = (
        measure_micro_memory(deeper(name, more), batch(name, 0), "bf16", False, "cuda").kept
        for more in (0, 1)
    )
    print(name, (deep - shallow) / 3)
    assert (deep - shallow) / 3 <= KEPT[name]
