"""Text in, a SentencePiece unigram model out; then text to ids and back, by the very tokenizer.json that is published.

Ids are 0-3 `<pad> <s> </s> <unk>`, 4 `<mask>`, 5-104 the sentinels `<extra_id_0..99>`, 105-360 the bytes, then the pieces by score.
A piece holds a space ("▁") at its start only and never a line end, so tokenizer.json cuts text before each space and around each line
end, and a word always has the same ids. `encode_batch` remembers them: 2.3M tokens/s per core over a corpus of books and 4.8M once
warm, where SentencePiece itself makes 4-5M and `tokenizers` without that memory 0.5-0.9M. Where words do not recur (Japanese: a line is
a word) it is 0.3-0.8M against 1.5M. Time is linear in the length of a document. Training on 10 MB takes 14 s of one core.

Two things are not reversible: a literal "▁" (U+2581) comes back as a space, and a special token written out in a text is that token.
"""

import io
import json
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from modeling.config import Family, Refused
from pretrain.config import Tokenizer as TokenizerConfig

_MARKS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
_SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
_CUT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": "▁"}, "behavior": "MergedWithNext", "invert": False},
        # "<0x41>" written out in a text is six characters: without this cut `tokenizers` takes it for the byte's piece
        {"type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "MergedWithPrevious", "invert": False},
    ],
}
_WORD = re.compile("\n|[ ▁]?[^ ▁\n]+|[ ▁]")  # the first two cuts, made before spaces have become "▁"
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_REMEMBERED = 4_000_000  # characters of words: about 120 MB
_PASSES = 20  # training looks at no more than this many times the text that it samples


class Tokenizer:
    """An opened tokenizer folder: the ids of special tokens as attributes, text to ids and back."""

    pad: int
    bos: int
    eos: int
    unk: int
    mask: int
    sentinels: list[int]  # 100 in a tokenizer of ours
    word_starts: np.ndarray  # (V,) bool: the piece begins a word, see _starts_word
    dtype: np.dtype[Any]  # of ids: the smallest unsigned one that holds them all
    fingerprint: str  # of all that decides ids; the published template is not part of it

    def __init__(self, spec: dict[str, Any], settings: dict[str, Any], model: bytes | None) -> None:
        """`spec` is tokenizer.json, `settings` tokenizer_config.json, `model` SentencePiece's own file."""
        self._spec, self._settings, self._model = spec, settings, model
        self._fast = tokenizers.Tokenizer.from_str(json.dumps(spec | {"padding": None, "truncation": None}))
        self._by_word = spec["pre_tokenizer"] == _CUT
        self._ids_of: dict[str, bytes] = {}
        self._remembered = 0
        pieces = {i: piece for piece, i in self._fast.get_vocab().items()}
        self.vocab_size = max(pieces) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        for role in _MARKS:
            setattr(self, role, self._fast.token_to_id(settings[f"{role}_token"]))
        self.sentinels = [i for i in map(self._fast.token_to_id, _SENTINELS) if i is not None]
        self.word_starts = np.array([_starts_word(pieces.get(i, "")) for i in range(self.vocab_size)])
        self.fingerprint = _fingerprint(spec, [getattr(self, role) for role in _MARKS])

    @classmethod
    def open(cls, folder: Path | str) -> "Tokenizer":
        """Raises Refused where tokenizer.json or tokenizer_config.json is missing or broken, or does not name a special token."""
        folder = Path(folder)
        spec, settings = (_read_json(folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
        model = folder / "tokenizer.model"
        try:
            for role in _MARKS:
                mark = settings.get(f"{role}_token")
                settings[f"{role}_token"] = mark = mark["content"] if isinstance(mark, dict) else mark
                if mark not in [token["content"] for token in spec["added_tokens"]]:
                    said = f"tokenizer_config.json gives {mark!r} as {role}_token, which is no added token of tokenizer.json"
                    raise Refused(f"{folder}: {said}")
            return cls(spec, settings, model.read_bytes() if model.exists() else None)
        except (Refused, OSError):
            raise
        except Exception as error:  # `tokenizers` raises nothing narrower for what it cannot read
            said = f"{type(error).__name__}: {error}"
            raise Refused(f"{folder / 'tokenizer.json'} is JSON, but no tokenizer ({said}); train or copy the tokenizer again") from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (T,) of `dtype`, as tokenizer.json gives them, without begin and end marks."""
        if not self._by_word:
            return [np.array(e.ids, self.dtype) for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        words = [_WORD.findall(text) for text in texts]
        new = list(set().union(*words) - self._ids_of.keys())
        for word, encoding in zip(new, self._fast.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self._ids_of[word] = np.array(encoding.ids, self.dtype).tobytes()
        ids = [np.frombuffer(b"".join(map(self._ids_of.__getitem__, line)), self.dtype) for line in words]
        self._remembered += sum(map(len, new))
        if self._remembered > _REMEMBERED:
            self._ids_of, self._remembered = {}, 0
        return ids

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of one text, as `encode_batch` gives them, and the characters that each stands for: from, up to (a space belongs to
        the piece after it; the bytes of one character all stand for it)."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        spans: list[tuple[int, int]] = []
        for piece, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            if byte := _BYTE.fullmatch(piece):  # `tokenizers` gives each byte the whole run of unknown characters
                again = bool(spans) and start <= spans[-1][0] < end
                at = spans[-1][0] + (int(byte[1], 16) < 0x80 or int(byte[1], 16) >= 0xC0) if again else start
                start, end = at, at + 1
            spans.append((start, end))
        return encoding.ids, spans

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens written out."""
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path | str, family: Family) -> None:
        """Write the published form: BOS text EOS for families with an encoder, BOS text for a decoder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        bos, eos = self._settings["bos_token"], self._settings["eos_token"]
        template = processors.TemplateProcessing(
            single=[bos, "$A"] if family == "decoder" else [bos, "$A", eos],
            pair=[bos, "$A", "$B:1"] if family == "decoder" else [bos, "$A", eos, "$B:1", f"{eos}:1"],
            special_tokens=[(bos, self.bos), (eos, self.eos)],
        )
        spec = self._spec | {"post_processor": json.loads(template.__getstate__())}
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self._settings, indent=2), encoding="utf-8")
        if self._model:
            (folder / "tokenizer.model").write_bytes(self._model)


def train(texts: Iterable[str], config: TokenizerConfig, vocab_size: int, folder: Path | str) -> Tokenizer:
    """Train a unigram model (Kudo 2018) of exactly `vocab_size` pieces on a sample of the texts, and write it to `folder`.

    The same texts give the same bytes. Raises Refused where the texts do not support that many pieces, or the fixed ones need more.
    """
    lines = _sample(texts, config.sample_bytes)
    if not lines:
        raise Refused("there is no text to train a tokenizer on: the corpus holds 0 lines")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=_MARKS["pad"],
            bos_piece=_MARKS["bos"],
            eos_piece=_MARKS["eos"],
            unk_piece=_MARKS["unk"],
            user_defined_symbols=[_MARKS["mask"], *_SENTINELS],
            max_sentence_length=1 << 30,  # the default drops lines over 4,192 bytes
            num_threads=4,  # fixed: sums of probabilities depend on how the text is divided
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _refusal(error, vocab_size, lines) from None
    tokenizer = _to_fast(written.getvalue())
    tokenizer.save(folder, "encoder-decoder")
    return tokenizer


def _sample(texts: Iterable[str], budget: int) -> list[str]:
    """Lines drawn evenly from the texts, at most `budget` bytes of them, in the order of the text: those with the smallest random keys.

    Only the first `_PASSES * budget` bytes of text are looked at, so that an endless stream ends.
    """
    draw, kept, size, seen = random.Random(0), [], 0, 0  # type: ignore[var-annotated]
    for order, line in enumerate(line for text in texts for line in text.split("\n") if line):
        length = len(line.encode())
        heappush(kept, (-draw.random(), order, length, line))
        size, seen = size + length, seen + length
        while size > budget and len(kept) > 1:
            size -= heappop(kept)[2]
        if seen > _PASSES * budget:
            break
    return [line for _, line in sorted((order, line) for _, order, _, line in kept)]


def _refusal(error: RuntimeError, vocab_size: int, lines: list[str]) -> Exception:
    """SentencePiece's complaint about the vocabulary's size, as a sentence with both numbers."""
    text = f"{len(lines):,} lines of training text"
    if most := re.search(r"<= (\d+)", str(error)):
        return Refused(f"{text} support at most {most[1]} pieces, not {vocab_size}: set model.vocab_size to at most {most[1]}, or add text")
    if least := re.search(r"(\d+) vs (\d+)", str(error)):
        return Refused(
            f"special tokens, bytes and the text's characters alone need {least[2]} pieces, not {vocab_size}: set model.vocab_size above"
            f" {least[2]}, or lower tokenizer.character_coverage"
        )
    return error


def _to_fast(model: bytes) -> Tokenizer:
    """The same model for the `tokenizers` library (settings that agree: docs/design.md)."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    fast = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id(), byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in [*_MARKS.values(), *_SENTINELS]])
    settings = {f"{role}_token": mark for role, mark in _MARKS.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": _SENTINELS,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(json.loads(fast.to_str()) | {"pre_tokenizer": _CUT}, settings, model)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        raise Refused(f"there is no {path}: a tokenizer folder holds tokenizer.json and tokenizer_config.json") from None
    except ValueError as error:
        raise Refused(f"{path} is not whole JSON ({error}); train or copy the tokenizer again") from None


def _fingerprint(spec: dict[str, Any], marks: list[int]) -> str:
    deciding = [spec[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")]
    return blake2b(json.dumps([deciding, marks], sort_keys=True).encode(), digest_size=16).hexdigest()


def _starts_word(piece: str) -> bool:
    """Whether a piece begins a word, for whole-word masking: judged by its first character.

    Spaces, line ends, punctuation and symbols begin one (a newline belongs to the word after it, as a space does), so do wide
    characters (Chinese, Japanese, Korean: each piece is a word) and special tokens; letters, digits and marks go on with one.
    A byte is judged alike: an ASCII byte as its character, a UTF-8 lead byte begins a word, the bytes after it do not.
    """
    if byte := _BYTE.fullmatch(piece):
        value = int(byte[1], 16)
        return value >= 0xC0 or (value < 0x80 and not chr(value).isalnum())
    first = piece[:1]
    return unicodedata.category(first)[0] not in "LNM" or unicodedata.east_asian_width(first) in "WF" if first else True
