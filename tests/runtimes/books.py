"""Small stock models with tokenizers trained on real books, made by `transformers` and `tokenizers` alone:
what people import.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.paths import DATA

BOOKS = DATA / "corpora" / "classic-books-en" / "train.txt.gz"
PIECES = 4096
SENTINELS = [f"<extra_id_{i}>" for i in range(100)]


def text(characters: int) -> str:
    """The beginning of the books."""
    with gzip.open(BOOKS, "rt", encoding="utf-8") as file:
        return file.read(characters)


def _wordpiece(lines: list[str]) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=special))
    return transformers.BertTokenizerFast(vocab=dict(tokenizer.get_vocab()))


def _bytes(lines: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return transformers.GPT2TokenizerFast(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]]
    )


def _unigram(lines: list[str]) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"]
    )
    tokenizer.train_from_iterator(lines, trainer)
    vocab = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return transformers.T5TokenizerFast(vocab=vocab, extra_ids=len(SENTINELS))


_BERT = dict(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    max_position_embeddings=256,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
_GPT2 = dict(
    n_embd=128,
    n_layer=4,
    n_head=4,
    n_positions=256,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)
_T5 = dict(
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=3,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
KINDS: dict[
    str, tuple[Any, str, dict[str, Any]]
] = {  # its tokenizer, its class and settings: 1.3M, 1.3M and 1.5M parameters
    "BERT": (_wordpiece, "BertForMaskedLM", _BERT),
    "GPT-2": (_bytes, "GPT2LMHeadModel", _GPT2),
    "T5": (_unigram, "T5ForConditionalGeneration", _T5),
}


def make(kind: str, folder: Path) -> Any:
    """The stock model, just initialised, saved with its tokenizer in a folder. Training the tokenizer takes 1
    to 4 s of one core.
    """
    train_tokenizer, stock_class, settings = KINDS[kind]
    tokenizer = train_tokenizer(text(1_000_000).split("\n"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    stock_class = getattr(transformers, stock_class)
    model = stock_class(
        stock_class.config_class(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **settings)
    )
    model.save_pretrained(folder)
    return model
