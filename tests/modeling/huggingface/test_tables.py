"""Name tables and stock configs, in both directions, without the stock classes."""

from typing import Any

import pytest
import torch

from tests.published import MODELS, SPECIAL, random_model
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import ARCHITECTURES, export, restore
from trifold.modeling.huggingface.tables import from_stock, to_stock


@pytest.mark.parametrize("name", MODELS)
def test_what_was_exported_is_restored_bit_for_bit(name: str) -> None:
    config = MODELS[name]
    state = random_model(config).state_dict()
    read, tensors = restore(*export(config, state, SPECIAL))
    assert read == config.model_copy(update={"global_every": read.global_every})
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)


def test_norms_that_the_stock_class_stores_less_one_return_exactly_near_one_and_to_rounding_elsewhere() -> (
    None
):
    config = MODELS["t5gemma"]
    state = random_model(config).state_dict()
    state["encoder.norm.weight"] = torch.linspace(-3, 3, config.dim)
    back = restore(*export(config, state, SPECIAL))[1]["encoder.norm.weight"]
    assert (back - state["encoder.norm.weight"]).abs().max() <= 2**-23


def test_bf16_weights_are_the_rounded_ones_and_are_read_into_fp32() -> None:
    config = MODELS["llama"]
    state = random_model(config).state_dict()
    hf, tensors = export(config, state, SPECIAL, torch.bfloat16)
    assert hf["dtype"] == "bfloat16" and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(
        torch.equal(tensor, state[name].bfloat16().float())
        for name, tensor in restore(hf, tensors)[1].items()
    )


def test_each_op_of_a_table_by_hand() -> None:
    config = MODELS["llama"].model_copy(update={"num_layers": 1})
    table = """
    fused = a, b | t
    row = c | row
    shifted = d | minus1
    gone? = e   # the model has no e
    plain?!e = d | minus1
    both?e = d
    copy~ = c | row
    pooler~ = nothing
    """
    ours = {
        "a": torch.tensor([[1.0, 2.0]]),
        "b": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        "c": torch.tensor([7.0, 8.0]),
        "d": torch.tensor([1.0, 3.0]),
    }
    stock = to_stock(table, config, ours)
    assert {name: tensor.tolist() for name, tensor in stock.items()} == {
        "fused": [[1, 3, 5], [2, 4, 6]],
        "row": [[7, 8]],
        "shifted": [0, 2],
        "plain": [0, 2],
    }
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    besides = {"copy": torch.tensor([[7.0, 8.0]]), "pooler": torch.ones(3)}
    back, dropped = from_stock(table, config, shapes, stock | besides)
    assert dropped == ["pooler"]
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    for name, changed, message in [
        ("plain", torch.tensor([0.0, 2.5]), "plain is a second copy of d"),
        ("copy", torch.ones(1, 2), "copy is a second copy of c"),
        ("row", torch.ones(1, 3), r"row has the shape \(1, 3\)"),
        ("gone", torch.ones(1), "unexpected gone"),
    ]:
        with pytest.raises(UserError, match=message):
            from_stock(table, config, shapes, {**stock, name: changed})


def test_missing_and_unexpected_tensors_are_named() -> None:
    hf, tensors = export(MODELS["llama"], random_model(MODELS["llama"]).state_dict(), SPECIAL)
    tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"missing model\.norm\.weight; unexpected model\.norm\.wait"):
        restore(hf, tensors)
    state = random_model(MODELS["llama"]).state_dict()
    state["decoder.blocks.0.attn.f.gate"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"decoder\.blocks\.0\.attn\.f\.gate"):
        export(MODELS["llama"], state, SPECIAL)


def test_embeddings_that_differ_between_the_stacks_are_refused() -> None:
    hf, tensors = export(MODELS["t5gemma"], random_model(MODELS["t5gemma"]).state_dict(), SPECIAL)
    tensors["model.decoder.embed_tokens.weight"] = tensors["model.decoder.embed_tokens.weight"] + 1
    with pytest.raises(
        UserError, match=r"model\.decoder\.embed_tokens\.weight is a second copy of embed\.weight"
    ):
        restore(hf, tensors)


# Every dial that bears on the logits, set to what the family's architecture does not have.
_UNPUBLISHED = [
    ("llama", "norm", "layer"),
    ("llama", "norm_places", ("post",)),
    ("llama", "gated", False),
    ("llama", "final_norm", False),
    ("llama", "embed_norm", True),
    ("llama", "position", "learned"),
    ("llama", "local_window", 7),
    ("llama", "attention_scale", 0.5),
    ("llama", "embed_scale", 2.0),
    ("llama", "logit_scale", 2.0),
    ("llama", "head_dense", True),
    ("llama", "logit_bias", True),
    ("llama", "first_attention_norm", False),
    ("t5gemma", "labels", ("O",)),
    ("t5gemma", "spans", True),
    ("modernbert", "norm", "rms"),
    ("modernbert", "embed_norm", False),
    ("modernbert", "first_attention_norm", True),
    ("modernbert", "head_dense", False),
    ("modernbert", "num_kv_heads", 1),
    ("modernbert", "head_dim", 10),
    ("modernbert", "final_norm", False),
    ("t5gemma", "bias", True),
    ("t5gemma", "norm_places", ("pre",)),
    ("t5gemma", "embed_scale", 1.0),
    ("t5gemma", "local_window", 7),
    ("t5gemma", "attention_scale", 0.3),
    ("t5gemma", "logit_bias", True),
]


@pytest.mark.parametrize(("name", "dial", "value"), _UNPUBLISHED)
def test_a_dial_that_no_architecture_has_is_refused_by_name(name: str, dial: str, value: Any) -> None:
    config = MODELS[name].model_copy(
        update={dial: value, **({"global_every": 2} if dial == "local_window" else {})}
    )
    with pytest.raises(
        UserError, match=rf"nearest.* {dial if dial != 'local_window' else 'local_layers'} .*has"
    ):
        export(config, {}, SPECIAL)


def test_a_dim_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"dim \(25\) is not a multiple of num_heads \(3\)"):
        export(MODELS["llama"].model_copy(update={"dim": 25}), {}, SPECIAL)


# Settings of stock configs that Trifold does not have: field, value.
_FOREIGN = [
    ("llama", "rope_scaling", {"factor": 8.0}),
    ("llama", "hidden_act", "quick_gelu"),
    ("llama", "mlp_bias", True),
    ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    ("llama", "partial_rotary_factor", 0.5),
    ("modernbert", "layer_types", ["sliding_attention"] * 4),
    ("modernbert", "classifier_bias", True),
    ("modernbert", "classifier_activation", "silu"),
    ("modernbert", "norm_bias", True),
    ("modernbert", "local_attention", 11),
    ("t5gemma", "decoder.attn_logit_softcapping", 50.0),
    ("t5gemma", "encoder.final_logit_softcapping", 30.0),
    ("t5gemma", "encoder.layer_types", ["sliding_attention", "full_attention"]),
    ("t5gemma", "encoder.num_hidden_layers", 3),
    ("t5gemma", "decoder.attention_bias", True),
    ("t5gemma", "encoder.query_pre_attn_scalar", 64),
    ("t5gemma", "encoder.rms_norm_eps", 1e-3),
]


@pytest.mark.parametrize(("name", "field", "value"), _FOREIGN)
def test_a_stock_setting_that_trifold_does_not_have_is_refused_by_name(
    name: str, field: str, value: Any
) -> None:
    hf = export(MODELS[name], random_model(MODELS[name]).state_dict(), SPECIAL)[0]
    *path, last = field.split(".")
    (hf[path[0]] if path else hf)[last] = value
    with pytest.raises(
        UserError, match=field if not isinstance(value, dict) else f"{field}|sets {field.split('_')[0]}"
    ):
        restore(hf, {})


@pytest.mark.parametrize(
    "field", ["attn_logit_softcapping", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar"]
)
def test_settings_that_the_stock_class_would_fill_in_otherwise_may_not_be_missing(field: str) -> None:
    hf = export(MODELS["t5gemma"], random_model(MODELS["t5gemma"]).state_dict(), SPECIAL)[0]
    del hf["decoder"][field]
    with pytest.raises(UserError, match=f"lacks .*{field}"):
        restore(hf, {})


def test_configs_as_transformers_4_wrote_them_are_read() -> None:
    for name, old in [
        ("llama", {"rope_theta": 10_000.0, "rope_scaling": None}),
        (
            "modernbert",
            {"global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
        ),
    ]:
        hf, tensors = export(MODELS[name], random_model(MODELS[name]).state_dict(), SPECIAL)
        legacy = {
            field: value for field, value in hf.items() if field not in ("rope_parameters", "layer_types")
        } | old
        assert restore(legacy, tensors)[0] == MODELS[name]


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"MambaForCausalLM; Trifold reads .*LlamaForCausalLM"):
        restore({"architectures": ["MambaForCausalLM"]}, {})
    assert len({architecture.stock_class for architecture in ARCHITECTURES}) == len(ARCHITECTURES)
