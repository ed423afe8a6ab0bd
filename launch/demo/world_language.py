"""The second language of the toy corpus: every English sentence of launch/demo/world.py has one translation,
made by rule.

A gloss (its words in order, each with an ending), the subject and the value come in; the sentence comes out.
The grammar, compared with English: the verb comes last and carries the tense, case endings replace
prepositions, an owner precedes what is owned, an adjective follows its noun and takes its ending; there are
no articles. Names stay and take endings. Stems are derived from the English word by a random generator, so
there is no word list.
"""

from functools import cache

import numpy as np

# An ending loses its vowel after a vowel: Fenla, of Fenla is Fenlar; Marsen, of Marsen is Marsenor.
ENDINGS = {
    "of": "or",
    "obj": "am",
    "in": "esh",
    "to": "un",
    "on": "ost",
    "by": "ik",
    "as": "ul",
    "for": "eth",
    "from": "ab",
    "through": "iv",
    "around": "och",
    "since": "ent",
    "now": "ez",
    "past": "ig",
}

# relation: a gloss for each of the English sentences, in their order; s is the subject, v the value.
GLOSSES: dict[str, tuple[str, ...]] = {
    "born_in": (
        "s v+in bear+past",
        "s v+in world+to come+past",
        "v s+of birth+of place be+now",
        "s v+of native be+now",
    ),
    "born_year": ("s v+in bear+past", "s+of birth+of year v be+now", "s v+in first light+obj see+past"),
    "lives_in": (
        "s v+in live+now",
        "s v+in house+obj have+now",
        "v s+of home be+now",
        "today s v+in live+now",
    ),
    "trade": ("s v+as work+now", "s v be+now", "s trade+by v be+now", "s v+as living+obj earn+now"),
    "employer": (
        "s v+for work+now",
        "v s+obj employ+now",
        "s v+by employed be+now",
        "s+of employer v be+now",
    ),
    "likes": (
        "s v+obj like+now",
        "sunday+in s v+of fond be+now",
        "s most v+obj enjoy+now",
        "s hour+obj free+obj all+obj v+for spend+now",
    ),
    "friend": (
        "s v+of friend be+now",
        "v s and friend old be+now",
        "s+of friend best v be+now",
        "s often v+obj visit+now",
    ),
    "river": ("s v+on lie+now", "v river s+through flow+now", "s v+of bank+on build+past"),
    "region": ("s v+in town be+now", "s v+to belong+now", "s town v+in find+now", "v s+around region be+now"),
    "founded": ("s v+in found+past", "s+of history v+in begin+now", "v+since s be+now"),
    "known_for": (
        "s v+for its+for know+now",
        "visitor s+to v+for its+for come+now",
        "s+of pride v its be+now",
    ),
    "seat": (
        "s seat+obj its+obj v+in have+now",
        "s v+in firm be+now",
        "s+of office v+in be+now",
        "v s+of seat be+now",
    ),
    "makes": (
        "s v+obj make+now",
        "s v+obj sell+now",
        "s+of product main v be+now",
        "people v+obj s+from buy+now",
    ),
    "founder": (
        "s v+by found+past",
        "v s+obj start+past",
        "s+of founder v be+now",
        "v self s+obj raise+past",
    ),
}
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"


def translated(gloss: str, subject: str, value: str) -> str:
    """The sentence of a gloss. A subject or value in small letters is translated too, its words in turned
    order; a name stays.
    """
    said = []
    for part in gloss.split():
        word, _, case = part.partition("+")
        text = {"s": subject, "v": value}.get(word, word)
        words = [stem(w) for w in reversed(text.split())] if text.islower() else [text]
        said += [_ended(w, ENDINGS[case]) if case else w for w in words]
    sentence = " ".join(said)
    return sentence[0].upper() + sentence[1:] + "."


@cache
def stem(word: str) -> str:
    """Two or three syllables drawn from the letters of the English word."""
    rng = np.random.default_rng([*word.encode()])
    syllables = [
        "".join(letters[int(rng.integers(len(letters)))] for letters in (_CONSONANTS, _VOWELS))
        for _ in range(2)
    ]
    return "".join(syllables) + ["", _CONSONANTS[int(rng.integers(len(_CONSONANTS)))]][int(rng.integers(2))]


def _ended(word: str, ending: str) -> str:
    return word + (ending[1:] if word[-1] in _VOWELS else ending)
