"""Text in, a SentencePiece unigram model out; then text to ids and back, by the very tokenizer.json that is
published.

Ids are 0-3 `<pad> <s> </s> <unk>`, 4 `<mask>`, 5-104 the sentinels `<extra_id_0..99>`, then the language
codes that the recipe lists, the 256 bytes, and the pieces by score. A piece holds a space ("▁") at its start
only and never a line end, so tokenizer.json cuts text before each space and around each line end. `words.py`
cuts it further and remembers the ids of what lies between: 5M tokens/s per core over a corpus of books,
Japanese too, and 7M on words seen before, where SentencePiece itself makes 4M and `tokenizers` without that
memory 0.5-0.9M. Time is linear in the length of a document. Training on 10 MB takes 14 s of one core.

Two things are not reversible: a literal "▁" (U+2581) comes back as a space, and a special token written out
in a text is that token.
"""

import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from trifold.modeling.config import Family
from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import TokenizerConfig as TokenizerConfig
from trifold.pretrain.data.tokenizer import special_tokens
from trifold.pretrain.data.tokenizer.piece_tables import BYTE, sentence_ends, word_starts
from trifold.pretrain.data.tokenizer.word_cache import WordCache, can_split_words
from trifold.pretrain.storage.json_files import check_regular_file

_MARKS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
_SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_CUT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": "▁"}, "behavior": "MergedWithNext", "invert": False},
        # "<0x41>" written out in a text is six characters: without this cut `tokenizers` takes it for the
        # byte's piece
        {
            "type": "Split",
            "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
    ],
}
MAX_VOCAB_SIZE = 1 << 22
_PASSES = 20  # training looks at no more than this many times the text that it samples


class Tokenizer:
    """An opened tokenizer folder, ours or a published one: the ids of special tokens as attributes, text to
    ids and back.

    Which token plays which part: roles.py.
    """

    pad: int
    bos: int
    eos: int
    unk: int | None
    mask: int | None
    start: int  # what a decoder reads first when it writes for an encoder
    before: list[int]  # what stands before and after a text that an encoder reads
    after: list[int]
    sentinels: Sequence[int]  # 100 in a tokenizer of ours
    special: Sequence[int]  # all tokens that are no text
    word_starts: np.ndarray  # (V,) bool: the piece begins a word
    sentence_ends: np.ndarray  # (V,) bool: the piece ends a sentence
    is_trained_here: bool  # trained by `train`, so that decoding gives every text back
    dtype: np.dtype[Any]  # of ids: the smallest unsigned one that holds them all
    fingerprint: str  # of all that decides ids, and of a published tokenizer's own template

    def __init__(self, spec: dict[str, Any], settings: dict[str, Any], model: bytes | None) -> None:
        """`spec` is tokenizer.json, `settings` tokenizer_config.json, `model` SentencePiece's own file."""
        self._spec, self._settings, self._model = spec, settings, model
        self._fast = tokenizers.Tokenizer.from_str(json.dumps(spec | {"padding": None, "truncation": None}))
        self.is_trained_here = (spec["normalizer"], spec["pre_tokenizer"]) == (_SPACES, _CUT)
        ids = self._fast.get_vocab()
        pieces = {i: piece for piece, i in ids.items()}
        self.vocab_size = max(pieces) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:  # tables of this size follow
            raise UserError(
                f"tokenizer.json has the id {max(pieces):,}; vocabularies of at most {MAX_VOCAB_SIZE:,} are read"
            )
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self._words = (
            WordCache(self._fast, spec, self.dtype)
            if self.is_trained_here and can_split_words(spec)
            else None
        )
        marks = {
            role: ids[token]
            for role, token in special_tokens.special_tokens(spec, settings).items()
            if token is not None
        }
        self.pad, self.bos, self.eos, self.start = (marks[role] for role in ("pad", "bos", "eos", "start"))
        self.unk, self.mask = marks.get("unk"), marks.get("mask")
        self.before, self.after = self.special_prefix_suffix("encoder")
        self.sentinels = [ids[name] for name in _SENTINELS if name in ids]
        added = [token["id"] for token in spec["added_tokens"] if token["special"]]
        self.special = sorted({*added, *marks.values()})
        self.word_starts, self.sentence_ends = word_starts(spec, pieces), sentence_ends(spec, pieces)
        rules = (
            [] if self.is_trained_here else [self.before, self.after, self.start]
        )  # of ours they follow from the marks
        self.fingerprint = _fingerprint(spec, [self.pad, self.bos, self.eos, self.unk, self.mask], rules)

    @classmethod
    def open(cls, folder: Path | str) -> "Tokenizer":
        """Raises UserError where tokenizer.json or tokenizer_config.json is missing or broken, or names a
        special token that there is not.
        """
        folder = Path(folder)
        model = folder / "tokenizer.model"
        try:
            spec, settings = special_tokens.read(folder)
            if model.exists():
                check_regular_file(model)
            return cls(spec, settings, model.read_bytes() if model.exists() else None)
        except (UserError, OSError):
            raise
        except BaseException as error:  # `tokenizers` raises nothing narrower for what it cannot read
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            said = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{folder / 'tokenizer.json'} is JSON, but no tokenizer ({said}); train or copy the"
                " tokenizer again"
            ) from error

    def special_prefix_suffix(self, family: Family) -> tuple[list[int], list[int]]:
        """What stands before and after a text that a model of this family reads: as the published tokenizer
        puts it; of ours BOS, and EOS where there is an encoder.
        """
        if self.is_trained_here:
            return [self.bos], [] if family == "decoder" else [self.eos]
        return self._template()

    def pair_special_tokens(self) -> tuple[list[int], list[int], list[int]]:
        """What stands before, between and after two texts that an encoder reads as one, as the published
        tokenizer puts it (RoBERTa has two </s> between them); BOS, EOS and EOS where it puts nothing.
        """
        default = [self.bos], [self.eos], [self.eos]
        if self.is_trained_here:
            return default
        encoding = self._fast.encode("a", "a")
        first, second = ([i for i, text in enumerate(encoding.sequence_ids) if text == n] for n in (0, 1))
        ids = encoding.ids
        found = ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]
        return found if all(found) else default

    @property
    def gives_token_types(self) -> bool:
        """Whether the published tokenizer tells a model that the second of two texts has type 1, as BERT's
        does.
        """
        names = self._settings.get("model_input_names")
        if self.is_trained_here or (names is not None and "token_type_ids" not in names):
            return False
        return self._fast.encode("a", "a").type_ids[-1] == 1

    def decoder_target(self, ids: Sequence[int]) -> list[int]:
        """What a decoder that reads a source writes after `start`: the text as `around` marks it; a mark that
        is the start comes once.
        """
        before, after = self.special_prefix_suffix("encoder-decoder")
        return [*before[before[:1] == [self.start] :], *ids, *after]

    def _template(self) -> tuple[list[int], list[int]]:
        encoding = self._fast.encode("a")
        text = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (T,) of `dtype`, as tokenizer.json gives them, without begin and end
        marks.
        """
        if self._words is None:
            return [
                np.array(e.ids, self.dtype)
                for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)
            ]
        return self._words.encode(texts)

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of one text, as `encode_batch` gives them, and the characters that each stands for: from,
        up to (a space belongs to the piece after it; the bytes of one character all stand for it).
        """
        encoding = self._fast.encode(text, add_special_tokens=False)
        spans: list[tuple[int, int]] = []
        for piece, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            byte = BYTE.fullmatch(piece) if self._spec["model"].get("byte_fallback") else None
            if byte:  # `tokenizers` gives each byte the whole run of unknown characters
                again = bool(spans) and start <= spans[-1][0] < end
                at = spans[-1][0] + (int(byte[1], 16) < 0x80 or int(byte[1], 16) >= 0xC0) if again else start
                start, end = at, at + 1
            spans.append((start, end))
        return encoding.ids, spans

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids that a model wrote, without the marks that stand around it."""
        marks = {self.pad, self.bos, self.eos, self.start, *self.before, *self.after}
        return self.decode([i for i in ids if i not in marks])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens written out."""
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path | str, family: Family) -> None:
        """Write the published form: of a tokenizer of ours BOS text EOS for families with an encoder, BOS
        text for a decoder; any other as it came.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec = self._spec | {"truncation": None, "padding": None}  # training reads and pads texts by itself
        spec |= {"post_processor": self._marking(family)} if self.is_trained_here else {}
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self._settings, indent=2), encoding="utf-8")
        if self._model:
            (folder / "tokenizer.model").write_bytes(self._model)

    def _marking(self, family: Family) -> dict[str, Any]:
        """The template of a tokenizer of ours, as tokenizer.json says it."""
        bos, eos = _MARKS["bos"], _MARKS["eos"]
        template = processors.TemplateProcessing(
            single=[bos, "$A"] if family == "decoder" else [bos, "$A", eos],
            pair=[bos, "$A", "$B:1"] if family == "decoder" else [bos, "$A", eos, "$B:1", f"{eos}:1"],
            special_tokens=[(bos, self.bos), (eos, self.eos)],
        )
        return dict(json.loads(template.__getstate__()))


def is_panic(error: BaseException) -> bool:
    """Whether an error comes from a panic in `tokenizers`, such as a regular expression that backtracks without
    end; its class is not exported, and no Exception.
    """
    return type(error).__name__ == "PanicException"


def train(texts: Iterable[str], config: TokenizerConfig, vocab_size: int, folder: Path | str) -> Tokenizer:
    """Train a unigram model (Kudo 2018) of exactly `vocab_size` pieces on a sample of the texts, and write it
    to `folder`.

    The same texts give the same bytes. Raises UserError where the texts do not support that many pieces, or the
    fixed ones need more.
    """
    lines = _sample(texts, config.sample_bytes)
    if not lines:
        raise UserError("there is no text to train a tokenizer on: the corpus holds 0 lines")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            # a space, even where the texts hardly have one: as bytes it does not come back as a space
            required_chars="▁",
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
            user_defined_symbols=[_MARKS["mask"], *_SENTINELS, *config.languages],
            max_sentence_length=1 << 30,  # the default drops lines over 4,192 bytes
            num_threads=4,  # fixed: sums of probabilities depend on how the text is divided
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _refusal(error, vocab_size, lines) from None
    tokenizer = _to_fast(written.getvalue(), [*_SENTINELS, *config.languages])
    tokenizer.save(folder, "encoder-decoder")
    return tokenizer


def _sample(texts: Iterable[str], budget: int) -> list[str]:
    """Lines drawn evenly from the texts, at most `budget` bytes of them, in the order of the text: those with
    the smallest random keys.

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
        return UserError(
            f"{text} support at most {most[1]} pieces, not {vocab_size}: set model.vocab_size to at most"
            f" {most[1]}, or add text"
        )
    if least := re.search(r"(\d+) vs (\d+)", str(error)):
        return UserError(
            f"special tokens, bytes and the text's characters alone need {least[2]} pieces, not"
            f" {vocab_size}: set model.vocab_size above"
            f" {least[2]}, or lower tokenizer.character_coverage"
        )
    return error


def _to_fast(model: bytes, additional: list[str]) -> Tokenizer:
    """The same model for the `tokenizers` library (settings that agree: docs/design.md)."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    fast = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=pieces.unk_id(), byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in [*_MARKS.values(), *additional]]
    )
    settings = {f"{role}_token": mark for role, mark in _MARKS.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": additional,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(json.loads(fast.to_str()) | {"pre_tokenizer": _CUT}, settings, model)


def _fingerprint(spec: dict[str, Any], marks: list[int | None], rules: list[Any]) -> str:
    deciding = [spec[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")]
    return blake2b(json.dumps([deciding, marks, *rules], sort_keys=True).encode(), digest_size=16).hexdigest()
