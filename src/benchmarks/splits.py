"""The records of a split: its triplets, its gallery, and what its files contain."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Container, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.files import write_text
from runtime.image_source import IMAGES
from runtime.spelling import hint_of_file, missing_folder
from utils import UserError

NO_ROW = -1  # in place of a gallery row


@dataclass(frozen=True, kw_only=True)
class Triplet:
    """One composed query, whichever benchmark it came from.

    Attributes:
        target: the one that the query was written for; None where the answer is secret.
        other_targets: further images that answer it, where a benchmark knows some.
        group: CIRR's subset of similar images, the reference among them.
        negatives: images that a training tells the target from, where its file or the group names some.
        pair_id: what its file calls the query: a number as CIRR's, or a text.
        kinds: what is asked for, where a benchmark also measures kinds of queries apart.
        columns: what its file says of it besides, by column, as own triplets may.
        extended: what else annotators said of it, which results show and no query asks.
        place: the number of its entry in the file.
    """

    reference: str
    captions: tuple[str, ...]
    target: str | None = None
    other_targets: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    pair_id: int | str | None = None
    kinds: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict, compare=False)
    extended: tuple[str, ...] = field(default=(), compare=False)
    place: int = field(default=0, compare=False)

    @property
    def known_target(self) -> str:
        """The target. Raises ValueError where it is secret."""
        if self.target is None:
            raise ValueError("the target of a test query is secret")
        return self.target

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets, the named one first; none where they are secret."""
        return () if self.target is None else (self.target, *self.other_targets)

    @property
    def images(self) -> list[str]:
        """The reference, and the targets if they are known."""
        return [self.reference, *self.targets]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Queries and the gallery they search: gallery row i is names[i].

    Attributes:
        excluded_images: what was left out of the gallery on request, in its order.
        excluded_triplets: how many triplets went with them.
        smaller_groups: how many of the remaining triplets have a smaller group for it.
        asked_elsewhere: references and targets of triplets that were left out, while their images were not.
        only_asked: references that are in no gallery: they come last in it, and nothing retrieves them.
    """

    name: str
    triplets: list[Triplet]
    image_paths: dict[str, Path]
    excluded_images: tuple[str, ...] = ()
    excluded_triplets: int = 0
    smaller_groups: int = 0
    asked_elsewhere: frozenset[str] = frozenset()
    only_asked: frozenset[str] = frozenset()

    @property
    def query_names(self) -> list[str]:
        """Name each query: by its pairid, or by its split and its place in the annotation file."""
        names = []
        for triplet in self.triplets:
            place = f"{self.name}:{triplet.place}"
            names.append(place if triplet.pair_id is None else str(triplet.pair_id))
        return names

    @property
    def names(self) -> list[str]:
        """Image names in gallery order."""
        return list(self.image_paths)

    @property
    def paths(self) -> list[Path]:
        """Image files in gallery order."""
        return list(self.image_paths.values())

    @property
    def gallery_size(self) -> int:
        """Images that queries search."""
        return len(self.image_paths) - len(self.only_asked)

    @property
    def is_secret(self) -> bool:
        """Return whether the answers are on a test server only."""
        return any(triplet.target is None for triplet in self.triplets)

    @property
    def has_groups(self) -> bool:
        """Return whether each query has a subset of the gallery to search too."""
        return bool(self.triplets[0].group)

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """Gallery row of each image name."""
        return {name: row for row, name in enumerate(self.image_paths)}

    @property
    def reference_rows(self) -> list[int]:
        """Gallery row of each query's reference, Q of them."""
        return [self.row_of[triplet.reference] for triplet in self.triplets]

    @property
    def target_rows(self) -> list[int]:
        """Gallery row of each query's named target, Q of them."""
        return [self.row_of[triplet.known_target] for triplet in self.triplets]

    @functools.cached_property
    def most_other_targets(self) -> int:
        """The largest number of targets besides the annotated one that a query has."""
        return max(len(triplet.other_targets) for triplet in self.triplets)

    @property
    def other_target_rows(self) -> list[list[int]]:
        """Gallery rows of each query's other targets, Q lists; NO_ROW fills up those of queries that have fewer."""
        rows = []
        for triplet in self.triplets:
            own = [self.row_of[name] for name in triplet.other_targets]
            rows.append(own + [NO_ROW] * (self.most_other_targets - len(own)))
        return rows

    @property
    def queries_of_kinds(self) -> dict[str, list[int]]:
        """Kind of query -> the numbers of those that are of it, in order."""
        queries: dict[str, list[int]] = {}
        for number, triplet in enumerate(self.triplets):
            for kind in triplet.kinds:
                queries.setdefault(kind, []).append(number)
        return queries

    @property
    def clusters(self) -> dict[str, list[int]]:
        """Number the values of each column that all queries have: column -> (Q,), equal where queries share a value.

        Queries that share their reference, target or another column are not independent of each other.
        """
        rows = []
        for triplet in self.triplets:
            named = {
                "reference": triplet.reference,
                "target": triplet.target,
                "kind": triplet.kinds,
                **triplet.columns,
            }
            rows.append({column: value for column, value in named.items() if value})
        clusters = {}
        for column in rows[0]:
            numbers: dict[Hashable, int] = {}
            if all(column in row for row in rows):
                clusters[column] = [numbers.setdefault(row[column], len(numbers)) for row in rows]
        return clusters

    @property
    def group_rows(self) -> list[list[int]]:
        """Gallery rows of each query's group without the reference, in gallery order, Q lists of G - 1.

        A group that lost members to exclusions is filled up with the row of the reference, which is no candidate.
        """
        groups = []
        for triplet in self.triplets:
            candidates = (name for name in triplet.group if name != triplet.reference)
            groups.append(sorted(self.row_of[name] for name in candidates))
        longest = max(map(len, groups))
        for group, reference in zip(groups, self.reference_rows, strict=True):
            group += [reference] * (longest - len(group))
        return groups

    @property
    def members(self) -> set[str]:
        """The references and targets of the triplets, those that were left out among them (see `only`)."""
        members = set(self.asked_elsewhere)
        for triplet in self.triplets:
            members.update(triplet.images)
        return members

    @property
    def outside(self) -> list[bool]:
        """Return whether each image of the gallery is neither reference nor target of any triplet, N of them."""
        members = self.members
        return [name not in members or name in self.only_asked for name in self.image_paths]

    @property
    def unlisted(self) -> list[bool]:
        """Return whether each image is one of `only_asked`, N of them."""
        return [name in self.only_asked for name in self.image_paths]

    def only(self, queries: Container[str]) -> "Split":
        """The split with some queries alone, by their names. All galleries stay as they are."""
        named = zip(self.query_names, self.triplets, strict=True)
        kept = [triplet for name, triplet in named if name in queries]
        return replace(self, triplets=kept, asked_elsewhere=frozenset(self.members))

    def without(self, excluded: Container[str]) -> "Split":
        """The split without some images, without the triplets that ask with or for them, and with smaller groups."""
        kept = []
        smaller_groups = 0
        for triplet in self.triplets:
            if any(name in excluded for name in triplet.images):
                continue
            group = tuple(name for name in triplet.group if name not in excluded)
            smaller_groups += len(group) < len(triplet.group)
            negatives = tuple(name for name in triplet.negatives if name not in excluded)
            kept.append(replace(triplet, group=group, negatives=negatives))
        return Split(
            name=self.name,
            triplets=kept,
            image_paths={
                name: path for name, path in self.image_paths.items() if name not in excluded
            },
            excluded_images=tuple(name for name in self.image_paths if name in excluded),
            excluded_triplets=len(self.triplets) - len(kept),
            smaller_groups=smaller_groups,
            only_asked=frozenset(name for name in self.only_asked if name not in excluded),
        )


def split_digest(split: Split) -> str:
    """SHA-256 of a split's queries, their answers and the names of its gallery, in order."""
    queries = []
    for t in split.triplets:
        answer = t.targets if t.other_targets else t.target
        query = [t.reference, t.captions, answer, t.group]
        # Without negatives the digest is that of before there were any.
        queries.append([*query, t.negatives] if t.negatives else query)
    return hashlib.sha256(json.dumps([split.names, queries]).encode()).hexdigest()


def images_digest(split: Split, *, sampled: bool = False, kept: Path | None = None) -> str:
    """SHA-256 of a gallery: of the names and contents of its files, in order. Other copies of a dataset have others.

    Args:
        sampled: a sample of each file stands for its content, see `runtime.files.sample_digest`.
        kept: folder that remembers the digest, until paths, sizes, times or samples of the files are others; None to
            read them all.
    """
    if kept is None:
        return _read_digest(split, sampled=sampled)
    identities = json.dumps([split.names, IMAGES.identities(split.paths)])
    key = hashlib.sha256(identities.encode()).hexdigest()
    file = kept / f"images-{key[:16]}.sha256"
    with contextlib.suppress(OSError, ValueError):
        told, digest = file.read_text().split()
        if told == key:
            return digest
    digest = _read_digest(split, sampled=sampled)
    write_text(file, f"{key} {digest}\n")
    return digest


def _read_digest(split: Split, *, sampled: bool) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        contents = pool.map(functools.partial(IMAGES.digest, sampled=sampled), split.paths)
        for name, content in zip(split.names, contents, strict=True):
            digest.update(name.encode() + b"\0" + bytes.fromhex(content))
    return digest.hexdigest()


def all_paths(splits: Iterable[Split]) -> list[Path]:
    """The image files of some splits, each once."""
    paths: dict[Path, None] = {}
    for split in splits:
        paths.update(dict.fromkeys(split.paths))
    return list(paths)


def check_images_exist(splits: Iterable[Split]) -> None:
    """Raise UserError unless every image file of the splits is there and not empty."""
    paths = all_paths(splits)
    bad = [path for path in paths if not IMAGES.size(path)]
    if not bad:
        return
    first = bad[0]
    hint = "" if first.exists() else hint_of_file(first)
    if not hint and (folder := missing_folder(first)):
        hint = f": there is no {folder}"
    raise UserError(
        f"{len(bad)} of {len(paths)} image files are missing or empty, the first is {first}{hint}: add them, because "
        "without them every recall would be wrong; or exclude them, see src/check_dataset.py"
    )
