"""What a copy of a benchmark is: its counts beside the official ones, its images by role, what they do to metrics."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.base import Benchmark
from benchmarks.image_check import MISSING, Inspection
from benchmarks.protocols import members
from benchmarks.splits import Split, Triplet
from utils import UserError

FINDING, NOTE, UNUSABLE = "finding", "note", "unusable"


@dataclass(frozen=True)
class Remark:
    """One thing that is said of a dataset.

    Attributes:
        level: FINDING, something to repair or to decide on; NOTE, a property, of official files too; UNUSABLE.
        where: the file or split.
        ids: the images or queries it is about.
    """

    level: str
    where: str
    text: str
    ids: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a check found.

    Attributes:
        files: each annotation file with its number of entries and the official one.
        layouts: folder -> how many of the images lie there.
        images: how many were decoded, 0 where none were looked at.
        bad: image id -> what is wrong with its file.
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

    @property
    def exit_code(self) -> int:
        """0 clean, 1 findings, 2 unusable."""
        levels = {remark.level for remark in self.remarks}
        return 2 if UNUSABLE in levels else 1 if FINDING in levels else 0


Parts = dict[tuple[str, str], Split]  # (part, split) -> its records


def read_parts(benchmark: Benchmark, splits: Iterable[str], official: bool, asked_for: bool, report: Report) -> Parts:
    """All parts of some splits that can be read; the others, and counts that differ, are remarked on.

    Args:
        official: compare counts with those of the official files.
        asked_for: the splits were named, so that none of them may be missing.
    """
    parts: Parts = {}
    for split in splits:
        for part in benchmark.parts:
            files = benchmark.files(part, split)
            missing = [file for file in files if not file.exists()]
            for file in missing:
                level = UNUSABLE if asked_for else FINDING
                report.say(level, str(file), f"missing: nothing can be done with {part} {split}")
            if missing:
                continue
            try:
                own = parts[part, split] = benchmark.read_part(part, split)
            except UserError as error:
                report.say(UNUSABLE, f"{part} {split}", str(error))
                continue
            counts = len(own.triplets), len(own.names)
            for file, count, expected in zip(files, counts, benchmark.official[f"{part}.{split}"], strict=True):
                report.files.append((str(file), count, expected))
                if official and count != expected:
                    report.say(FINDING, str(file), f"{count:,} entries, the official file has {expected:,}")
    if not parts:
        report.say(UNUSABLE, str(benchmark.annotation_folder()), "no split can be read")
    return parts


def remark_on_annotations(benchmark: Benchmark, parts: Parts, report: Report) -> None:
    """How the lists overlap, targets that repeat, captions that are empty or the same."""
    listed: dict[str, list[str]] = {split: [] for split in benchmark.splits}
    triplets: dict[str, list[Triplet]] = {split: [] for split in benchmark.splits}
    for (_, split), own in parts.items():
        listed[split] += own.names
        triplets[split] += own.triplets
    entries, unique = sum(map(len, listed.values())), len(set().union(*listed.values()))
    text = f"{entries:,} entries name {unique:,} images: {entries - unique:,} entries repeat an image of another list"
    report.say(NOTE, "image lists", f"{text}. {benchmark.counts_explained}".rstrip())
    _remark_on_leaks(benchmark, listed, triplets, report)
    counts = Counter(t.target for t in triplets[benchmark.splits[0]])
    again = [name for name, count in counts.items() if count > 1]
    text = "targets repeat: in one batch they are each other's negatives, unless --mask-duplicate-targets"
    _say_if(again, NOTE, benchmark.splits[0], text, report)
    for split, own in triplets.items():
        named = [_query(t) for t in own if not all(caption.strip() for caption in t.captions)]
        _say_if(named, NOTE, split, "queries have an empty caption", report)
        named = [_query(t) for t in own if len(t.captions) > len(set(t.captions))]
        _say_if(named, NOTE, split, "queries have the same caption twice", report)


def _remark_on_leaks(benchmark: Benchmark, listed: dict, triplets: dict, report: Report) -> None:
    """Images of training that validation or test have too."""
    train, *others = benchmark.splits
    used = {name for t in triplets[train] for name in (t.reference, t.target)}
    for other in others:
        where = f"{train} and {other}"
        shared = sorted(set(listed[train]) & set(listed[other]))
        _say_if(shared, NOTE, where, "images are in lists of both: splits are apart only within a part", report)
        seen = sorted({t.target for t in triplets[other] if t.target in used})
        _say_if(seen, NOTE, where, f"targets of {other} are in training triplets", report)


def _say_if(ids: list[str], level: str, where: str, text: str, report: Report) -> None:
    """Remark on ids, their number first, if there are any."""
    if ids:
        report.say(level, where, f"{len(ids):,} {text}", ids)


def _query(triplet: Triplet) -> str:
    if triplet.pair_id is not None:
        return f"pairid {triplet.pair_id}"
    return f"{triplet.reference} -> {triplet.target or '?'}"


def needed(benchmark: Benchmark, split: str, own: Split) -> dict[str, Path]:
    """The images of a part that triplets or galleries need: of training those of the triplets alone."""
    if split != benchmark.splits[0]:
        return own.image_paths
    used = members(own)
    return {name: path for name, path in own.image_paths.items() if name in used}


def remark_on_images(benchmark: Benchmark, parts: Parts, found: dict[Path, Inspection], report: Report) -> None:
    """Where the files are, which are no good or copies of each other, in which role, and what that does to metrics.

    Args:
        found: each file that is needed.
    """
    report.images = len(found)
    folders = {str(folder) for part in benchmark.parts for folder in benchmark.image_folders(part)}
    there = [path for path, inspection in found.items() if inspection.problem != MISSING]
    where = (next((str(p) for p in path.parents if str(p) in folders), str(path.parent)) for path in there)
    report.layouts = dict(Counter(where))
    for (part, split), own in parts.items():
        paths = needed(benchmark, split, own)
        bad = {name: found[path].problem for name, path in paths.items() if found[path].problem}
        digests = {name: found[path].digest for name, path in paths.items() if name not in bad}
        report.bad |= bad
        _remark_on_bad(f"{part} {split}", split == benchmark.splits[0], own, bad, report)
        _remark_on_copies(f"{part} {split}", own, digests, report)


def _roles(own: Split) -> dict[str, set[str]]:
    """What a part's images are: references of queries, targets, and distractors, which are neither."""
    references = {t.reference for t in own.triplets}
    targets = {t.target for t in own.triplets if t.target is not None}
    return {"query": references, "target": targets, "distractor": own.image_paths.keys() - references - targets}


def _remark_on_bad(where: str, trains: bool, own: Split, bad: dict[str, str], report: Report) -> None:
    """Files of a part that cannot be decoded, by problem and role."""
    if all(t.reference in bad or t.target in bad for t in own.triplets):
        report.say(UNUSABLE, where, "every query has an image that cannot be decoded")
    queries, gallery = len(own.triplets), len(own.names)
    for role, names in _roles(own).items():
        for problem in dict.fromkeys(bad.values()):
            ids = {name: None for name in bad if name in names and bad[name] == problem}
            lost = sum(t.reference in ids or t.target in ids for t in own.triplets)
            effect = {
                "query": f"{lost} of {queries} queries cannot be asked; left out, the recalls are of the others",
                "target": f"{lost} of {queries} queries have no answer: they count as missed, or are left out",
                "distractor": f"a gallery of {gallery - len(ids)} instead of {gallery}: recalls rise",
            }[role]
            if trains:
                effect = f"{lost} of {queries} triplets cannot be trained on"
            _say_if(list(ids), FINDING, where, f"files {problem}, role {role}: {effect}", report)


def _remark_on_copies(where: str, own: Split, digests: dict[str, str], report: Report) -> None:
    """Files of a part whose content is that of another one, by role."""
    groups = defaultdict(list)
    for name, digest in digests.items():
        groups[digest].append(name)
    copies = {name: len(group) for group in groups.values() if len(group) > 1 for name in group}
    largest = max(copies.values(), default=0)
    effects = {
        "query": "such a query is the same picture as another image",
        "target": "nothing tells the answer from its copy, so which of them comes first is chance",
        "distractor": "the gallery is in effect smaller",
    }
    for role, names in _roles(own).items():
        text = f"files have the same content as another, role {role}: {effects[role]}"
        text += f"; up to {largest} are one picture, as a placeholder would be" if largest > 3 else ""
        _say_if([name for name in copies if name in names], FINDING, where, text, report)


def text(report: Report, examples: int = 3) -> str:
    """The report for people."""
    lines = [f"{report.dataset}", "  entries   official  file"]
    lines += [f"  {count:7,}   {official:8,}  {file}" for file, count, official in report.files]
    lines += [f"  {count:7,} images in {folder}" for folder, count in report.layouts.items()]
    if report.images:
        lines.append(f"  {report.images:7,} needed, {report.images - len(report.bad):,} decoded")
    for remark in report.remarks:
        shown = ", ".join(remark.ids[:examples]) + (", ..." if len(remark.ids) > examples else "")
        lines.append(f"  {remark.level}: {remark.where}: {remark.text}" + (f" ({shown})" if shown else ""))
    verdict = {0: "clean", 1: "usable, with findings", 2: "unusable"}[report.exit_code]
    return "\n".join([*lines, f"  {verdict}"])
