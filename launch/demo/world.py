"""A toy corpus generated from a seed: people, places and firms with consistent facts, stated in varied
sentences.

A seed comes in; documents of several sentences each come out (3 MB in about 1 s), so that the demo and tests
need no data. A fact recurs in many documents, so a tiny model can learn it. The held-out documents state the
same facts, each only in sentences that the training documents never use for that fact (though for others): a
model that predicts them well has learned the facts and not only the lines. One document in five is in the
corpus's second language (launch/demo/world_language.py).

Facts are data (relation, subject, value), separate from the sentences that state them:
launch/demo/world_tasks.py makes translations, entity tags, summaries and questions of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from trifold.launch.demo.world_language import GLOSSES, translated

Kind = Literal["person", "place", "firm"]


@dataclass(frozen=True)
class Entity:
    kind: Kind
    name: str


class Fact(NamedTuple):
    """`relation` of `subject` is `value`; a value is an entity, or plain text (a year, a trade)."""

    relation: str
    subject: Entity
    value: Entity | str


# relation: sentences that tell it; {s} is the subject (or a pronoun), {v} the value. At least three each: one
# is held out per fact.
SENTENCES: dict[str, tuple[str, ...]] = {
    "born_in": (
        "{s} was born in {v}.",
        "{s} came into the world in {v}.",
        "{v} is where {s} was born.",
        "{s} is a native of {v}.",
    ),
    "born_year": (
        "{s} was born in {v}.",
        "The year of birth of {s} is {v}.",
        "{s} first saw the light in {v}.",
    ),
    "lives_in": (
        "{s} lives in {v}.",
        "{s} has a house in {v}.",
        "{v} is the home of {s}.",
        "Today {s} lives in {v}.",
    ),
    "trade": (
        "{s} works as a {v}.",
        "{s} is a {v}.",
        "By trade {s} is a {v}.",
        "{s} earns a living as a {v}.",
    ),
    "employer": (
        "{s} works for {v}.",
        "{v} employs {s}.",
        "{s} is employed by {v}.",
        "The employer of {s} is {v}.",
    ),
    "likes": (
        "{s} likes {v}.",
        "On Sundays {s} is fond of {v}.",
        "What {s} enjoys most is {v}.",
        "{s} spends every free hour on {v}.",
    ),
    "friend": (
        "{s} is a friend of {v}.",
        "{v} and {s} are old friends.",
        "The best friend of {s} is {v}.",
        "{s} often visits {v}.",
    ),
    "river": (
        "{s} lies on the {v}.",
        "The river {v} flows through {s}.",
        "{s} was built on the banks of the {v}.",
    ),
    "region": (
        "{s} is a town in {v}.",
        "{s} belongs to {v}.",
        "The town of {s} is found in {v}.",
        "{v} is the region around {s}.",
    ),
    "founded": (
        "{s} was founded in {v}.",
        "The history of {s} begins in {v}.",
        "Since {v} there has been {s}.",
    ),
    "known_for": (
        "{s} is known for its {v}.",
        "Visitors come to {s} for its {v}.",
        "The pride of {s} is its {v}.",
    ),
    "seat": (
        "{s} has its seat in {v}.",
        "{s} is a firm in {v}.",
        "The offices of {s} are in {v}.",
        "{v} is the seat of {s}.",
    ),
    "makes": (
        "{s} makes {v}.",
        "{s} sells {v}.",
        "The main product of {s} is {v}.",
        "People buy {v} from {s}.",
    ),
    "founder": (
        "{s} was founded by {v}.",
        "{v} started {s}.",
        "The founder of {s} is {v}.",
        "It was {v} who set up {s}.",
    ),
}
TRADES = (
    "baker carpenter doctor teacher painter sailor farmer lawyer"
    " weaver miller printer gardener nurse tailor smith clerk"
).split()
PASTIMES = (
    "chess sailing gardening singing cooking fishing painting dancing reading hiking archery pottery".split()
)
SIGHTS = (
    "old bridge,market,cathedral,gardens,harbour,clock tower,library"
    ",vineyards,windmills,hot springs,castle,museum"
).split(",")
PRODUCTS = (
    "clocks,ropes,glass,paper,bicycles,boots,lamps,pianos,maps,soap,cheese,engines,carpets,tea,toys,barrels"
).split(",")
STARTS = (
    "Al Ber Cor Dan El Fen Gar Hol Is Jor Kel Lun Mar Nor Or Pel Quin Ros Sel Tor Ul Ver Wen Yar Zim".split()
)
MIDDLES = "a e i o u ami eno ila ora uve ar en il om".split()
GIVEN_ENDS, FAMILY_ENDS, TOWN_ENDS = (
    "na ra lo s n mir l do".split(),
    "sen berg ton man ley wick er dal".split(),
    "ham burg ford stad mouth field port".split(),
)


World = dict[Entity, list[Fact]]


def make_world(seed: int, people: int = 150, places: int = 40, firms: int = 40, telling: int = 0) -> World:
    """Every entity with what is true of it. No two share a name; employers, homes and birthplaces exist;
    friends have each other.

    Another `telling` has the same names and other facts: what one telling taught does not answer a question
    about another.
    """
    rng = np.random.default_rng((seed, 0))
    taken: set[str] = set()

    def pick(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def fresh(*ends: list[str]) -> str:
        while (name := " ".join(pick(STARTS) + pick(MIDDLES) + pick(end) for end in ends)) in taken:
            pass
        taken.add(name)
        return name

    towns = [Entity("place", fresh(TOWN_ENDS)) for _ in range(places)]
    folk = [Entity("person", fresh(GIVEN_ENDS, FAMILY_ENDS)) for _ in range(people)]
    houses = [
        Entity("firm", f"{fresh(FAMILY_ENDS)} {pick(['Works', 'Brothers', 'Company', 'and Sons'])}")
        for _ in range(firms)
    ]
    rivers, regions = ([fresh(["e", "a", "is"]) for _ in range(count)] for count in (12, 8))

    rng = np.random.default_rng((seed, 3, telling))  # from here on: the names are the same in every telling

    def year(first: int, last: int) -> str:
        return str(rng.integers(first, last))

    def some(entities: list[Entity]) -> Entity:
        return entities[int(rng.integers(len(entities)))]

    order = rng.permutation(people).tolist()
    friends = {
        one: other for a, b in zip(order[::2], order[1::2], strict=False) for one, other in ((a, b), (b, a))
    }
    world: World = {}
    for town in towns:
        told: dict[str, Entity | str] = {
            "river": pick(rivers),
            "region": pick(regions),
            "founded": year(1100, 1700),
            "known_for": pick(SIGHTS),
        }
        world[town] = [Fact(relation, town, value) for relation, value in told.items()]
    for house in houses:
        told = {
            "seat": some(towns),
            "makes": pick(PRODUCTS),
            "founder": some(folk),
            "founded": year(1800, 1990),
        }
        world[house] = [Fact(relation, house, value) for relation, value in told.items()]
    for i, person in enumerate(folk):
        told = {
            "born_in": some(towns),
            "born_year": year(1900, 2000),
            "lives_in": some(towns),
            "trade": pick(TRADES),
        }
        told |= {
            "employer": some(houses),
            "likes": pick(PASTIMES),
            "friend": folk[friends[i]] if i in friends else some(folk),
        }
        world[person] = [Fact(relation, person, value) for relation, value in told.items()]
    return world


def documents(world: World, seed: int, count: int, heldout: bool) -> Iterator[str]:
    """Documents about one entity each: some of its facts, and at times what is true of another one that was
    just mentioned.
    """
    rng = np.random.default_rng((seed, 1 + heldout))
    entities = list(world)
    reserved = {fact: _reserved(fact, seed) for facts in world.values() for fact in facts}
    for _ in range(count):
        entity = entities[int(rng.integers(len(entities)))]
        facts = [world[entity][i] for i in rng.permutation(len(world[entity]))[: rng.integers(3, 6)]]
        others = [fact.value for fact in facts if isinstance(fact.value, Entity)]
        if others and rng.random() < 0.6:
            more = world[others[-1]]
            facts += [more[i] for i in rng.permutation(len(more))[:2]]
        if not heldout:  # said again in other words, as texts do: who predicts them learns to look back
            facts += [facts[i] for i in rng.permutation(len(facts))[:2]]
        before = [None, *(fact.subject for fact in facts)]
        english = rng.random() < 0.8
        yield " ".join(
            _tell_fact(fact, fact.subject == last, heldout, reserved[fact], english, rng)
            for fact, last in zip(facts, before, strict=False)
        )


def write_world(folder: Path, seed: int = 0, train: int = 12_000, heldout: int = 400) -> None:
    """folder/train.txt and folder/heldout.txt, documents apart by blank lines. Files that say the same
    already are left as they are.
    """
    world = make_world(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("heldout", heldout)):
        text = "\n\n".join(documents(world, seed, count, name == "heldout")) + "\n"
        file = folder / f"{name}.txt"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def sentence(fact: Fact, number: int, english: bool = True, subject: str | None = None) -> str:
    """A fact in the sentence of that number, of its subject by name or by another word, such as a pronoun."""
    s, v = subject or fact.subject.name, name(fact.value)
    return (
        SENTENCES[fact.relation][number].format(s=s, v=v)
        if english
        else translated(GLOSSES[fact.relation][number], s, v)
    )


def name(value: Entity | str) -> str:
    return value.name if isinstance(value, Entity) else value


def _reserved(fact: Fact, seed: int) -> int:
    """Which of a fact's sentences only the held-out documents use."""
    key = [*f"{fact.relation} {fact.subject.name} {name(fact.value)}".encode()]
    return int(np.random.default_rng([seed, *key]).integers(len(SENTENCES[fact.relation])))


def _tell_fact(
    fact: Fact, again: bool, heldout: bool, reserved: int, english: bool, rng: np.random.Generator
) -> str:
    """A fact as one sentence: its reserved one when held out, else any other; of a subject just spoken of,
    half the time by pronoun.
    """
    sentences = SENTENCES[fact.relation]
    number = reserved if heldout else (reserved + int(rng.integers(1, len(sentences)))) % len(sentences)
    by_pronoun = again and sentences[number].startswith("{s}") and rng.random() < 0.5
    return sentence(
        fact,
        number,
        english,
        pronoun(fact.subject) if by_pronoun and english else "he" if by_pronoun else None,
    )


def pronoun(entity: Entity) -> str:
    if entity.kind != "person":
        return "It"
    return "She" if entity.name.split()[0][-1] in "aeiou" else "He"
