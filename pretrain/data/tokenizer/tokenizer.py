"""Training a tokenizer (text comes in, a SentencePiece unigram model goes out), and text to ids and back by
the same tokenizer.json that is published.

Ids are 0-3 `<pad> <s> </s> <unk>`, 4 `<mask>`, 5-104 the sentinels `<extra_id_0..99>`, then the language
codes that the recipe lists, the 256 bytes, and the pieces by score. A piece holds a space ("▁") at its start
only and never a line end, so tokenizer.json cuts text before each space and around each line end.
`word_cache.py` cuts it further and caches the ids of what lies between: 5M tokens/s per core over a corpus of
books, Japanese too, and 7M on words seen before, where SentencePiece itself makes 4M and `tokenizers` without
that cache 0.5-0.9M. Time is linear in the length of a document. Training on 10 MB takes 14 s of one core.

Two things are not reversible: a literal "▁" (U+2581) comes back as a space, and a special token written out
in a text is that token.
"""

import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from trifold.pretrain.storage.fingerprint import fingerprint
from trifold.pretrain.storage.json_files import check_regular_file

_SPECIALS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
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
# characters of a line that SentencePiece trains on: it looks at every substring that occurs twice before it
# cuts at spaces, and two equal lines of n characters cost n**2 / 2
_MAX_LINE = 2000


class Tokenizer:
    """An opened tokenizer folder, one trained here or a published one: the ids of special tokens as
    attributes (their roles: special_tokens.py), text to ids and back.

    A tokenizer.json may make `tokenizers` panic, when it is opened or on some text: that is a UserError.
    """

    pad: int
    bos: int
    eos: int
    unk: int | None
    mask: int | None
    start: int  # what a decoder reads first when it writes for an encoder
    before: list[int]  # special tokens before and after a text that an encoder reads
    after: list[int]
    sentinels: Sequence[int]  # 100 in a tokenizer trained here
    special: Sequence[int]  # all tokens that are no text
    word_starts: np.ndarray  # (V,) bool: the piece begins a word
    sentence_ends: np.ndarray  # (V,) bool: the piece ends a sentence
    is_trained_here: bool  # trained by `train`, so that decoding gives every text back
    dtype: np.dtype[Any]  # of ids: the smallest unsigned one that holds them all
    fingerprint: str  # of all that decides ids, and of a published tokenizer's own template

    def __init__(
        self,
        spec: dict[str, Any],
        settings: dict[str, Any],
        model: bytes | None,
        name: str = "tokenizer.json",
    ) -> None:
        """`spec` is tokenizer.json, `settings` tokenizer_config.json, `model` SentencePiece's own file;
        `name` is the file's name in messages.
        """
        self._spec, self._settings, self._model, self._name = spec, settings, model, name
        self._fast = tokenizers.Tokenizer.from_str(json.dumps(spec | {"padding": None, "truncation": None}))
        self.is_trained_here = (spec["normalizer"], spec["pre_tokenizer"]) == (_SPACES, _CUT)
        ids = self._fast.get_vocab()
        pieces = {i: piece for piece, i in ids.items()}
        self.vocab_size = max(pieces) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:  # tables of this size follow
            raise UserError(
                f"tokenizer.json has the id {max(pieces):,}; vocabularies of at most {MAX_VOCAB_SIZE:,}"
                " are read"
            )
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self._words: WordCache | None = None
        if self.is_trained_here and can_split_words(spec):
            self._words = WordCache(self._fast, spec, self.dtype)

        roles = special_tokens.special_tokens(spec, settings)
        special = {role: ids[token] for role, token in roles.items() if token is not None}
        self.pad, self.bos, self.eos, self.start = (special[role] for role in ("pad", "bos", "eos", "start"))
        self.unk, self.mask = special.get("unk"), special.get("mask")
        self.before, self.after = self.special_prefix_suffix("encoder")
        self.sentinels = [ids[name] for name in _SENTINELS if name in ids]
        added = [token["id"] for token in spec["added_tokens"] if token["special"]]
        self.special = sorted({*added, *special.values()})
        self.word_starts, self.sentence_ends = word_starts(spec, pieces), sentence_ends(spec, pieces)

        deciding = [spec[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")]
        values: list[Any] = [deciding, [self.pad, self.bos, self.eos, self.unk, self.mask]]
        if not self.is_trained_here:  # there they follow from the special tokens
            values += [self.before, self.after, self.start]
        self.fingerprint = fingerprint(values, sort_keys=True)

    @classmethod
    def open(cls, folder: Path | str) -> "Tokenizer":
        """Raises UserError where tokenizer.json or tokenizer_config.json is missing or damaged, or names a
        special token that does not exist.
        """
        folder = Path(folder)
        model_file, name = folder / "tokenizer.model", folder / "tokenizer.json"
        try:
            spec, settings = special_tokens.read(folder)
            if model_file.exists():
                check_regular_file(model_file)
            model = model_file.read_bytes() if model_file.exists() else None
            return cls(spec, settings, model, str(name))
        except (UserError, OSError):
            raise
        except BaseException as error:  # `tokenizers` raises nothing narrower for what it cannot read
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            raise UserError(
                f"{name} is JSON, but no tokenizer ({type(error).__name__}: {error}); train or copy the"
                " tokenizer again"
            ) from error

    @contextmanager
    def _panics_reported(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            raise UserError(
                f"{self._name} fails on this text ({error}): `tokenizers` cannot apply one of its rules, such"
                " as a regular expression that takes exponential time; use another tokenizer"
            ) from None

    def special_prefix_suffix(self, family: Family) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text that a model of this family reads: as the published
        tokenizer adds them; in one trained here BOS, and EOS where there is an encoder.
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
        """What a decoder that reads a source writes after `start`: the text with its special tokens, without
        a first one that is the start token.
        """
        before, after = self.special_prefix_suffix("encoder-decoder")
        return [*before[before[:1] == [self.start] :], *ids, *after]

    def _template(self) -> tuple[list[int], list[int]]:
        with self._panics_reported():
            encoding = self._fast.encode("a")
        text = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (T,) of `dtype`, as tokenizer.json gives them, without special tokens around
        it.
        """
        with self._panics_reported():
            if self._words is not None:
                return self._words.encode(texts)
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of one text, as `encode_batch` gives them, and the characters (start, end) of each: a space
        belongs to the piece after it, and the bytes of one character all have that character.
        """
        with self._panics_reported():
            encoding = self._fast.encode(text, add_special_tokens=False)
        has_bytes = bool(self._spec["model"].get("byte_fallback"))
        spans: list[tuple[int, int]] = []
        for piece, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
            byte = BYTE.fullmatch(piece) if has_bytes else None
            if byte:  # `tokenizers` gives each byte the full run of unknown characters
                if spans and start <= spans[-1][0] < end:
                    value = int(byte[1], 16)
                    begins_character = value < 0x80 or value >= 0xC0
                    start = spans[-1][0] + begins_character
                end = start + 1
            spans.append((start, end))
        return encoding.ids, spans

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids that a model wrote, without the special tokens around it."""
        around = {self.pad, self.bos, self.eos, self.start, *self.before, *self.after}
        return self.decode([i for i in ids if i not in around])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens written out."""
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path | str, family: Family) -> None:
        """Write the published form. One trained here adds BOS and EOS to a text for families with an encoder,
        BOS for a decoder; any other is written as it was read.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec = self._spec | {"truncation": None, "padding": None}  # training reads and pads texts by itself
        if self.is_trained_here:
            spec["post_processor"] = self._post_processor(family)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self._settings, indent=2), encoding="utf-8")
        if self._model:
            (folder / "tokenizer.model").write_bytes(self._model)

    def _post_processor(self, family: Family) -> dict[str, Any]:
        """The template of a tokenizer trained here, as tokenizer.json has it."""
        bos, eos = _SPECIALS["bos"], _SPECIALS["eos"]
        single, pair = [bos, "$A", eos], [bos, "$A", eos, "$B:1", f"{eos}:1"]
        if family == "decoder":
            single, pair = [bos, "$A"], [bos, "$A", "$B:1"]
        template = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(bos, self.bos), (eos, self.eos)]
        )
        return dict(json.loads(template.__getstate__()))


def is_panic(error: BaseException) -> bool:
    """Whether an error comes from a panic in `tokenizers`, such as a regular expression that backtracks
    without end; its class is not exported, and no Exception.
    """
    return type(error).__name__ == "PanicException"


def train(texts: Iterable[str], config: TokenizerConfig, vocab_size: int, folder: Path | str) -> Tokenizer:
    """Train a unigram model (Kudo 2018) of exactly `vocab_size` pieces on a sample of the texts, and write it
    to `folder`.

    The same texts give the same bytes. Raises UserError where the texts do not support that many pieces, or
    the fixed ones need more.
    """
    lines = _sample(texts, config.sample_bytes)
    if not lines:
        raise UserError("there is no text to train a tokenizer on: the corpus holds 0 lines")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_cut_lines(lines),
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
            pad_piece=_SPECIALS["pad"],
            bos_piece=_SPECIALS["bos"],
            eos_piece=_SPECIALS["eos"],
            unk_piece=_SPECIALS["unk"],
            user_defined_symbols=[_SPECIALS["mask"], *_SENTINELS, *config.languages],
            max_sentence_length=1 << 30,  # the default drops lines over 4,192 bytes
            num_threads=4,  # fixed: sums of probabilities depend on how the text is divided
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _size_error(error, vocab_size, lines) from None
    tokenizer = _to_fast(written.getvalue(), [*_SENTINELS, *config.languages])
    tokenizer.save(folder, "encoder-decoder")
    return tokenizer


def _sample(texts: Iterable[str], budget: int) -> list[str]:
    """Lines drawn evenly from the texts, at most `budget` bytes of them, in the order of the text: those with
    the smallest random keys.

    Only the first `_PASSES * budget` bytes of text are looked at, so that an endless stream ends.
    """
    rng = random.Random(0)
    sample: list[tuple[float, int, int, str]] = []  # a heap by random key, the largest first
    sample_bytes, bytes_seen = 0, 0
    all_lines = (line for text in texts for line in text.split("\n") if line)
    for order, line in enumerate(all_lines):
        length = len(line.encode())
        heappush(sample, (-rng.random(), order, length, line))
        sample_bytes += length
        bytes_seen += length
        while sample_bytes > budget and len(sample) > 1:
            sample_bytes -= heappop(sample)[2]
        if bytes_seen > _PASSES * budget:
            break
    return [line for _, line in sorted((order, line) for _, order, _, line in sample)]


def _cut_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines of at most _MAX_LINE characters: longer ones are cut before their last space that fits, else at
    that length. No piece holds a space inside, so pieces lose nothing by a cut before one.
    """
    for line in lines:
        start = 0
        while len(line) - start > _MAX_LINE:
            stop = line.rfind(" ", start + 1, start + _MAX_LINE)
            stop = stop if stop > 0 else start + _MAX_LINE
            yield line[start:stop]
            start = stop
        yield line[start:]


def _size_error(error: RuntimeError, vocab_size: int, lines: list[str]) -> Exception:
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
        [AddedToken(piece, normalized=False, special=True) for piece in [*_SPECIALS.values(), *additional]]
    )
    settings = {f"{role}_token": mark for role, mark in _SPECIALS.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": additional,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(json.loads(fast.to_str()) | {"pre_tokenizer": _CUT}, settings, model)
