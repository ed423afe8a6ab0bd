"""Tiny tokenizers of the published kinds, and models for them, in folders that stock transformers saved."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

_DRAW = random.Random(7)
_WORDS = ["".join(_DRAW.choices("abcdefghij", k=_DRAW.randint(1, 8))) for _ in range(200)] + [
    "日本語",
    "tokyo,",
    "Été",
    "end.",
    "why?",
]
LINES = [" ".join(_DRAW.choices(_WORDS, k=12)) for _ in range(400)]


def _wordpiece() -> dict[str, int]:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        LINES,
        trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        ),
    )
    return dict(made.get_vocab())


def _bpe(pre_tokenizer: Any, special: list[str], alphabet: list[str]) -> dict[str, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=special)
    )
    model = json.loads(made.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def _bytes(*special: str) -> dict[str, Any]:
    return _bpe(
        pre_tokenizers.ByteLevel(add_prefix_space=False), list(special), pre_tokenizers.ByteLevel.alphabet()
    )


def _unigram(*special: str) -> list[tuple[str, float]]:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"])
    )
    vocab = json.loads(made.to_str())["model"]["vocab"]
    return [
        *((piece, 0.0) for piece in special),
        *((piece, score) for piece, score in vocab if piece not in special),
    ]


FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
KINDS = {  # the stock class, what it is made of, and the decoder_start_token_id of its config.json
    "bert": lambda: (transformers.BertTokenizerFast(vocab=_wordpiece()), None),
    "gpt2": lambda: (transformers.GPT2TokenizerFast(**_bytes("<|endoftext|>")), None),
    "roberta": lambda: (transformers.RobertaTokenizerFast(**_bytes(*FAIRSEQ, "<mask>")), None),
    "bart": lambda: (transformers.BartTokenizerFast(**_bytes(*FAIRSEQ, "<mask>")), 2),
    "t5": lambda: (transformers.T5TokenizerFast(vocab=_unigram("<pad>", "</s>", "<unk>")), 0),
    "mbart": lambda: (transformers.MBartTokenizerFast(vocab=_unigram(*FAIRSEQ), src_lang="de_DE"), 281),
    "nllb": lambda: (
        transformers.NllbTokenizerFast(
            **_bpe(pre_tokenizers.Metaspace(), [*FAIRSEQ], []), src_lang="deu_Latn"
        ),
        2,
    ),
}


def stock_folder(kind: str, folder: Path) -> Path:
    """A folder of this kind, as `save_pretrained` leaves it, with a config.json beside it where decoders have
    a start of their own.
    """
    tokenizer, start = KINDS[kind]()
    tokenizer.save_pretrained(folder)
    if start is not None:
        (folder / "config.json").write_text(json.dumps({"decoder_start_token_id": start}))
    return folder


_BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
_BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
}
_BART |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 80}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {**_BERT, "max_position_embeddings": 80}),
    "roberta": ("RobertaForMaskedLM", {**_BERT, "max_position_embeddings": 82}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 80}),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 24,
            "d_kv": 10,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 3,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "bart": ("BartForConditionalGeneration", _BART),
    "mbart": ("MBartForConditionalGeneration", _BART),
    "nllb": ("M2M100ForConditionalGeneration", _BART),
}


def stock_model(kind: str, folder: Path) -> Any:
    """A model of this kind with large random weights, saved beside its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(stock_folder(kind, folder))
    name, sizes = MODELS[kind]
    named = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    start = KINDS[kind]()[1]
    named |= {} if start is None else {"decoder_start_token_id": start}
    stock_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = stock_class(stock_class.config_class(vocab_size=len(tokenizer), **sizes, **named)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


HARD = [
    "",
    " ",
    "\n",
    "abc def.",
    "  two  before,   three between, two after  ",
    "line\nline\n\n  \n tab\there\r\nthere\r",
    "🙂 👩‍👩‍👧 🇩🇪 emoji🙂inside",
    "日本語のテキスト、空白なし。",
    "e\u0301 combining ñ n\u0303 \u0300 alone",
    "\x00 \x01\x1f\x7f\x85 control \u200b\u2028\u2029\ufeff\u00a0\u3000 spaces",
    "literal <s> </s> <pad> <unk><mask> <extra_id_0>word<extra_id_99> <0x41> <extra_id_100>",
    "Ünïcödé Ωmega ﬁ ligature ½ ＦＵＬＬ",
    "bytes <0x41> <0x0A><0xE6><0x97><0xA5> a<0x42>b <0x4> <0x4g>",
    "abc" * 2000,
]
