"""Make triplets of pictures that differ in one or two attributes, and divide the concepts among the splits."""

import itertools
import operator
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from openmoji.catalogue import CONCEPT_IS_A_FACT
from openmoji.pictures import Picture
from openmoji.wordings import KINDS, MORE_AND_LESS, ORDERS, TWO_CHANGES, wordings

SPLITS = ("train", "val", "test")
# One of so many concepts is in val and one in test: BLOCK for families with many concepts, SMALL_BLOCK for others.
BLOCK, SMALL_BLOCK = 7, 4
MANY = 12
# In these families, val and test contain only pictures whose skin tones form one of these sets; train the rest.
PARTED = ("people", "hand", "pair")
SKINS = ({"light", "medium", "dark"}, {"medium-light", "medium-dark"})
CAPTIONS = 2  # number of captions of a query
VIETNAMESE_SHARE = 0.12  # fraction of the captions, if the change can be worded in Vietnamese
RELATIVE = 0.25  # fraction of the queries with "more" or "less", if the fact has an order
WORDINGS_OF_A_PAIR = 5  # maximum number of queries with the same reference and change
GROUP_SIZE = 6


@dataclass(frozen=True)
class EmojiQuery:
    """A reference, captions of what should be different, and the correct pictures."""

    reference: Picture
    targets: tuple[Picture, ...]
    captions: tuple[str, ...]
    kind: str


class Change(NamedTuple):
    """A reference and a target that differ only in some facts.

    Attributes:
        same: all pictures that equal the reference in its other facts, including the reference.
    """

    reference: Picture
    target: Picture
    facts: tuple[str, ...]
    same: tuple[Picture, ...]

    @property
    def kind(self) -> str:
        """Return the kind of triplet that the change belongs to."""
        return KINDS[self.facts[0]] if len(self.facts) == 1 else TWO_CHANGES


def divide(pictures: Iterable[Picture], seed: int) -> dict[str, list[Picture]]:
    """Divide pictures among the splits: split -> its pictures. Pictures without a family are in no split.

    Val and test have concepts of every size from each family. From families in PARTED, they have only pictures with
    some skin tones. Train has the other pictures of these concepts, so training covers the changes that val asks for.
    """
    of_family: dict[str, dict[str, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        if picture.family:
            of_family[picture.family][picture.concept].append(picture)
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for family, concepts in of_family.items():
        names = sorted(concepts)
        random.Random(f"{seed} {family}").shuffle(names)
        names.sort(key=lambda name: -len(concepts[name]))  # equally large concepts stay shuffled
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
    """Yield all pairs of a split's pictures that differ in one or two facts, by family."""
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
    for same in map(tuple, alike.values()):
        values = [[picture.shown[fact] for fact in changed] for picture in same]
        pairs = itertools.permutations(zip(same, values, strict=True), 2)
        for (reference, old), (target, new) in pairs:
            if all(map(operator.ne, old, new)):
                yield Change(reference, target, changed, same)


def sample(pictures: Sequence[Picture], most: int, rng: random.Random) -> list[EmojiQuery]:
    """Draw queries of a split, at most `most` of each kind.

    A pair is repeated, with other captions, only if its kind has too few pairs.
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


def ask(change: Change, rng: random.Random) -> EmojiQuery:
    """Return a query for a change, with random captions; some use "more" or "less" if the fact has an order."""
    reference = change.reference
    if len(change.facts) == 1:
        (fact,) = change.facts
        old, new = reference.shown[fact], change.target.shown[fact]
        order = ORDERS.get(fact, ())
        has_all = set(order) <= {picture.shown[fact] for picture in change.same}
        if {old, new} <= set(order) and has_all and rng.random() < RELATIVE:
            return _more_or_less(change, fact, order=order, rng=rng)
        captions = _captions(fact, old, new, rng=rng)
        return EmojiQuery(reference, (change.target,), captions, change.kind)
    first, second = rng.sample(change.facts, 2)
    parts = []
    for fact in (first, second):
        parts.append(_captions(fact, reference.shown[fact], change.target.shown[fact], rng=rng))
    joined = []
    for one, other in zip(*parts, strict=True):
        joined.append(rng.choice(("{} and {}", "{}, {}", "{}, and {}")).format(one, other))
    return EmojiQuery(reference, (change.target,), tuple(joined), change.kind)


def _more_or_less(
    change: Change, fact: str, *, order: Sequence[str], rng: random.Random
) -> EmojiQuery:
    """Return a query for "more" or "less" of a fact. All pictures that fulfil it are targets, the closest one first."""
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
    return EmojiQuery(change.reference, tuple(targets), tuple(said), change.kind)


def _captions(fact: str, old: str, new: str, *, rng: random.Random) -> tuple[str, ...]:
    english, vietnamese = wordings(fact, old, new)
    captions = rng.sample(english, CAPTIONS)
    if vietnamese and rng.random() < CAPTIONS * VIETNAMESE_SHARE:
        captions[rng.randrange(CAPTIONS)] = rng.choice(vietnamese)
    return tuple(captions)


def groups(
    queries: Sequence[EmojiQuery], pictures: Sequence[Picture], rng: random.Random
) -> list[tuple[Picture, ...]]:
    """Return six similar pictures of the split for each query: reference, target, and the most similar to the target.

    A group contains no other target of its query.
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
