"""Report on a copy of a benchmark: its counts next to the official counts, bad images by role, and their effects."""

import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.base import Benchmark
from benchmarks.splits import Split, Triplet
from runtime.choices import ORIGINAL, WHITE
from runtime.spelling import hint_of_file, missing_folder
from utils import UserError, printable

FINDING = "finding"
NOTE = "note"
UNUSABLE = "unusable"
PLACEHOLDER = 3  # files with equal content; more than this suggest a placeholder image
SHOWN_IDS = 3  # number of ids shown with a remark

MISSING = "missing"  # problem of a file that does not exist
# Traits that a file may have.
DEEP = "more than 8 bits per channel"
TRANSPARENT = "transparency"
TURNED = "an orientation in their EXIF data"
# Trait -> its treatment when files are read as in the original implementation; "" stands for a rare mode.
AS_ORIGINAL = {
    DEEP: "values above 255 are read as white, as in the original",
    TRANSPARENT: "transparent areas are black, or show their hidden colour, as in the original",
    TURNED: "they are not rotated, as in the original",
    "": "they are padded and resized in this mode, as in the original",
}
# Trait -> its treatment when files are read as a viewer shows them.
AS_SHOWN = {
    DEEP: "they are scaled to 8 bits",
    TRANSPARENT: f"their background becomes {WHITE}, or the color of --background",
    TURNED: "they are rotated upright",
    "": "they are converted to RGB before padding and resizing",
}


@dataclass(frozen=True)
class Inspection:
    """Properties of an image file, see `image_check`.

    Attributes:
        problem: reason why the file cannot be decoded, "" if it can.
        digest: SHA-256 of the content, "" if there is none.
        traits: traits among the keys of AS_SHOWN, and the mode if it is a rare one.
    """

    problem: str
    digest: str
    traits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Remark:
    """One remark about a dataset.

    Attributes:
        level: FINDING, something to repair or to decide on; NOTE, a property that official files may have, too;
            UNUSABLE.
        where: the file or split.
        ids: the images or queries that the remark is about.
    """

    level: str
    where: str
    text: str
    ids: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Findings of a check.

    Attributes:
        files: each annotation file with its number of entries and the official number.
        layouts: folder -> number of images in it.
        images: number of images inspected, 0 if none were.
        bad: image id -> the problem of its file.
    """

    dataset: str
    remarks: list[Remark] = field(default_factory=list)
    files: list[tuple[str, int, int]] = field(default_factory=list)
    layouts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    def say(self, level: str, where: str, text: str, ids: Iterable[str] = ()) -> None:
        """Add a remark."""
        self.remarks.append(Remark(level, where, text, list(ids)))

    def count(self, level: str, where: str, text: str, ids: Sequence[str]) -> None:
        """Add a remark on ids, preceded by their number, if there are any."""
        if ids:
            self.say(level, where, f"{len(ids):,} {text}", ids)

    @property
    def exit_code(self) -> int:
        """Return 0 for clean data, 1 for findings, 2 for unusable data."""
        levels = {remark.level for remark in self.remarks}
        if UNUSABLE in levels:
            return 2
        return 1 if FINDING in levels else 0


ReadParts = dict[tuple[str, str], Split]  # (part, split) -> its records


def read_parts(
    benchmark: Benchmark, splits: Iterable[str], *, official: bool, asked_for: bool, report: Report
) -> ReadParts:
    """Read all parts of some splits; remark on unreadable parts, and on counts that are not the official ones.

    Args:
        official: whether to compare counts with the official files.
        asked_for: whether the user chose the splits, so that no file may be missing.
    """
    parts: ReadParts = {}
    for split in splits:
        for part in benchmark.parts:
            files = dict.fromkeys(benchmark.files(part, split))
            missing = [file for file in files if not file.exists()]
            for file in missing:
                level = UNUSABLE if asked_for else FINDING
                report.say(level, str(file), f"missing: {part} {split} cannot be used without it")
            if missing:
                continue
            try:
                parts[part, split] = benchmark.read_part(part, split)
            except UserError as error:
                report.say(UNUSABLE, f"{part} {split}", str(error))
                continue
            _count(benchmark, part, split, parts[part, split], official=official, report=report)
    if not parts:
        report.say(UNUSABLE, str(benchmark.annotation_folder()), "no split can be read")
    return parts


def _count(
    benchmark: Benchmark, part: str, split: str, records: Split, *, official: bool, report: Report
) -> None:
    """Record the number of entries in a part's two files, with the official number if it is known.

    If one file lists both queries and images, only the queries are counted.
    """
    counts = (len(records.triplets), records.gallery_size)
    official_counts = benchmark.official.get(f"{part}.{split}", counts)
    counted = list(zip(benchmark.files(part, split), counts, official_counts, strict=True))
    queries_file, images_file = benchmark.files(part, split)
    for file, count, expected in counted[:1] if queries_file == images_file else counted:
        report.files.append((str(file), count, expected))
        if official and count != expected:
            report.say(FINDING, str(file), f"{count:,} entries, the official file has {expected:,}")


def remark_on_annotations(benchmark: Benchmark, parts: ReadParts, report: Report) -> None:
    """Remark on overlapping lists, repeated targets and triplets, and empty, wordless or repeated captions."""
    listed: dict[str, list[str]] = {split: [] for split in benchmark.splits.values()}
    triplets: dict[str, list[Triplet]] = {split: [] for split in benchmark.splits.values()}
    for (_, split), records in parts.items():
        listed[split] += records.names
        triplets[split] += records.triplets
    _remark_on_repeats(benchmark, listed, report)
    if benchmark.train_split is not None:
        _remark_on_training(benchmark.train_split, listed, triplets, report)
    for (part, split), records in parts.items():
        _remark_on_asked_twice(benchmark, f"{part} {split}", records, report)
    for split, of_split in triplets.items():
        _remark_on_captions(benchmark, split, of_split, report)


def _remark_on_asked_twice(
    benchmark: Benchmark, where: str, records: Split, report: Report
) -> None:
    """Remark on triplets that a file contains more than once, which gives them more weight in metrics."""
    first: dict[tuple[str, tuple[str, ...], tuple[str, ...]], int] = {}
    again = []
    for place, triplet in enumerate(records.triplets):
        asked = (triplet.reference, triplet.targets, tuple(sorted(triplet.captions)))
        if first.setdefault(asked, place) != place:
            again.append(f"entries {first[asked]} and {place}: {_query(benchmark, triplet)}")
    if records.is_secret:
        report.count(NOTE, where, "queries are repeated; their targets may differ", again)
    else:
        report.count(FINDING, where, "triplets are repeated: they count twice", again)


def _remark_on_captions(
    benchmark: Benchmark, split: str, triplets: Sequence[Triplet], report: Report
) -> None:
    """Remark on captions that are empty, without words, or repeated."""
    empty = []
    wordless: dict[str, list[str]] = {NOTE: [], FINDING: []}
    same = []
    for triplet in triplets:
        query = _query(benchmark, triplet)
        said = [bool(caption.strip()) for caption in triplet.captions]
        if not all(said):
            empty.append(query)
        if lacks_words(triplet):
            wordless[NOTE if query in benchmark.official_wordless else FINDING].append(query)
        if len(triplet.captions) > len(set(triplet.captions)):
            same.append(query)
    report.count(NOTE, split, "queries have an empty caption", empty)
    for level, queries in wordless.items():
        effect = "queries have a caption of only punctuation, or no caption that contains a word"
        report.count(level, split, effect, queries)
    report.count(NOTE, split, "queries have the same caption twice", same)


def lacks_words(triplet: Triplet) -> bool:
    """Check whether a caption is only punctuation, which joining captions strips off, or no caption has a word."""
    wordless = [caption for caption in triplet.captions if not any(map(_says_something, caption))]
    return len(wordless) == len(triplet.captions) or any(caption.strip() for caption in wordless)


def _says_something(character: str) -> bool:
    """Check whether a character is a letter, a digit or a pictogram such as an emoji."""
    return character.isalnum() or unicodedata.category(character) == "So"


def _remark_on_repeats(
    benchmark: Benchmark, listed: Mapping[str, list[str]], report: Report
) -> None:
    """Remark on the number of entries in all lists, and on the number of different images."""
    entries = sum(map(len, listed.values()))
    images = len(set().union(*listed.values()))
    counts = f"{entries:,} entries list {images:,} images: {entries - images:,} entries repeat an image of another list"
    report.say(NOTE, "image lists", f"{counts}. {benchmark.counts_explained}".rstrip())


def _remark_on_training(
    train: str,
    listed: Mapping[str, list[str]],
    triplets: Mapping[str, list[Triplet]],
    report: Report,
) -> None:
    """Remark on repeated targets, and on training images that are also in validation or test."""
    targets = Counter(_targets(triplets[train]))
    repeated = [name for name, count in targets.items() if count > 1]
    effect = (
        "targets are repeated: within a batch, each copy is a negative of the other queries, unless "
        "--mask-duplicate-targets is set"
    )
    report.count(NOTE, train, effect, repeated)
    trained_on = {*targets, *(triplet.reference for triplet in triplets[train])}
    for other in [split for split in triplets if split != train]:
        where = f"{train} and {other}"
        shared = sorted(set(listed[train]) & set(listed[other]))
        report.count(
            NOTE,
            where,
            "images are in the lists of both splits: splits are disjoint only within a part",
            shared,
        )
        seen = sorted(trained_on.intersection(_targets(triplets[other])))
        report.count(NOTE, where, f"targets of {other} are in training triplets", seen)


def _targets(triplets: Iterable[Triplet]) -> Iterator[str]:
    """Return all targets of some triplets, with repetitions."""
    return itertools.chain.from_iterable(triplet.targets for triplet in triplets)


def _query(benchmark: Benchmark, triplet: Triplet) -> str:
    if triplet.pair_id is not None:
        return f"{benchmark.id_name} {triplet.pair_id}"
    return f"{triplet.reference} -> {triplet.target or '?'}"


def needed_images(benchmark: Benchmark, split: str, records: Split) -> dict[str, Path]:
    """Return the images of a part that triplets or galleries need; in training, only the images of triplets."""
    if split != benchmark.train_split:
        return records.image_paths
    used = records.members
    return {name: path for name, path in records.image_paths.items() if name in used}


def remark_on_images(
    benchmark: Benchmark, parts: ReadParts, inspections: Mapping[Path, Inspection], report: Report
) -> None:
    """Remark on the folders of the images, on bad files and copies by role, and on their effect on metrics.

    Args:
        inspections: file -> its inspection, for each file that is needed.
    """
    report.images = len(inspections)
    there = [path for path, inspection in inspections.items() if inspection.problem != MISSING]
    report.layouts = _layouts(benchmark, there)
    for (part, split), records in parts.items():
        bad = {}
        digests = {}
        having = defaultdict(list)
        needed = needed_images(benchmark, split, records)
        for name, path in needed.items():
            if inspections[path].problem:
                bad[name] = inspections[path].problem
            else:
                digests[name] = inspections[path].digest
            for trait in inspections[path].traits:
                having[trait].append(name)
        report.bad.update(bad)
        where = f"{part} {split}"
        if all(_asks_for(triplet, bad) for triplet in records.triplets):
            report.say(UNUSABLE, where, "every query has an image that cannot be decoded")
        missing = {
            name: path for name, path in needed.items() if inspections[path].problem == MISSING
        }
        gone = _remark_on_missing(where, missing, report)
        others = {name: problem for name, problem in bad.items() if name not in gone}
        trains = split == benchmark.train_split
        _remark_on_bad(where, records, others, trains=trains, report=report)
        _remark_on_copies(where, records, digests, report)
        is_original = benchmark.background == ORIGINAL
        effects = AS_ORIGINAL if is_original else AS_SHOWN
        for trait, names in sorted(having.items()):
            level = FINDING if is_original and trait == DEEP else NOTE
            text = f"files have {trait}: {effects.get(trait, effects[''])}"
            report.count(level, where, text, names)


def _layouts(benchmark: Benchmark, paths: Iterable[Path]) -> dict[str, int]:
    """Count files below the folders of known layouts: folder -> number of files."""
    known: set[Path] = set()
    for part in benchmark.parts:
        known.update(benchmark.image_folders(part))
    counts: Counter[str] = Counter()
    for path in paths:
        folder = next((parent for parent in path.parents if parent in known), path.parent)
        counts[str(folder)] += 1
    return dict(counts)


def _roles(records: Split) -> dict[str, set[str]]:
    """Return the images of a part by role: references of queries, targets, and distractors, which are neither."""
    references = {triplet.reference for triplet in records.triplets}
    targets = set(_targets(records.triplets))
    distractors = records.image_paths.keys() - references - targets
    return {"query": references, "target": targets, "distractor": distractors}


def _remark_on_missing(where: str, missing: Mapping[str, Path], report: Report) -> set[str]:
    """Remark on missing folders of a part, and on missing files that may exist under another name.

    Returns:
        The images in the missing folders.
    """
    hints = [name + hint_of_file(path) for name, path in list(missing.items())[:SHOWN_IDS]]
    if any("did you mean" in hint for hint in hints):
        report.say(FINDING, where, f"missing files exist under similar names: {', '.join(hints)}")
    folders = {name: missing_folder(path) for name, path in missing.items()}
    gone = {name for name, folder in folders.items() if folder}
    there = sorted({str(folder) for folder in folders.values() if folder})
    report.count(FINDING, where, f"folders are missing, with {len(gone):,} images", there)
    return gone


def _remark_on_bad(
    where: str, records: Split, bad: Mapping[str, str], *, trains: bool, report: Report
) -> None:
    """Remark on files of a part that cannot be decoded, by problem and role."""
    queries = len(records.triplets)
    gallery = records.gallery_size
    for role, names in _roles(records).items():
        for problem in dict.fromkeys(bad.values()):
            ids = [name for name in bad if name in names and bad[name] == problem]
            lost = sum(_asks_for(triplet, set(ids)) for triplet in records.triplets)
            effects = {
                "query": f"{lost} of {queries} queries cannot be evaluated; if they are left out, recalls are computed "
                "from the other queries",
                "target": f"{lost} of {queries} queries have no target: they count as missed, or are left out",
                "distractor": f"the gallery has {gallery - len(ids)} images instead of {gallery}: recalls are too high",
            }
            effect = (
                f"{lost} of {queries} triplets cannot be trained on" if trains else effects[role]
            )
            report.count(FINDING, where, f"files {problem}, role {role}: {effect}", ids)


def _asks_for(triplet: Triplet, names: Container[str]) -> bool:
    """Check whether the reference or a target of a triplet is among some images."""
    return any(name in names for name in triplet.images)


def _remark_on_copies(
    where: str, records: Split, digests: Mapping[str, str], report: Report
) -> None:
    """Remark on files of a part with the same content as another file, by role."""
    groups = defaultdict(list)
    for name, digest in digests.items():
        groups[digest].append(name)
    copies: list[str] = []
    for group in groups.values():
        if len(group) > 1:
            copies += group
    largest = max(map(len, groups.values()), default=0)
    effects = {
        "query": "the query has the same picture as another image",
        "target": "the target cannot be distinguished from its copy, so their order is arbitrary",
        "distractor": "the gallery is effectively smaller",
    }
    for role, names in _roles(records).items():
        text = f"files have the same content as another file, role {role}: {effects[role]}"
        if largest > PLACEHOLDER:
            text += f"; up to {largest} have the same picture, which may be a placeholder"
        report.count(FINDING, where, text, [name for name in copies if name in names])


def as_text(report: Report) -> str:
    """Format the report for reading in a terminal."""
    lines = [report.dataset, "  entries   official  file"]
    lines += [f"  {count:7,}   {official:8,}  {file}" for file, count, official in report.files]
    lines += [f"  {count:7,} images in {folder}" for folder, count in report.layouts.items()]
    if report.images:
        lines.append(f"  {report.images:7,} needed, {report.images - len(report.bad):,} decoded")
    for remark in report.remarks:
        named = ", ".join(remark.ids[:SHOWN_IDS]) + (", ..." if len(remark.ids) > SHOWN_IDS else "")
        lines.append(
            f"  {remark.level}: {remark.where}: {remark.text}" + (f" ({named})" if named else "")
        )
    verdict = {0: "clean", 1: "usable, with findings", 2: "unusable"}[report.exit_code]
    return "\n".join(map(printable, [*lines, f"  {verdict}"]))
