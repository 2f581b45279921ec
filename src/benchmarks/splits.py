"""The records of a split: its triplets, its gallery, and digests of their content."""

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

NO_ROW = -1  # stands for a missing gallery row


@dataclass(frozen=True, kw_only=True)
class Triplet:
    """One composed query of any benchmark.

    Attributes:
        target: the annotated target; None if it is not public.
        other_targets: other correct images, if the benchmark lists any.
        group: CIRR's subset of similar images, including the reference.
        negatives: hard negatives for training, if the file or the group provides any.
        pair_id: the query's id in its file: a number, as in CIRR, or a text.
        kinds: kinds of query, if the benchmark also reports metrics by kind.
        columns: column -> value, for additional columns of own triplets.
        extended: additional annotations, which are shown with results but are not part of the query.
        place: index of the query's entry in its file.
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
        """Return the annotated target. Raises ValueError if it is not public."""
        if self.target is None:
            raise ValueError("the target of a test query is secret")
        return self.target

    @property
    def targets(self) -> tuple[str, ...]:
        """Return all targets, the annotated one first; empty if they are not public."""
        return () if self.target is None else (self.target, *self.other_targets)

    @property
    def images(self) -> list[str]:
        """Return the reference, and the targets if they are public."""
        return [self.reference, *self.targets]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Queries and the gallery they search: gallery row i is names[i].

    Attributes:
        excluded_images: images that were excluded from the gallery, in its order.
        excluded_triplets: number of triplets that were excluded with them.
        smaller_groups: number of the remaining triplets whose groups lost excluded images.
        asked_elsewhere: references and targets of all triplets before `only` removed some, as "VAL" galleries keep
            them.
        only_asked: references that are in no gallery: they are the last rows, and no query retrieves them.
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
        """Return the name of each query: its pairid, or its split and its index in the annotation file."""
        names = []
        for triplet in self.triplets:
            place = f"{self.name}:{triplet.place}"
            names.append(place if triplet.pair_id is None else str(triplet.pair_id))
        return names

    @property
    def names(self) -> list[str]:
        """Return the image names in gallery order."""
        return list(self.image_paths)

    @property
    def paths(self) -> list[Path]:
        """Return the image files in gallery order."""
        return list(self.image_paths.values())

    @property
    def gallery_size(self) -> int:
        """Return the number of images that queries search."""
        return len(self.image_paths) - len(self.only_asked)

    @property
    def is_secret(self) -> bool:
        """Return whether only a test server has the targets."""
        return any(triplet.target is None for triplet in self.triplets)

    @property
    def has_groups(self) -> bool:
        """Return whether each query also searches a subset of the gallery."""
        return bool(self.triplets[0].group)

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """Return image name -> gallery row."""
        return {name: row for row, name in enumerate(self.image_paths)}

    @property
    def reference_rows(self) -> list[int]:
        """Return Q gallery rows, the row of each query's reference."""
        return [self.row_of[triplet.reference] for triplet in self.triplets]

    @property
    def target_rows(self) -> list[int]:
        """Return Q gallery rows, the row of each query's annotated target."""
        return [self.row_of[triplet.known_target] for triplet in self.triplets]

    @functools.cached_property
    def most_other_targets(self) -> int:
        """Return the maximum number of targets of a query besides the annotated one."""
        return max(len(triplet.other_targets) for triplet in self.triplets)

    @property
    def other_target_rows(self) -> list[list[int]]:
        """Return the gallery rows of each query's other targets, as Q lists padded with NO_ROW."""
        rows = []
        for triplet in self.triplets:
            own = [self.row_of[name] for name in triplet.other_targets]
            rows.append(own + [NO_ROW] * (self.most_other_targets - len(own)))
        return rows

    @property
    def queries_of_kinds(self) -> dict[str, list[int]]:
        """Return kind of query -> indices of the queries of this kind, in order."""
        queries: dict[str, list[int]] = {}
        for number, triplet in enumerate(self.triplets):
            for kind in triplet.kinds:
                queries.setdefault(kind, []).append(number)
        return queries

    @property
    def clusters(self) -> dict[str, list[int]]:
        """Return column -> cluster of each query (Q,), for each column that all queries have.

        Queries that share a value, such as their reference or target, are in the same cluster, because they are not
        independent of each other.
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
        """Return the gallery rows of each query's group without the reference, in gallery order: Q lists of G - 1 rows.

        A group that lost images to exclusions is padded with the row of the reference, which is not a candidate.
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
        """Return the references and targets of the triplets, including triplets that `only` removed."""
        members = set(self.asked_elsewhere)
        for triplet in self.triplets:
            members.update(triplet.images)
        return members

    @property
    def outside(self) -> list[bool]:
        """Return N booleans: whether each image is outside the gallery of references and targets."""
        members = self.members
        return [name not in members or name in self.only_asked for name in self.image_paths]

    @property
    def unlisted(self) -> list[bool]:
        """Return N booleans: whether each image is in `only_asked`."""
        return [name in self.only_asked for name in self.image_paths]

    def only(self, queries: Container[str]) -> "Split":
        """Return the split with only the queries that have these names; its gallery stays as it is."""
        named = zip(self.query_names, self.triplets, strict=True)
        kept = [triplet for name, triplet in named if name in queries]
        return replace(self, triplets=kept, asked_elsewhere=frozenset(self.members))

    def without(self, excluded: Container[str]) -> "Split":
        """Return the split without excluded images, and without triplets whose reference or target is excluded.

        Groups and negatives lose the excluded images, too.
        """
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
    """Return the SHA-256 of a split's queries, their targets and the names of its gallery, in order."""
    queries = []
    for t in split.triplets:
        answer = t.targets if t.other_targets else t.target
        query = [t.reference, t.captions, answer, t.group]
        # Without negatives, the digest is the same as in versions that had none.
        queries.append([*query, t.negatives] if t.negatives else query)
    return hashlib.sha256(json.dumps([split.names, queries]).encode()).hexdigest()


def images_digest(split: Split, *, sampled: bool = False, kept: Path | None = None) -> str:
    """Return the SHA-256 of a gallery's file names and contents, in order; it identifies a copy of a dataset.

    Args:
        sampled: hash only a sample of each file, see `runtime.files.sample_digest`.
        kept: folder that caches the digest until a path, size, time or sample of the files changes; None to read all
            files.
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
    """Return the image files of some splits, each once."""
    paths: dict[Path, None] = {}
    for split in splits:
        paths.update(dict.fromkeys(split.paths))
    return list(paths)


def check_images_exist(splits: Iterable[Split]) -> None:
    """Raise UserError unless every image file of the splits exists and is not empty."""
    paths = all_paths(splits)
    bad = [path for path in paths if not IMAGES.size(path)]
    if not bad:
        return
    first = bad[0]
    hint = "" if first.exists() else hint_of_file(first)
    if not hint and (folder := missing_folder(first)):
        hint = f": there is no {folder}"
    raise UserError(
        f"{len(bad)} of {len(paths)} image files are missing or empty, such as {first}{hint}. Without them, every "
        "recall would be wrong: add them, or exclude them (see src/check_dataset.py)"
    )
