"""Small models made by the stock classes themselves, of odd shapes, with weights that give every mistake a
chance to show.
"""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.huggingface import ImportedModel, recognise
from trifold.modeling.transformer import Transformer

PAD, BOS, EOS = 1, 0, 2  # as in RoBERTa, BART and M2M-100
MARKS: dict[str, Any] = {"pad": PAD, "bos": BOS, "eos": EOS}
_IDS = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
_BERT = dict(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=40,
    **_IDS,
)
_LLAMA = dict(_BERT, num_key_value_heads=1, head_dim=10, tie_word_embeddings=True, hidden_act="silu")
_MODERN = dict(
    _BERT,
    local_attention=6,
    global_attn_every_n_layers=2,
    hidden_activation="gelu",
    cls_token_id=BOS,
    sep_token_id=EOS,
)
_GPT2 = dict(
    vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=40, bos_token_id=BOS, eos_token_id=EOS
)
_T5 = dict(
    vocab_size=61,
    d_model=24,
    d_kv=10,
    d_ff=40,
    num_layers=2,
    num_heads=3,
    pad_token_id=PAD,
    eos_token_id=EOS,
    decoder_start_token_id=PAD,
)
_BART = dict(
    vocab_size=61,
    d_model=24,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=3,
    decoder_attention_heads=3,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    max_position_embeddings=40,
    decoder_start_token_id=EOS,
    **_IDS,
)
_GEMMA = dict(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=10,
    intermediate_size=40,
    query_pre_attn_scalar=10,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    max_position_embeddings=40,
    sliding_window=40,
    layer_types=["full_attention"] * 2,
    **_IDS,
)


def _gemma(**changes: Any) -> dict[str, Any]:
    return {
        "encoder": _GEMMA | changes,
        "decoder": _GEMMA | changes,
        "vocab_size": 61,
        "tie_word_embeddings": True,
        **_IDS,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, one group": ("LlamaForCausalLM", _LLAMA),
    "Llama, two groups, biases": (
        "LlamaForCausalLM",
        _LLAMA | dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    ),
    "Llama, own head, no groups": (
        "LlamaForCausalLM",
        _LLAMA | dict(num_key_value_heads=3, tie_word_embeddings=False, rope_theta=5e5),
    ),
    "ModernBERT": ("ModernBertForMaskedLM", _MODERN),
    "ModernBERT, own head, five heads, three layers": (
        "ModernBertForMaskedLM",
        _MODERN | dict(hidden_size=20, num_attention_heads=5, num_hidden_layers=3, tie_word_embeddings=False),
    ),
    "ModernBERT, biases": (
        "ModernBertForMaskedLM",
        _MODERN | dict(attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True),
    ),
    "T5Gemma": ("T5GemmaForConditionalGeneration", _gemma()),
    "T5Gemma, two groups": (
        "T5GemmaForConditionalGeneration",
        _gemma(num_attention_heads=4, num_key_value_heads=2),
    ),
    "T5Gemma, own head, three heads": (
        "T5GemmaForConditionalGeneration",
        _gemma(num_key_value_heads=3) | dict(tie_word_embeddings=False),
    ),
    "T5 1.1": (
        "T5ForConditionalGeneration",
        _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "T5 1.0": ("T5ForConditionalGeneration", _T5),
    "T5 1.1, tied, five heads": (
        "T5ForConditionalGeneration",
        _T5 | dict(feed_forward_proj="gated-silu", num_heads=5, d_kv=4, scale_decoder_outputs=False),
    ),
    "BERT": ("BertForMaskedLM", _BERT),
    "BERT, own head, five heads": (
        "BertForMaskedLM",
        _BERT | dict(hidden_size=20, num_attention_heads=5, tie_word_embeddings=False, hidden_act="gelu_new"),
    ),
    "BERT, one token type, three layers": (
        "BertForMaskedLM",
        _BERT | dict(type_vocab_size=1, num_hidden_layers=3, hidden_act="relu"),
    ),
    "RoBERTa": ("RobertaForMaskedLM", _BERT),
    "RoBERTa, own head, five heads": (
        "RobertaForMaskedLM",
        _BERT | dict(hidden_size=20, num_attention_heads=5, tie_word_embeddings=False),
    ),
    "RoBERTa, padding 3": (
        "RobertaForMaskedLM",
        _BERT | dict(pad_token_id=3, layer_norm_eps=1e-5, type_vocab_size=1),
    ),
    "GPT-2": ("GPT2LMHeadModel", _GPT2),
    "GPT-2, own head, five heads": (
        "GPT2LMHeadModel",
        _GPT2 | dict(n_embd=20, n_head=5, n_inner=30, tie_word_embeddings=False),
    ),
    "GPT-2, unscaled attention, relu": (
        "GPT2LMHeadModel",
        _GPT2 | dict(scale_attn_weights=False, activation_function="relu"),
    ),
    "BART": ("BartForConditionalGeneration", _BART),
    "BART, own head, five heads": (
        "BartForConditionalGeneration",
        _BART
        | dict(d_model=20, encoder_attention_heads=5, decoder_attention_heads=5, tie_word_embeddings=False),
    ),
    "BART, scaled embeddings, relu": (
        "BartForConditionalGeneration",
        _BART | dict(scale_embedding=True, activation_function="relu"),
    ),
    "mBART": ("MBartForConditionalGeneration", _BART | dict(decoder_start_token_id=7, scale_embedding=True)),
    "mBART, own head, five heads": (
        "MBartForConditionalGeneration",
        _BART
        | dict(d_model=20, encoder_attention_heads=5, decoder_attention_heads=5, tie_word_embeddings=False),
    ),
    "mBART, three layers": (
        "MBartForConditionalGeneration",
        _BART | dict(encoder_layers=3, decoder_layers=3, activation_function="relu"),
    ),
    "M2M-100": ("M2M100ForConditionalGeneration", _BART),
    "M2M-100, own head, five heads": (
        "M2M100ForConditionalGeneration",
        _BART
        | dict(d_model=20, encoder_attention_heads=5, decoder_attention_heads=5, tie_word_embeddings=False),
    ),
    "M2M-100, odd dim, plain embeddings": (
        "M2M100ForConditionalGeneration",
        _BART | dict(d_model=27, scale_embedding=False),
    ),
}
_TAGS = dict(num_labels=5)
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT, tags": ("BertForTokenClassification", _BERT | _TAGS),
    "RoBERTa, tags": ("RobertaForTokenClassification", _BERT | _TAGS | dict(hidden_act="gelu")),
    "GPT-2, tags": ("GPT2ForTokenClassification", _GPT2 | _TAGS),
    "BERT, answers": ("BertForQuestionAnswering", _BERT),
    "RoBERTa, answers": ("RobertaForQuestionAnswering", _BERT),
    "GPT-2, answers": ("GPT2ForQuestionAnswering", _GPT2),
}


def make(name: str, seed: int = 0, **changes: Any) -> Any:
    """The stock model, its weights random: norms and biases too, which a fresh model has at 1 and 0.
    `changes` are of its config.
    """
    import transformers

    stock_class = getattr(transformers, (MODELS | TASKS)[name][0])
    model = stock_class(_stock_config(name, changes)).eval()
    if name == "T5 1.1":  # its class ties when made, but not when a folder holds a head of its own
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    _randomise(model, seed, near_zero_norms="T5Gemma" in name)
    return model


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The content of the config.json of `make(name)`, without making the model."""
    hf = json.loads(_stock_config(name, changes).to_json_string())
    return {**hf, "architectures": [(MODELS | TASKS)[name][0]]}


def _stock_config(name: str, changes: dict[str, Any]) -> Any:
    """Without any dropout, so that training steps can be compared."""
    import transformers

    stock_class, settings = (MODELS | TASKS)[name]
    dropouts = (
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "dropout_rate",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )
    settings = {
        **{
            index: 0.0
            for index in (*dropouts, "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout")
        },
        **settings,
        **changes,
    }
    settings |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0} if "d_model" in settings else {}
    return getattr(transformers, stock_class).config_class(**json.loads(json.dumps(settings)))


def _randomise(model: Any, seed: int, near_zero_norms: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            rank_one = tensor.numel() == max(tensor.shape)
            values = (
                torch.rand(tensor.shape, generator=draw) + 0.5
                if rank_one
                else torch.randn(tensor.shape, generator=draw) * 0.2
            )
            # T5Gemma's norms multiply by (1 + w), and ours hold 1 + w: exact for what was bf16, as all of
            # Google's are
            tensor.copy_((values - 1).bfloat16() if rank_one and near_zero_norms else values)
        _equal_copies(model)


def _equal_copies(model: Any) -> None:
    """An untied stock model has a table of embeddings for each stack, or a second bias that it never reads:
    Trifold has one of each.
    """
    embeddings = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight") or name == "model.shared.weight":
            parameter.copy_(embeddings)
    heads: list[Any] = [
        getattr(model, "lm_head", None),
        getattr(getattr(model, "cls", None), "predictions", None),
    ]
    for head in heads:
        if hasattr(head, "bias") and hasattr(head, "decoder"):
            head.decoder.bias.copy_(head.bias)


@cache
def folder_of(name: str) -> Path:
    """A folder that `save_pretrained` of `make(name)` wrote, once for all tests, which only read it."""
    folder = Path(mkdtemp(prefix="stock-"))
    make(name).save_pretrained(folder)
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its config.json and tensors."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of the folder that `save_pretrained` writes."""
    model.save_pretrained(folder)
    return read_folder(folder)


def read(model: Any, folder: Path) -> tuple[Transformer, ImportedModel]:
    """What we read from that folder, as a model."""
    result = recognise(*saved(model, folder))
    ours = Transformer(result.config).eval()
    ours.load_state_dict(result.state)
    return ours, result


def batch_of(config: ModelConfig, length: int, seed: int = 0) -> Batch:
    """Two rows of tokens, none special, each one document, with targets; a source of another length where
    there is one.
    """
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int, top: int = config.vocab_size, least: int = 5) -> Tensor:
        return torch.randint(least, top, (2, n), generator=draw)

    x, source = tokens(length), tokens(length + 3) if config.family == "encoder-decoder" else None
    targets = tokens(length, config.outputs or config.vocab_size, 0)
    if config.spans:
        targets = torch.full_like(x, IGNORE)
        targets[:, :2] = tokens(min(2, length), length, 0)
    ones = torch.ones_like
    return Batch(x, ones(x), targets, source, None if source is None else ones(source))


def logits(model: Any, batch: Batch) -> Tensor:
    """The stock model's logits of a batch, (B, T, V)."""
    inputs = (
        {"input_ids": batch.tokens}
        if batch.source is None
        else {"input_ids": batch.source, "decoder_input_ids": batch.tokens}
    )
    out = model(**inputs)
    return (
        torch.stack([out.start_logits, out.end_logits], dim=-1)
        if hasattr(out, "start_logits")
        else out.logits
    )


def loss(model: Any, batch: Batch) -> Tensor:
    """The mean cross-entropy of a batch, by torch's own function over the stock model's logits."""
    scores = logits(model, batch)
    if scores.shape[-1] == 2 and (batch.targets == IGNORE).any():  # spans: a choice among positions
        return nn.functional.cross_entropy(
            scores.permute(0, 2, 1).flatten(0, 1), batch.targets[:, :2].flatten()
        )
    return nn.functional.cross_entropy(scores.flatten(0, 1), batch.targets.flatten())


def share_copies(model: Any) -> None:
    """One parameter where two hold the same numbers, so that their gradients add up and they stay equal, as
    ours do.
    """
    seen: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            same = next((p for p in seen if torch.equal(p, parameter)), None)
            if same is None:
                seen.append(parameter)
            else:
                setattr(module, name, same)
