"""Folders of other people: copies and buffers, bare classes, settings, sizes, wrong kinds, dropout."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.modeling.families import RECURRENT
from tests.modeling.huggingface.stock import MARKS, config_of, folder_of, read_folder, saved
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import decoding, express, recognise, restore, understand
from trifold.modeling.huggingface.fields import other_dropouts, token_roles

pytest.importorskip("transformers")

# What folders of the hub hold that the stock class does not: a model, how its tensors are changed, what is
# said to be dropped.
_BERT_EXTRAS = {
    "bert.pooler.dense.weight": torch.ones(24, 24),
    "bert.pooler.dense.bias": torch.ones(24),
    "bert.embeddings.position_ids": torch.ones(1, 40),
}
_NEXT = {"cls.seq_relationship.weight": torch.ones(2, 24), "cls.seq_relationship.bias": torch.ones(2)}
_HUB: list[tuple[str, Any, list[str]]] = [
    ("BERT", lambda t: t | _BERT_EXTRAS | _NEXT, [*_BERT_EXTRAS, *_NEXT]),
    (
        "BERT",
        lambda t: (
            t
            | {
                "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"],
                "cls.predictions.decoder.bias": t["cls.predictions.bias"],
            }
        ),
        [],
    ),
    (
        "BERT",
        lambda t: {
            k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in t.items()
        },
        [],
    ),
    (
        "RoBERTa",
        lambda t: (
            t
            | {
                "lm_head.decoder.weight": t["roberta.embeddings.word_embeddings.weight"],
                "roberta.embeddings.position_ids": torch.ones(1, 40),
            }
        ),
        ["roberta.embeddings.position_ids"],
    ),
    (
        "GPT-2",
        lambda t: (
            {k.removeprefix("transformer."): v for k, v in t.items()}
            | {"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        ),
        ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    ),
    ("GPT-2", lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]}, []),
    (
        "T5 1.1",
        lambda t: (
            t
            | {
                "encoder.embed_tokens.weight": t["shared.weight"],
                "decoder.embed_tokens.weight": t["shared.weight"],
            }
        ),
        [],
    ),
    (
        "T5 1.0",
        lambda t: (
            t
            | {
                "lm_head.weight": t["shared.weight"],
                "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 3),
            }
        ),
        ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
    ),
    (
        "BART",
        lambda t: (
            t | {f"model.{s}.embed_tokens.weight": t["model.shared.weight"] for s in ("encoder", "decoder")}
        ),
        [],
    ),
    ("BART", lambda t: t | {"lm_head.weight": t["model.shared.weight"]}, []),
    ("Llama, one group", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}, []),
    (
        "Llama, one group",
        lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in (0, 1)},
        [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in (0, 1)],
    ),
    ("ModernBERT", lambda t: t | {"decoder.weight": t["model.embeddings.tok_embeddings.weight"]}, []),
    (
        "T5Gemma",
        lambda t: t | {"lm_head.out_proj.weight": t["model.encoder.embed_tokens.weight"]},
        [],
    ),
    (
        "M2M-100",
        lambda t: t | {"model.encoder.embed_positions.weights": torch.ones(42, 24)},
        ["model.encoder.embed_positions.weights"],
    ),
]


@pytest.mark.parametrize(("name", "change", "dropped"), _HUB)
def test_copies_and_buffers_in_a_folder_are_accepted_and_what_is_dropped_is_reported(
    name: str, change: Any, dropped: list[str]
) -> None:
    hf, tensors = read_folder(folder_of(name))
    plain, result = recognise(hf, tensors), recognise(hf, change(tensors))
    assert sorted(result.dropped) == sorted(dropped) and not result.fresh and result.config == plain.config
    assert result.state.keys() == plain.state.keys() and all(
        torch.equal(result.state[key], plain.state[key]) for key in plain.state
    )


@pytest.mark.parametrize(
    ("name", "bare", "prefix", "head"),
    [
        ("BERT", "BertModel", "bert.", 5),
        ("RoBERTa", "RobertaModel", "roberta.", 5),
        ("GPT-2", "GPT2Model", "transformer.", 0),
        ("BART", "BartModel", "model.", 1),
        ("mBART", "MBartModel", "model.", 1),
        ("M2M-100", "M2M100Model", "model.", 0),
        ("T5 1.0", "T5Model", "", 0),
    ],
)
def test_a_bare_class_is_read_and_the_head_that_it_lacks_begins_fresh(
    name: str, bare: str, prefix: str, head: int, tmp_path: Path
) -> None:
    import transformers

    hf, tensors = read_folder(folder_of(name))
    body = getattr(transformers, bare).from_pretrained(folder_of(name))
    bare_hf, bare_tensors = saved(body, tmp_path / "bare")
    assert bare_hf["architectures"] == [bare] and not any(
        prefix and key.startswith(prefix) for key in bare_tensors
    )
    full, result = recognise(hf, tensors), recognise(bare_hf, bare_tensors)
    assert (
        result.config == full.config
        and len(result.fresh) == head
        and all(key.startswith("head.") for key in result.fresh)
    )
    assert all(
        torch.equal(result.state[key], full.state[key]) for key in full.state.keys() - set(result.fresh)
    )
    assert restore(bare_hf, bare_tensors)[1].keys() == full.state.keys()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("BERT", "is_decoder", True),
        ("BERT", "position_embedding_type", "relative_key"),
        ("BERT", "hidden_act", "mish"),
        ("RoBERTa", "hidden_act", "relu"),
        ("GPT-2", "scale_attn_by_inverse_layer_idx", True),
        ("GPT-2", "add_cross_attention", True),
        ("T5 1.1", "num_decoder_layers", 1),
        ("T5 1.1", "relative_attention_num_buckets", 64),
        ("T5 1.1", "feed_forward_proj", "gated-mish"),
        ("BART", "decoder_layers", 1),
        ("BART", "decoder_attention_heads", 1),
        ("mBART", "decoder_ffn_dim", 8),
        ("M2M-100", "decoder_layers", 3),
    ],
)
def test_a_setting_that_trifold_does_not_have_is_refused_by_name(name: str, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        recognise(config_of(name) | {field: value}, {})


def test_a_head_that_is_no_copy_makes_the_model_untied_as_in_the_stock_class() -> None:
    hf, tensors = read_folder(folder_of("T5 1.1"))
    assert hf["tie_word_embeddings"] is True and "lm_head.weight" in tensors  # what transformers 5 writes
    config = recognise(hf, tensors).config
    assert not config.tie_embeddings and config.logit_scale == 1
    assert (
        recognise(hf | {"tie_word_embeddings": False, "scale_decoder_outputs": None}, tensors).config
        == config
    )  # what Google wrote


SIZES: list[tuple[str, str, Any]] = [
    ("BERT", "num_attention_heads", 0),
    ("BERT", "num_hidden_layers", 1_000_000),
    ("BERT", "vocab_size", -5),
    ("BERT", "hidden_size", 24.0),
    ("BERT", "max_position_embeddings", 10**15),
    ("BERT", "num_hidden_layers", True),
    ("BERT", "intermediate_size", "40"),
    ("RoBERTa", "pad_token_id", [1]),
    ("GPT-2", "n_head", 0),
    ("GPT-2", "n_layer", 10**9),
    ("Llama, one group", "num_key_value_heads", 0),
    ("Llama, one group", "head_dim", -2),
    ("ModernBERT", "num_hidden_layers", 2_000_000),
    ("ModernBERT", "global_attn_every_n_layers", 0),
    ("T5 1.1", "num_heads", 0),
    ("T5 1.1", "num_layers", 50_000),
    ("BART", "encoder_attention_heads", 0),
    ("BART", "decoder_layers", 10**7),
    ("T5Gemma", "encoder.num_attention_heads", 0),
    ("T5Gemma", "decoder.num_hidden_layers", 10**6),
]


@pytest.mark.parametrize(("name", "field", "value"), SIZES)
def test_a_size_that_no_model_has_is_rejected_by_name_at_once(name: str, field: str, value: Any) -> None:
    hf = config_of(name)
    *path, last = field.split(".")
    target = hf[path[0]] if path else hf
    target[last] = value
    started = time.process_time()
    with pytest.raises(
        UserError, match=rf"sets {field} = .*must be a number from \d+ to \d+|sets {field} = "
    ):
        recognise(hf, {})
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("BERT", "layer_norm_eps", "small"),
        ("BERT", "layer_norm_eps", None),
        ("BERT", "layer_norm_eps", -1.0),
        ("BERT", "hidden_dropout_prob", 1.5),
        ("GPT-2", "activation_function", {"a": 1}),
        ("T5 1.1", "feed_forward_proj", 3),
        ("ModernBERT", "rope_parameters", "default"),
        ("ModernBERT", "layer_types", 7),
        ("Llama, one group", "rope_parameters", [1]),
        ("Llama, one group", "num_attention_heads", 5),
        ("T5Gemma", "encoder", None),
        ("T5Gemma", "decoder", "none"),
        ("BART", "init_std", float("nan")),
        ("BERT", "architectures", "BertModel"),
        ("BERT", "architectures", [["BertModel"]]),
        ("BERT", "architectures", {}),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_sentence(name: str, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=r"^config\.json") as error:
        understand(config_of(name) | {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BERT", ["hidden_dropout_prob"]),
        ("RoBERTa", ["hidden_dropout_prob"]),
        ("GPT-2", ["resid_pdrop", "embd_pdrop"]),
        ("T5 1.1", ["dropout_rate"]),
        ("BART", ["dropout"]),
        ("mBART", ["dropout"]),
        ("M2M-100", ["dropout"]),
        ("T5Gemma", ["dropout_rate", "encoder.dropout_rate", "decoder.dropout_rate"]),
    ],
)
def test_dropout_of_a_stock_config_is_read_and_written_back(name: str, fields: list[str]) -> None:
    hf = config_of(name)
    for field in fields:
        *path, last = field.split(".")
        (hf[path[0]] if path else hf)[last] = 0.25
    architecture, config = understand(hf)
    assert config.dropout == 0.25 and not other_dropouts(hf, architecture.dropout)
    again = express(config, MARKS | {"pad": hf["pad_token_id"] or 0})[1]
    for field in fields:
        *path, last = field.split(".")
        assert (again[path[0]] if path else again)[last] == 0.25


@pytest.mark.parametrize(
    ("name", "field", "dropout"),
    [("BERT", "hidden_dropout_prob", 0.1), ("GPT-2", "resid_pdrop", 0.1), ("BART", "dropout", 0.1)],
)
def test_a_config_without_dropout_means_the_stock_default(name: str, field: str, dropout: float) -> None:
    hf = {key: value for key, value in config_of(name).items() if key != field}
    assert understand(hf)[1].dropout == dropout


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("BERT", "attention_probs_dropout_prob"),
        ("GPT-2", "attn_pdrop"),
        ("GPT-2", "embd_pdrop"),
        ("BART", "activation_dropout"),
        ("BART", "encoder_layerdrop"),
        ("Llama, one group", "attention_dropout"),
        ("ModernBERT", "mlp_dropout"),
    ],
)
def test_dropout_that_trifold_does_not_have_is_named_with_its_value(name: str, field: str) -> None:
    hf = config_of(name) | {field: 0.15}
    architecture, config = understand(hf)
    assert config.dropout == 0
    assert other_dropouts(hf, architecture.dropout) == [f"{field} = 0.15"]


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_config_is_read_back_with_its_dropout_and_its_sizes_are_limited(name: str) -> None:
    config = RECURRENT[name].model_copy(update={"dropout": 0.3})
    _, hf = express(config, MARKS)
    assert understand(hf)[1] == config
    for field, value in (("num_layers", 10**7), ("dim", 0), ("vocab_size", -1)):
        with pytest.raises(UserError, match=field):
            understand(hf | {field: value})


def test_several_end_tokens_are_all_ends_and_the_first_is_the_role() -> None:
    assert token_roles({"eos_token_id": [7, 8], "pad_token_id": []}) == {
        "pad": 0,
        "bos": 0,
        "eos": 7,
        "start": 0,
    }
    assert decoding({"eos_token_id": 7}, {"eos_token_id": [7, 9]}).more_ends == (7, 9)
    assert decoding({"eos_token_id": [7]}, {}).more_ends == ()
    with pytest.raises(UserError, match="sets eos_token_id"):
        decoding({}, {"eos_token_id": [7, "nine"]})
