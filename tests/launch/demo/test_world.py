"""The small world agrees with itself, is the same for the same seed, and holds out sentences, never facts."""

import re

from trifold.launch.demo.world import SENTENCES, Entity, documents, make_world, write_world
from trifold.launch.demo.world_language import stem


def told(texts: list[str]) -> set[str]:
    return {sentence + "." for text in texts for sentence in re.split(r"\. ?", text) if sentence}


def test_the_same_seed_makes_the_same_world_and_another_seed_another(tmp_path):
    for folder in ("a", "b"):
        write_world(tmp_path / folder, seed=3, train=50, heldout=10)
    assert (tmp_path / "a" / "train.txt").read_bytes() == (tmp_path / "b" / "train.txt").read_bytes()
    write_world(tmp_path / "c", seed=4, train=50, heldout=10)
    assert (tmp_path / "a" / "train.txt").read_bytes() != (tmp_path / "c" / "train.txt").read_bytes()


def test_writing_again_leaves_the_files_untouched(tmp_path):
    write_world(tmp_path, train=50, heldout=10)
    before = (tmp_path / "train.txt").stat().st_mtime_ns
    write_world(tmp_path, train=50, heldout=10)
    assert (tmp_path / "train.txt").stat().st_mtime_ns == before


def test_facts_agree():
    world = make_world(0)
    assert len({entity.name for entity in world}) == len(world)
    for entity, facts in world.items():
        for fact in facts:
            assert fact.subject == entity
            assert not isinstance(fact.value, Entity) or fact.value in world
            if fact.relation == "friend" and isinstance(fact.value, Entity):
                assert any(back.relation == "friend" and back.value == entity for back in world[fact.value])


def test_held_out_sentences_are_new_and_their_facts_are_known():
    world = make_world(0)
    train, heldout = (
        list(documents(world, 0, 6000, heldout=False)),
        list(documents(world, 0, 300, heldout=True)),
    )
    pronouns = ("It ", "She ", "He ", stem("he").capitalize() + " ")
    named = {sentence for sentence in told(heldout) if not sentence.startswith(pronouns)}
    assert named and not named & told(train)
    text = " ".join(train)
    facts = [fact for facts in world.values() for fact in facts]
    names = [
        (fact.relation, fact.subject.name, fact.value.name if isinstance(fact.value, Entity) else fact.value)
        for fact in facts
    ]
    known = sum(
        any(s.format(s=subject, v=value) in text for s in SENTENCES[relation])
        for relation, subject, value in names
    )
    assert known > 0.95 * len(names)
