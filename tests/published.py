"""Tiny models of odd shapes, with weights that give every mistake a chance to show, and published folders of
them, for the tests of publishing.
"""

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.config.pretraining import TokenizerConfig as TokenizerConfig
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer, train
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.verify import Report
from trifold.pretrain.storage.json_files import read_json_object, write_json

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SPECIAL: dict[str, Any] = {"pad": 0, "bos": 1, "eos": 2}
_DECODER = ModelConfig(
    family="decoder",
    vocab_size=97,
    dim=24,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    mlp_dim=40,
    max_positions=64,
)
_ENCODER = ModelConfig(
    family="encoder",
    vocab_size=97,
    dim=24,
    num_layers=4,
    num_heads=3,
    num_kv_heads=3,
    head_dim=8,
    mlp_dim=40,
    max_positions=64,
    activation="gelu",
    norm="layer",
    norm_eps=1e-5,
    first_attention_norm=False,
    embed_norm=True,
    rope_theta=160_000.0,
    local_window=5,
    global_every=3,
    head_dense=True,
    logit_bias=True,
)
_BOTH = ModelConfig(
    family="encoder-decoder",
    vocab_size=97,
    dim=24,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    mlp_dim=40,
    max_positions=64,
    activation="gelu_tanh",
    norm_places=("pre", "inner"),
    embed_scale=24**0.5,
)
_LAYER = dict(norm="layer", bias=True, gated=False)
_GPT2 = _DECODER.model_copy(
    update=dict(
        _LAYER, position="learned", activation="gelu_tanh", num_kv_heads=3, head_dim=8, tie_embeddings=False
    )
)
_BERT = _ENCODER.model_copy(
    update=dict(
        _LAYER,
        position="learned",
        norm_places=("post",),
        local_window=0,
        first_attention_norm=True,
        final_norm=False,
        task_dense=False,
        token_types=2,
        num_layers=2,
        tie_embeddings=False,
        rope_theta=10_000.0,
        global_every=1,
    )
)
_T5 = _BOTH.model_copy(
    update=dict(
        norm_places=("pre",),
        position="relative",
        num_kv_heads=3,
        head_dim=4,
        attention_scale=1.0,
        logit_scale=24**-0.5,
        embed_scale=1.0,
        tie_embeddings=False,
    )
)
_MBART = _BOTH.model_copy(
    update=dict(
        _LAYER,
        norm_places=("pre",),
        norm_eps=1e-5,
        position="learned",
        position_offset=2,
        embed_norm=True,
        num_kv_heads=3,
        head_dim=8,
        activation="gelu",
        logit_bias="fixed",
        tie_embeddings=False,
    )
)
_M2M = dict(position="sinusoidal", position_offset=1, embed_norm=False, logit_bias=False, activation="relu")
MODELS = {
    "llama": _DECODER,
    "llama, own head, other theta": _DECODER.model_copy(
        update={"tie_embeddings": False, "rope_theta": 5e5, "num_layers": 3}
    ),
    "llama, biases, two groups": _DECODER.model_copy(
        update={"bias": True, "num_heads": 4, "num_kv_heads": 2, "activation": "gelu"}
    ),
    "modernbert": _ENCODER,
    "modernbert, biases, own head": _ENCODER.model_copy(update={"bias": True, "tie_embeddings": False}),
    "modernbert, all global, five heads": _ENCODER.model_copy(
        update={
            "local_window": 0,
            "num_heads": 5,
            "num_kv_heads": 5,
            "dim": 20,
            "head_dim": 4,
            "num_layers": 1,
            "logit_bias": False,
        }
    ),
    "t5gemma": _BOTH,
    "t5gemma, own head, own scale": _BOTH.model_copy(
        update={"tie_embeddings": False, "attention_scale": 32**-0.5, "norm_eps": 1e-5}
    ),
    "t5gemma, three layers, two groups": _BOTH.model_copy(
        update={"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    ),
    "gpt2": _GPT2,
    "gpt2, tied": _GPT2.model_copy(update={"tie_embeddings": True, "activation": "gelu"}),
    "bert": _BERT,
    "roberta": _BERT.model_copy(update={"position_offset": 1}),
    "t5": _T5,
    "t5, tied, relu": _T5.model_copy(update={"tie_embeddings": True, "activation": "relu", "gated": False}),
    "bart": _MBART.model_copy(update={"norm_places": ("post",), "final_norm": False, "embed_scale": 1.0}),
    "mbart": _MBART,
    "mbart, tied": _MBART.model_copy(update={"tie_embeddings": True}),
    "m2m100": _MBART.model_copy(update=_M2M),
    "gpt2, tags": _GPT2.model_copy(update={"labels": TAGS}),
    "bert, tags": _BERT.model_copy(update={"labels": TAGS}),
    "bert, answers": _BERT.model_copy(update={"spans": True}),
    "roberta, tags": _BERT.model_copy(update={"labels": TAGS, "position_offset": 1}),
    "llama, tags": _DECODER.model_copy(update={"labels": TAGS}),
    "llama, answers": _DECODER.model_copy(update={"spans": True}),
    "modernbert, tags": _ENCODER.model_copy(update={"labels": TAGS, "bias": True}),
    "modernbert, answers": _ENCODER.model_copy(update={"spans": True}),
    "t5gemma's encoder, tags": _BOTH.model_copy(update={"labels": TAGS, "family": "encoder"}),
}


@cache
def tokenizer() -> Tokenizer:
    """A real one of 400 pieces, trained in a fraction of a second."""
    names = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
    texts = (
        f"{a} and {b} met by the river in town number {i}; who knows why?"
        for i, a in enumerate(names)
        for b in names
    )
    return train(texts, TokenizerConfig(), 400, Path(mkdtemp()))


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Large random weights; norms and biases too, which a fresh model has at 1 and 0."""
    model = build(config, seed).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=draw) + 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def batch_of(config: ModelConfig, length: int, seed: int = 0) -> Batch:
    """Two rows of plain tokens (never padding), each one document; a source of another length where there is
    one.
    """
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, config.vocab_size, (2, n), generator=draw)

    target, source = tokens(length), tokens(length + 3) if config.family == "encoder-decoder" else None
    ones = torch.ones_like
    return Batch(target, ones(target), target, source, None if source is None else ones(source))


def write_published(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """A published folder of a model, with its record."""
    folder.mkdir(parents=True, exist_ok=True)
    published_folder.write_folder(folder, config, state, tokenizer(), dtype)
    published_folder.write_record(folder, config, tokenizer(), "rows", {})


@cache
def _published_once(config: ModelConfig, dtype: torch.dtype) -> tuple[Path, Mapping[str, Tensor]]:
    folder, state = Path(mkdtemp(prefix="published-")), random_model(config).state_dict()
    write_published(folder, config, state, dtype)
    return folder, state


def copy_published(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Fill `folder` with a published model of MODELS, some settings changed. Returns its (config, state).

    Each distinct folder is written once in a process and copied from then on.
    """
    config = MODELS[name].model_copy(update={"vocab_size": tokenizer().vocab_size, **changes})
    source, state = _published_once(config, dtype)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return config, state


def update_hashes(folder: Path) -> None:
    """Bring the hashes of trifold.json up to date, so that only the other checks can notice a change."""
    record = read_json_object(folder / published_folder.RECORD)
    write_json(folder / published_folder.RECORD, {**record, "files": published_folder.measure(folder)})


def failed(report: Report) -> set[str]:
    """The names of the checks that failed."""
    return {check.name for check in report.checks if not check.ok}
