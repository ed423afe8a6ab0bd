"""Adapters change nothing at first, only themselves when trained, and merge into what they did."""

import pytest
import torch

from tests.published import MODELS, batch_of
from trifold.modeling.config import Lora
from trifold.modeling.errors import UserError
from trifold.modeling.lora import add_lora, merge_lora
from trifold.modeling.transformer import Transformer, build


@pytest.mark.parametrize("name", ["llama, biases, two groups", "modernbert, tags", "t5gemma"])
def test_merged_weights_say_what_the_adapted_model_says(name: str) -> None:
    config, batch = MODELS[name], batch_of(MODELS[name], 12)
    plain, model = build(config, 3), build(config, 3)
    lora = Lora(rank=3, alpha=5.0, targets=("q", "o", "gate"))
    add_lora(model, lora, seed=3)
    assert torch.equal(model.logits(batch), plain.logits(batch))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(n.endswith((".a", ".b")) or n.startswith("head.labels.") for n in trained)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".b"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    again = Transformer(config)
    again.load_state_dict(merge_lora(model.state_dict(), lora.scale))
    assert (model.logits(batch) - plain.logits(batch)).abs().max() > 0.01
    assert torch.allclose(again.logits(batch), model.logits(batch), atol=1e-5)


def test_a_target_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"lora\.targets names 'query'; this model's linear maps are down, gate, k, o, q, up, v",
    ):
        add_lora(build(MODELS["llama"], 0), Lora(targets=("query",)), 0)
