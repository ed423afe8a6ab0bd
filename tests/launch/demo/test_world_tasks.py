"""The small world's tasks: one translation for each sentence; tags, spans and summaries as the facts are; dev
sets that must be read.
"""

import json
from pathlib import Path

import pytest

from trifold.finetune.examples.conll import read_conll
from trifold.finetune.examples.pairs import read_pairs
from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.examples.squad import read_questions
from trifold.launch.demo.world import SENTENCES, Fact, make_world, name, sentence
from trifold.launch.demo.world_language import GLOSSES, stem, translated
from trifold.launch.demo.world_tasks import QUESTIONS, TELLINGS, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tasks")
    write_tasks(where)
    return where


def pairs(folder: Path, part: str) -> list[tuple[str, str]]:
    files = [str(folder / "translation" / f"{part}.{language}") for language in ("english", "second")]
    return [(pair.source, pair.targets[0]) for pair in read_pairs([",".join(files)], "source", "target")]


def test_every_english_sentence_has_a_gloss_and_every_relation_a_question():
    assert {relation: len(told) for relation, told in SENTENCES.items()} == {
        relation: len(told) for relation, told in GLOSSES.items()
    }
    assert QUESTIONS.keys() == SENTENCES.keys()


def test_the_second_language_has_its_own_order_and_endings():
    live, employer, be, bridge, old, its, know = map(stem, "live employer be bridge old its know".split())
    assert (
        translated("s v+in live+now", "Fenla Marsen", "Corafa")
        == f"Fenla Marsen Corafash {ended(live, 'ez')}."
    )
    said = translated("s+of employer v be+now", "Fenla Marsen", "Holwick Works")
    assert said == f"Fenla Marsenor {employer} Holwick Works {ended(be, 'ez')}."
    said = translated("s v+for its+for know+now", "Fenla", "old bridge")
    assert (
        said == f"Fenla {ended(bridge, 'eth')} {ended(old, 'eth')} {ended(its, 'eth')} {ended(know, 'ez')}."
    )


def ended(word: str, ending: str) -> str:
    return word + (ending[1:] if word[-1] in "aeiou" else ending)


def test_different_words_have_different_stems():
    said = {
        word
        for told in GLOSSES.values()
        for gloss in told
        for part in gloss.split()
        for word in [part.split("+")[0]]
    } - {"s", "v"}
    values = {
        word
        for facts in make_world(0).values()
        for fact in facts
        for word in name(fact.value).split()
        if word.islower()
    }
    assert len({stem(word) for word in said | values}) == len(said | values) > 100


def test_a_sentence_has_one_translation(folder: Path):
    both = pairs(folder, "train") + pairs(folder, "dev")
    assert len(dict(both)) == len(set(both))


def test_dev_sentences_tell_facts_that_no_training_sentence_tells(folder: Path):
    worlds = [make_world(0, telling=telling) for telling in range(1, 2 * TELLINGS + 1)]
    facts = {
        sentence(fact, i): fact
        for world in worlds
        for told in world.values()
        for fact in told
        for i in range(len(SENTENCES[fact.relation]))
    }
    train, dev = ({facts[english] for english, _ in pairs(folder, part)} for part in ("train", "dev"))
    assert len(dev) > 100 and not train & dev


def test_another_telling_has_the_same_names_and_other_facts():
    one, other = make_world(0), make_world(0, telling=1)
    assert list(one) == list(other)

    def facts(world: dict) -> set[Fact]:
        return {fact for told in world.values() for fact in told}

    assert len(facts(one) & facts(other)) < 0.1 * len(facts(one))


def test_tags_mark_all_names_and_dev_has_names_of_its_own(folder: Path):
    kinds = {"person": "PER", "place": "LOC", "firm": "ORG"}
    names = {part: set() for part in ("train", "dev")}
    known = {entity.name: kinds[entity.kind] for entity in make_world(0)}
    for part in names:
        for told in read_conll(str(folder / "tags" / f"{part}.conll")):
            found: list[list[str]] = []
            for word, tag in zip(told.words, told.tags, strict=True):
                if tag[0] == "B":
                    found.append([tag[2:]])
                if tag != "O":
                    found[-1].append(word)
            said = {" ".join(words): kind for kind, *words in found}
            assert all(
                known.get(entity, "LOC") == kind for entity, kind in said.items()
            )  # a river or a region is no entity of the world
            assert {entity for entity in known if f" {entity} " in f" {told.text} "} <= said.keys()
            names[part] |= said.keys() & known.keys()
    assert min(map(len, names.values())) > 90 and not names["dev"] & names["train"]


def test_a_summary_tells_of_the_one_who_is_told_of_most(folder: Path):
    for line in (folder / "summaries" / "dev.jsonl").read_text().splitlines():
        record = json.loads(line)
        told = [record["document"][slice(*span)] for span in split_sentences(record["document"])]
        people = [entity.name for entity in make_world(0) if entity.kind == "person"]
        subject = record["summary"].split(",")[0]
        counts = {person: sum(person in one for one in told) for person in people}
        assert counts[subject] == max(counts.values()) and len(told) == 8
        trade, home, employer = (
            record["summary"]
            .removesuffix(".")
            .split(", ", 1)[1]
            .replace(" and works for ", ", lives in ")
            .split(", lives in ")
        )
        for value in (trade, home, employer):
            assert any(subject in one and value in one for one in told)


def test_an_answer_stands_where_it_is_said_to_and_its_sentence_is_longer(folder: Path):
    questions = list(
        read_questions(str(folder / "questions" / "dev.json"))
    )  # refuses an answer that is not at its offset
    assert len(questions) == 150
    for question in questions:
        [(start, text)] = question.answers
        [around] = [(a, b) for a, b in split_sentences(question.context) if a <= start < b]
        assert (
            start + len(text) <= around[1]
            and len(question.context[slice(*around)].split()) > len(text.split()) + 1
        )
