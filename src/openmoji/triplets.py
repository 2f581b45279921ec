"""Triplets of pictures that differ in one fact or two, with the concepts divided among the splits."""

import itertools
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from openmoji.catalogue import CONCEPT_IS_A_FACT
from openmoji.pictures import Picture
from openmoji.wordings import KINDS, MORE_AND_LESS, ORDERS, TWO_CHANGES, wordings

SPLITS = ("train", "val", "test")
# Of so many concepts, one is in val and one in test: of a family with many, and of one with few.
BLOCK, SMALL_BLOCK = 7, 4
MANY = 12
# Of families whose concepts are asked for, a concept of val or test has one of these skins there, the others in train.
PARTED = ("people", "hand", "pair")
SKINS = ({"light", "medium", "dark"}, {"medium-light", "medium-dark"})
CAPTIONS = 2  # of a query
VIETNAMESE_SHARE = 0.12  # of the captions, where a change can be said so
RELATIVE = 0.25  # of the queries, where "more" or "less" can be said
WORDINGS_OF_A_PAIR = 5  # at most so many queries of one reference and one change
GROUP_SIZE = 6


@dataclass(frozen=True)
class Query:
    """A reference, what should be different, and the pictures that are right."""

    reference: Picture
    targets: tuple[Picture, ...]
    captions: tuple[str, ...]
    kind: str


class Change(NamedTuple):
    """A reference and a target that differ in some facts alone.

    Attributes:
        same: all pictures that are like the reference but for these facts, itself among them.
    """

    reference: Picture
    target: Picture
    facts: tuple[str, ...]
    same: tuple[Picture, ...]

    @property
    def kind(self) -> str:
        """Return the kind that a triplet is counted as."""
        return KINDS[self.facts[0]] if len(self.facts) == 1 else TWO_CHANGES


def divide(pictures: Iterable[Picture], seed: int) -> dict[str, list[Picture]]:
    """Split -> its pictures. Unnamed ones are in none.

    Of each family, val and test have concepts of every size. Those of PARTED give them a part of their skins alone:
    train has the others, and knows what val asks for.
    """
    of_family: dict[str, dict[str, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        if picture.family:
            of_family[picture.family][picture.concept].append(picture)
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for family, concepts in of_family.items():
        names = sorted(concepts)
        random.Random(f"{seed} {family}").shuffle(names)
        names.sort(key=lambda name: -len(concepts[name]))  # those of one size stay shuffled
        is_large = len(names) > MANY and family not in PARTED
        block = BLOCK if is_large else SMALL_BLOCK
        for place, name in enumerate(names):
            split = {1: "val", 2: "test"}.get(place % block, "train")
            part = SKINS[place // block % 2] if family in PARTED else None
            for picture in concepts[name]:
                is_there = part is None or part.issuperset(picture.skins)
                splits[split if is_there else "train"].append(picture)
    return splits


def changes(pictures: Sequence[Picture]) -> Iterator[Change]:
    """All pairs of a split's pictures that differ in one fact or in two, by family."""
    of_family: dict[tuple[str, tuple[str, ...]], list[Picture]] = defaultdict(list)
    for picture in pictures:
        of_family[picture.family, tuple(picture.shown)].append(picture)
    for (_, facts), members in of_family.items():
        for changed in [*itertools.combinations(facts, 1), *itertools.combinations(facts, 2)]:
            yield from _changes_in(members, changed)


def _changes_in(members: Sequence[Picture], changed: tuple[str, ...]) -> Iterator[Change]:
    alike: dict[tuple[str, ...], list[Picture]] = defaultdict(list)
    for picture in members:
        kept = [value for fact, value in picture.facts if fact not in changed]
        if picture.family not in CONCEPT_IS_A_FACT:
            kept.append(picture.concept)
        alike[tuple(kept)].append(picture)
    for same in alike.values():
        for reference, target in itertools.permutations(same, 2):
            if all(reference.shown[fact] != target.shown[fact] for fact in changed):
                yield Change(reference, target, changed, tuple(same))


def sample(pictures: Sequence[Picture], most: int, rng: random.Random) -> list[Query]:
    """Queries of a split, of each kind at most so many.

    A pair comes again, in other words, only where a kind has too few pairs.
    """
    of_kind: dict[str, list[Change]] = defaultdict(list)
    for change in changes(pictures):
        of_kind[change.kind].append(change)
    queries = []
    for possible in of_kind.values():
        rng.shuffle(possible)
        wanted = min(most, WORDINGS_OF_A_PAIR * len(possible))
        asked: set[Hashable] = set()
        for change in itertools.islice(itertools.cycle(possible), wanted):
            query = ask(change, rng)
            asks = (query.reference.name, query.targets[0].name)
            keys = {(*asks, query.captions[0]), (*asks, frozenset(query.captions))}
            if not keys & asked:
                asked |= keys
                queries.append(query)
    rng.shuffle(queries)
    return queries


def ask(change: Change, rng: random.Random) -> Query:
    """A query for a change, in words drawn at random; relative to the reference where that can be said."""
    reference = change.reference
    if len(change.facts) == 1:
        (fact,) = change.facts
        old, new = reference.shown[fact], change.target.shown[fact]
        order = ORDERS.get(fact, ())
        has_all = set(order) <= {picture.shown[fact] for picture in change.same}
        if {old, new} <= set(order) and has_all and rng.random() < RELATIVE:
            return _more_or_less(change, fact, order=order, rng=rng)
        captions = _captions(fact, old, new, rng=rng)
        return Query(reference, (change.target,), captions, change.kind)
    first, second = rng.sample(change.facts, 2)
    parts = []
    for fact in (first, second):
        parts.append(_captions(fact, reference.shown[fact], change.target.shown[fact], rng=rng))
    joined = []
    for one, other in zip(*parts, strict=True):
        joined.append(rng.choice(("{} and {}", "{}, {}", "{}, and {}")).format(one, other))
    return Query(reference, (change.target,), tuple(joined), change.kind)


def _more_or_less(change: Change, fact: str, *, order: Sequence[str], rng: random.Random) -> Query:
    """A query that each picture with more, or with less, answers; the least different one is the first."""
    place = order.index(change.reference.shown[fact])
    is_more = order.index(change.target.shown[fact]) > place
    answers = []
    for picture in change.same:
        value = picture.shown[fact]
        if value in order and value != order[place]:
            step = order.index(value) - place
            if (step > 0) == is_more:
                answers.append((abs(step), picture.name, picture))
    targets = [picture for _, _, picture in sorted(answers, key=lambda answer: answer[:2])]
    said = rng.sample(MORE_AND_LESS[fact][0 if is_more else 1], CAPTIONS)
    return Query(change.reference, tuple(targets), tuple(said), change.kind)


def _captions(fact: str, old: str, new: str, *, rng: random.Random) -> tuple[str, ...]:
    english, vietnamese = wordings(fact, old, new)
    captions = rng.sample(english, CAPTIONS)
    if vietnamese and rng.random() < CAPTIONS * VIETNAMESE_SHARE:
        captions[rng.randrange(CAPTIONS)] = rng.choice(vietnamese)
    return tuple(captions)


def groups(
    queries: Sequence[Query], pictures: Sequence[Picture], rng: random.Random
) -> list[tuple[Picture, ...]]:
    """For each query six pictures of its split that look alike: reference, target, and what shares most with them.

    No other target is among them.
    """
    by_concept = defaultdict(list)
    by_family = defaultdict(list)
    for picture in pictures:
        by_concept[picture.family, picture.concept].append(picture)
        by_family[picture.family].append(picture)
    found = []
    for query in queries:
        target = query.targets[0]
        family = by_family[target.family]
        others = by_concept[target.family, target.concept] + rng.sample(
            family, min(20, len(family))
        )
        strangers = rng.sample(pictures, GROUP_SIZE)
        facts = set(target.facts)
        others.sort(key=lambda other: -len(facts & set(other.facts)))
        look_alikes = [
            other
            for other in dict.fromkeys(others + strangers)
            if other != query.reference and other not in query.targets
        ]
        members = [query.reference, target, *look_alikes[: GROUP_SIZE - 2]]
        found.append(tuple(rng.sample(members, len(members))))
    return found


def check_apart(queries: Mapping[str, Sequence[Query]]) -> None:
    """Raise ValueError where an image of a triplet is in two splits."""
    images = {}
    for split, asked in queries.items():
        images[split] = {query.reference for query in asked}
        for query in asked:
            images[split].update(query.targets)
    for one, other in itertools.combinations(images, 2):
        both = images[one] & images[other]
        if both:
            raise ValueError(f"{min(picture.name for picture in both)} is in {one} and {other}")
