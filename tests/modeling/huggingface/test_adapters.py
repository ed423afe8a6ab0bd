"""Adapters in PEFT's format mean in the stock class what the merged weights mean; where PEFT is installed, it
says so itself.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.published import MODELS, SPECIAL, batch_of
from trifold.modeling.config import Lora
from trifold.modeling.huggingface import export
from trifold.modeling.huggingface.adapters import adapters
from trifold.modeling.lora import add_lora, merge_lora
from trifold.modeling.transformer import build

NAMES = ["llama, biases, two groups", "modernbert", "modernbert, tags", "t5gemma", "t5gemma's encoder, tags"]


@pytest.mark.parametrize("name", NAMES)
def test_stock_weights_plus_adapters_are_the_merged_weights(name: str, tmp_path: Path) -> None:
    config, lora = MODELS[name], Lora(rank=3, alpha=5.0, targets=("q", "v", "o", "up"))
    model = build(config, 1)
    add_lora(model, lora, seed=1)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".b"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    state = model.state_dict()
    settings, tensors = adapters(config, state, lora, SPECIAL, "base")
    hf, base = export(config, {n: t for n, t in state.items() if not n.endswith((".a", ".b"))}, SPECIAL)
    expected = export(config, merge_lora(state, lora.scale), SPECIAL)[1]
    for module in settings["target_modules"]:
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        rank = settings["rank_pattern"].get(module, settings["r"])
        scale = settings["alpha_pattern"].get(module, settings["lora_alpha"]) / rank
        assert len(a) == rank and torch.allclose(
            base[f"{module}.weight"] + scale * b @ a, expected[f"{module}.weight"], atol=1e-6
        )
        base[f"{module}.weight"] = expected[f"{module}.weight"]
    assert all(torch.equal(base[n], expected[n]) for n in expected)
    assert (settings["modules_to_save"] is not None) == bool(config.labels)

    if find_spec("peft") is None:
        return  # what it does is checked above; with it installed it says so itself
    import peft
    import transformers

    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    stock_class = getattr(transformers, hf["architectures"][0])
    stock = stock_class(
        stock_class.config_class.from_dict(json.loads(json.dumps(hf)), attn_implementation="eager")
    ).eval()
    stock.load_state_dict(
        export(config, {n: t for n, t in state.items() if not n.endswith((".a", ".b"))}, SPECIAL)[1],
        strict=False,
    )
    adapted = peft.PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    batch = batch_of(config, 9)
    inputs = (
        {"input_ids": batch.tokens}
        if batch.source is None
        else {"input_ids": batch.source, "decoder_input_ids": batch.tokens}
    )
    assert torch.allclose(adapted(**inputs).logits, model.logits(batch), atol=1e-5)
