"""Which tokenization fits the language of a score: references come in, the name of sacrebleu's tokenizer or
the words that ROUGE compares go out.

Without a language it follows from the script of the text. Where a tool is missing, an explicit setting is an
error that says what to install, and a language found from the text is scored by characters, with a note.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import regex

from trifold.finetune.examples.words import unspaced_as_words
from trifold.modeling.errors import UserError

_BY_LANGUAGE = {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
_UNSPACED_LANGUAGES = ("th", "lo", "km", "my", "bo", "dz")  # sacrebleu has no words of theirs
_PACKAGES = {"ja-mecab": ("MeCab", "ja"), "ko-mecab": ("mecab_ko", "ko")}
_DEFAULT = "13a"
_SCRIPTS = {
    "kana": regex.compile(r"[\p{Script=Hiragana}\p{Script=Katakana}]"),
    "han": regex.compile(r"\p{Script=Han}"),
    "hangul": regex.compile(r"\p{Script=Hangul}"),
    "unspaced": regex.compile(
        r"[\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}\p{Script=Tibetan}]"
    ),
    "letter": regex.compile(r"\p{L}"),
}
_MOSES = re.compile(r"&(?:apos|quot|amp|lt|gt|#91|#93|#124);")
_SAMPLE = 1000  # texts from which the script is found


def bleu_tokenization(tokenize: str | None, language: str | None, texts: Sequence[str]) -> tuple[str, str]:
    """sacrebleu's tokenizer for BLEU, and a note for the user (empty: none): `tokenize` itself, else by the
    language, else by the script of the texts.

    Raises UserError where the tokenizer that a setting names is not installed.
    """
    if tokenize is not None:
        return _installed(tokenize, "task.tokenize"), ""
    if language is not None:
        code = re.split("[-_]", language.lower())[0]
        if code in _UNSPACED_LANGUAGES:
            return "char", ""
        return _installed(_BY_LANGUAGE.get(code, _DEFAULT), f"task.language: {language}"), ""
    code = find_language(texts)
    wanted = "char" if code == "th" else _BY_LANGUAGE.get(code or "", _DEFAULT)
    if wanted == _DEFAULT:
        return wanted, ""
    name = {"zh": "Chinese", "ja": "Japanese", "ko": "Korean", "th": "a script without spaces"}[str(code)]
    if missing := _missing(wanted):
        return "char", f"the references are {name}: BLEU is counted by characters ({missing} for words)."
    return wanted, f"the references are {name}: BLEU is counted by sacrebleu's tokenizer {wanted}."


def find_language(texts: Sequence[str]) -> str | None:
    """zh, ja, ko, or th for any script that is written without spaces, where most letters are of it; None for
    all others.
    """
    counts: Counter[str] = Counter()
    step = max(1, len(texts) // _SAMPLE)
    for text in texts[::step]:
        counts.update({name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()})
    half = counts["letter"] / 2
    if not half:
        return None
    if counts["kana"] + counts["han"] > half:
        return "ja" if counts["kana"] > 0.05 * counts["han"] else "zh"
    if counts["hangul"] > half:
        return "ko"
    return "th" if counts["unspaced"] > half else None


def moses_note(texts: Sequence[str], where: str) -> str:
    """A note on text in which Moses' tokenizer has escaped characters; empty where there is none."""
    escaped = [match[0] for text in texts if (match := _MOSES.search(text))]
    if not escaped:
        return ""
    return (
        f"{len(escaped):,} of {len(texts):,} texts of {where} hold escapes of the Moses tokenizer such as"
        f" {escaped[0]}, which scores count as words: unescape and detokenize them."
    )


class ScoreWords:
    """The words that ROUGE compares, in lower case and composed (NFC), for rouge-score's `tokenizer`.

    English words of more than three letters are stemmed (Porter), as rouge-score does; without a language
    those in a-z.
    """

    def __init__(self, language: str | None, stemmer: Any) -> None:
        code = None if language is None else re.split("[-_]", language.lower())[0]
        self.stemmer = stemmer if code in (None, "en") else None

    @property
    def signature(self) -> str:
        stemming = "Porter stemming of words in a-z" if self.stemmer else "no stemming"
        return f"Unicode words, graphemes of scripts without spaces, {stemming}"

    def tokenize(self, text: str) -> list[str]:
        tokens = unspaced_as_words(unicodedata.normalize("NFC", text.lower()))
        if self.stemmer is None:
            return tokens
        return [self.stemmer.stem(t) if len(t) > 3 and t.isascii() else t for t in tokens]


def _installed(tokenize: str, setting: str) -> str:
    if missing := _missing(tokenize):
        raise UserError(f"{setting} needs sacrebleu's tokenizer {tokenize}: {missing}.")
    return tokenize


def _missing(tokenize: str) -> str:
    """What to install before a tokenizer can be used; empty: nothing."""
    if tokenize in _PACKAGES:
        module, extra = _PACKAGES[tokenize]
        return "" if find_spec(module) else f"pip install 'sacrebleu[{extra}]'"
    if tokenize in ("flores101", "flores200", "spBLEU-1K"):
        sentencepiece: Any = import_module("sacrebleu.tokenizers.tokenizer_spm")
        name = Path(sentencepiece.SPM_MODELS[tokenize]["url"]).name
        model = Path(sentencepiece.SACREBLEU_DIR) / "models" / name
        return "" if model.exists() else f"put its SentencePiece model at {model}"
    return ""
