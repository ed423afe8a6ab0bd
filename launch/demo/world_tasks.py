"""Four tasks about the toy corpus, with training and dev examples: translation, NER, summarization, question
answering.

A seed comes in; files in the field's formats come out (parallel lines, CoNLL, JSONL, SQuAD JSON; 1 s). No
text here states the facts of the pretraining corpus: each is drawn independently, with known names and other
facts, so that an answer must be read, not remembered. Half of the names occur in the tagged training
documents and the other half in dev, so that no name there has a usual tag. The other trivial baselines gain
little too: no translation is a copy, the facts of a summary stand anywhere among others, and an answer is a
short part of its sentence.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from trifold.launch.demo.world import SENTENCES, Entity, Fact, World, make_world, name, pronoun, sentence

T = TypeVar("T")
TRAIN = {"translation": 6000, "tags": 200, "summaries": 3000, "questions": 3000}
DEV = {"translation": 150, "tags": 100, "summaries": 100, "questions": 150}
TELLINGS = 20  # for training; as many others for dev

QUESTIONS = {
    "born_in": "Where was {s} born?",
    "born_year": "In which year was {s} born?",
    "lives_in": "Where does {s} live?",
    "trade": "What is the trade of {s}?",
    "employer": "Who employs {s}?",
    "likes": "What does {s} like to do?",
    "friend": "Who is a friend of {s}?",
    "river": "Which river flows through {s}?",
    "region": "In which region is {s}?",
    "founded": "When was {s} founded?",
    "known_for": "What is {s} known for?",
    "seat": "Where is the seat of {s}?",
    "makes": "What does {s} make?",
    "founder": "Who founded {s}?",
}
_TAGS = {"person": "PER", "place": "LOC", "firm": "ORG"}
_WORD = re.compile(r"\w+|[^\w\s]")


def write_tasks(folder: Path, seed: int = 0) -> None:
    """folder/translation/{train,dev}.{english,second}, tags/*.conll, summaries/*.jsonl and
    questions/*.json.
    """
    train, dev = (
        [make_world(seed, telling=telling) for telling in range(first, first + TELLINGS)]
        for first in (1, 1 + TELLINGS)
    )
    names = list(train[0])
    half = set(_some(np.random.default_rng((seed, 5)), names, len(names) // 2))
    unseen: set[Fact] = set()  # no fact of dev's sentences is in a training sentence, however it is said
    for part, number, worlds, named in (("dev", DEV, dev, set(names) - half), ("train", TRAIN, train, half)):
        rng = np.random.default_rng((seed, 4, len(part)))
        facts = [drawn(rng, worlds) for _ in range(number["translation"])]
        pairs = [translation(rng, fact) for fact in facts if fact not in unseen]
        unseen |= set(facts)
        for language, lines in zip(("english", "second"), zip(*pairs, strict=True), strict=True):
            _write(folder / "translation" / f"{part}.{language}", lines)
        among = [_only(world, named) for world in worlds]
        _write(
            folder / "tags" / f"{part}.conll", (_conll(document(rng, among)) for _ in range(number["tags"]))
        )
        summaries = (summary(rng, worlds) for _ in range(number["summaries"]))
        _write(
            folder / "summaries" / f"{part}.jsonl",
            (json.dumps({"document": d, "summary": s}) for d, s in summaries),
        )
        paragraphs = [question(rng, worlds, str(i)) for i in range(number["questions"])]
        _write(
            folder / "questions" / f"{part}.json",
            [json.dumps({"data": [{"title": "the small world", "paragraphs": paragraphs}]})],
        )


def drawn(rng: np.random.Generator, worlds: list[World]) -> Fact:
    world = _one(rng, worlds)
    return _one(rng, world[_one(rng, list(world))])


def translation(rng: np.random.Generator, fact: Fact) -> tuple[str, str]:
    """A fact's sentence in English and in the second language."""
    which = int(rng.integers(len(SENTENCES[fact.relation])))
    return sentence(fact, which), sentence(fact, which, english=False)


def document(
    rng: np.random.Generator, worlds: list[World], subjects: int = 2, each: int = 2
) -> list[tuple[Fact, str]]:
    """Facts of some subjects, one after the other, each with its sentence; one just spoken of is half the
    time a pronoun.
    """
    world = _one(rng, worlds)
    told = []
    for entity in _some(rng, list(world), subjects):
        for i, fact in enumerate(_some(rng, world[entity], each)):
            which = int(rng.integers(len(SENTENCES[fact.relation])))
            again = i > 0 and SENTENCES[fact.relation][which].startswith("{s}") and rng.random() < 0.5
            told.append((fact, sentence(fact, which, subject=pronoun(entity) if again else None)))
    return told


def summary(rng: np.random.Generator, worlds: list[World]) -> tuple[str, str]:
    """Facts about three people in any order, and who, what, where and for whom of the one of whom most is
    told.
    """
    world = _one(rng, worlds)
    people = _some(rng, [entity for entity in world if entity.kind == "person"], 3)
    known = {fact.relation: fact for fact in world[people[0]]}
    told = [known[relation] for relation in ("trade", "lives_in", "employer")] + [
        _one(rng, [known["likes"], known["born_in"]])
    ]
    told += [fact for other in people[1:] for fact in _some(rng, world[other], 2)]
    text = " ".join(
        sentence(fact, int(rng.integers(len(SENTENCES[fact.relation]))))
        for fact in _some(rng, told, len(told))
    )
    trade, home, employer = (name(known[relation].value) for relation in ("trade", "lives_in", "employer"))
    return text, f"{people[0].name}, {trade}, lives in {home} and works for {employer}."


def question(rng: np.random.Generator, worlds: list[World], key: str) -> dict[str, object]:
    """A SQuAD paragraph: a document and a question about one of its facts."""
    told = document(rng, worlds)
    asked = int(rng.integers(len(told)))
    fact, text = told[asked]
    value = name(fact.value)
    start = sum(len(before) + 1 for _, before in told[:asked]) + len(re.split(_either([value]), text)[0])
    answer = {"text": value, "answer_start": start}
    qa = {"id": key, "question": QUESTIONS[fact.relation].format(s=fact.subject.name), "answers": [answer]}
    return {"context": " ".join(text for _, text in told), "qas": [qa]}


def _conll(told: list[tuple[Fact, str]]) -> str:
    """A word and its tag on each line, and an empty line at the end."""
    return "".join(f"{word} {tag}\n" for fact, text in told for word, tag in tagged(fact, text))


def tagged(fact: Fact, text: str) -> Iterator[tuple[str, str]]:
    """The words of a fact's sentence and their tags in IOB2; rivers and regions are places."""
    value = (
        _TAGS[fact.value.kind]
        if isinstance(fact.value, Entity)
        else "LOC"
        if fact.relation in ("river", "region")
        else ""
    )
    kinds = {fact.subject.name: _TAGS[fact.subject.kind]} | ({name(fact.value): value} if value else {})
    for part in re.split(_either(kinds), text):
        for i, word in enumerate(_WORD.findall(part)):
            yield word, f"{'I' if i else 'B'}-{kinds[part]}" if part in kinds else "O"


def _only(world: World, names: Collection[Entity]) -> World:
    """What of a world is about these and no others."""
    return {
        entity: [fact for fact in world[entity] if not isinstance(fact.value, Entity) or fact.value in names]
        for entity in world
        if entity in names
    }


def _either(names: Iterable[str]) -> str:
    """A pattern for any of these names as whole words."""
    return rf"\b({'|'.join(map(re.escape, names))})\b"


def _one(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _some(rng: np.random.Generator, items: Sequence[T], number: int) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))[:number]]


def _write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
