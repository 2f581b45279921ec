"""Lay out a dataset or CLIP4Cir's checkpoints from downloaded archives and folders, and check the result.

    python src/get_data.py FashionIQ --archive images.tar.gz captions-001.zip image_splits-001.zip
    python src/get_data.py CIRR --archive train_img.zip dev_img.zip test1_img.zip ~/cirr
    python src/get_data.py checkpoints --download

A file is recognised by its name, anywhere in a zip file, a tar file or a folder: first the annotation files, then all
images that they list. Files in folders are hard-linked if possible. Existing files are kept, so an interrupted command
can simply be run again. Finally, the dataset is checked as by check_dataset.py, with the same exit codes.
"""

import argparse
import contextlib
import logging
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks import BENCHMARKS, Benchmark
from benchmarks.dataset_report import as_text
from benchmarks.image_check import check
from benchmarks.places import locate
from cli.parsers import ScriptParser
from image_search.photos import TAKEN
from runtime.files import CHECKPOINT_ENDINGS, beside, check_writable, file_size, locked, sweep
from settings import groups
from settings.declaring import parent
from settings.flag_types import Several, in_any_case, usable_path
from utils import UserError, command, first_line

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
NAMES = ("CIRR", "FashionIQ", CHECKPOINTS)
# Name -> files on Google Drive. CIRR's images are from NLVR2, and must be requested from its authors.
DRIVE = {
    # Source: github.com/Monoxide-Chen/uncertainty_retrieval/issues/2
    "FashionIQ": "https://drive.google.com/file/d/1K8ZMx7BXS1Xbe5GgUzbpYw08sfTEVi5O",
    # Source: the README of github.com/ABaldrati/CLIP4Cir
    CHECKPOINTS: "https://drive.google.com/drive/folders/1ny2hhzP8HZBnXhjvDEni8P8G4_inCNTv",
}
# Extensions of files that are not unpacked. They are checked first, because a checkpoint, too, is a zip file.
LOOSE = {*TAKEN, *CHECKPOINT_ENDINGS, ".json"}
PACKED = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z"}
AGAIN = "download it again, or unpack it and pass its folder"
BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError,
    RuntimeError,  # raised by zipfile for a password or an unsupported compression method
)  # fmt: skip


@dataclass(frozen=True)
class FoundFiles:
    """A file found in a source.

    Attributes:
        archive: archive that contains the file, or the file itself.
        name: path in the archive, or on disk; only its last part is ever used.
        size: number of bytes.
        open: function that opens the content.
    """

    archive: Path
    name: PurePosixPath
    size: int
    open: Callable[[], Any]


Wanted = Callable[[PurePosixPath], Path | None]  # path of a found file -> its destination, if any


@contextlib.contextmanager
def unpacking(archive: Path) -> Iterator[None]:
    """Raise UserError with the archive's path if unpacking the archive in this context fails."""
    try:
        yield
    except (*BROKEN, OSError) as error:
        is_of_the_disk = isinstance(error, OSError) and error.errno is not None
        if is_of_the_disk:
            raise
        raise UserError(f"{archive} cannot be unpacked ({first_line(error)}): {AGAIN}") from None


def files_of(source: Path) -> Iterator[FoundFiles]:
    """Yield the files in a source: a folder with the archives in it, an archive, or a single file.

    Symlinks and hidden files are skipped.

    Raises:
        UserError: an archive is damaged, or its format is not supported.
    """
    if source.is_dir():
        for folder, folders, names in os.walk(source):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if not name.startswith(".") and stat.S_ISREG(path.lstat().st_mode):
                    yield from files_of(path)
        return
    ending = source.suffix.lower()
    with unpacking(source):
        if ending in LOOSE:
            yield loose(source)
        elif zipfile.is_zipfile(source):
            yield from files_of_zip(source)
        elif tarfile.is_tarfile(source):
            yield from files_of_tar(source)
        elif ending in PACKED:
            raise UserError(f"{source} is damaged, or not a zip or tar archive: {AGAIN}")
        else:
            yield loose(source)


def loose(path: Path) -> FoundFiles:
    """Return the description of a file on disk."""
    return FoundFiles(
        path, PurePosixPath(path), path.stat().st_size, open=partial(open, path, "rb")
    )


def files_of_zip(source: Path) -> Iterator[FoundFiles]:
    """Yield the files in a zip archive."""
    with zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename.replace("\\", "/"))
            if not entry.is_dir() and not stat.S_ISLNK(entry.external_attr >> 16):
                yield FoundFiles(source, name, entry.file_size, open=partial(archive.open, entry))


def files_of_tar(source: Path) -> Iterator[FoundFiles]:
    """Yield the files in a tar archive, in the archive's order."""
    with tarfile.open(source) as archive:
        for entry in archive:
            if entry.isreg():
                name = PurePosixPath(entry.name)
                yield FoundFiles(source, name, entry.size, open=partial(archive.extractfile, entry))


def lay_out(sources: Sequence[Path], wanted: Wanted) -> list[Path]:
    """Write each wanted file of the sources to its destination, unless it exists already; return all destinations.

    If several files have the same destination, the first is used. Empty files, which failed downloads leave behind, are
    ignored.
    """
    places: dict[Path, None] = {}
    swept: set[Path] = set()
    others: list[str] = []
    for source in sources:
        new = 0
        for found in files_of(source):
            place = None if found.name.name.startswith(".") else wanted(found.name)
            if place is None or not found.size:
                continue
            if place.parent not in swept:
                place.parent.mkdir(parents=True, exist_ok=True)
                sweep(place.parent, age=0)
                swept.add(place.parent)
            if not file_size(place):
                with unpacking(found.archive):
                    put(found, place)
                new += 1
            elif file_size(place) != found.size:
                others.append(f"{found.name} of {found.archive}")
            places[place] = None
        logger.info("%s: %s new files", source, f"{new:,}")
    if others:
        logger.warning(
            "note: %d files were not used, because a file of a different size exists in their place; the first is %s",
            len(others),
            others[0],
        )
    return list(places)


def put(found: FoundFiles, place: Path) -> None:
    """Write a file atomically, as a hard link to a file on disk if possible, otherwise as a copy.

    The file is not synced to disk: for tens of thousands of images, syncing would take longer than everything else.
    """
    new = beside(place)
    try:
        if found.name == PurePosixPath(found.archive):
            with contextlib.suppress(OSError):
                os.link(found.archive, new)
        if not new.exists():
            with found.open() as content, open(new, "xb") as file:
                shutil.copyfileobj(content, file)
        new.replace(place)
    finally:
        new.unlink(missing_ok=True)


def get_benchmark(benchmark: Benchmark, sources: Sequence[Path]) -> None:
    """Lay out a benchmark's annotation files, then the images that they list.

    Raises:
        UserError: no list of images was found, or a list refers to a file outside the benchmark's folder.
    """
    annotations: dict[str, Path] = {}
    lists: list[tuple[str, Path]] = []
    for split in benchmark.splits.values():
        for part in benchmark.parts:
            captions, images_file = benchmark.files(part, split)
            annotations |= {file.name: file for file in (captions, images_file)}
            lists.append((part, images_file))
    if not all(map(file_size, annotations.values())):
        lay_out(sources, lambda path: annotations.get(path.name))
    images: dict[str, Path] = {}
    for part, images_file in lists:
        if file_size(images_file):
            images |= locate(
                benchmark.image_places(images_file),
                benchmark.image_folders(part),
                root=benchmark.data_root,
                listed_in=images_file,
                remedy=benchmark.remedy,
            )
    if not images:
        names = ", ".join(images_file.name for _, images_file in lists)
        raise UserError(
            f"--archive: none of {names} was found: clone the annotation repository, and pass its folder too"
        )
    own_folder = benchmark.data_root / Path(benchmark.folder).parts[0]
    for name, place in images.items():
        if not place.is_relative_to(own_folder):
            raise UserError(
                f"the image {name} at {place} points outside {own_folder}: {benchmark.remedy}"
            )
    if not all(map(file_size, images.values())):
        lay_out(
            sources,
            lambda path: images.get(path.stem) if path.suffix.lower() in TAKEN else None,
        )
    there = sum(map(bool, map(file_size, images.values())))
    logger.info("%s: %s of %s images", benchmark.name, f"{there:,}", f"{len(images):,}")


def get_checkpoints(folder: Path, sources: Sequence[Path]) -> None:
    """Write all checkpoints to a folder under their own names. Raises UserError if the sources contain none."""
    endings = CHECKPOINT_ENDINGS
    made = lay_out(sources, lambda path: folder / path.name if path.suffix in endings else None)
    if not made:
        raise UserError(
            f"--archive: no {' or '.join(endings)} file was found: pass another archive"
        )
    print("\n".join(map(str, sorted(made))))


def download(name: str, folder: Path) -> Path:
    """Download the files that DRIVE lists to a folder, and return the folder; existing files are skipped.

    Raises:
        UserError: gdown is not installed, or Google Drive cannot be reached or rejects the download.
    """
    try:
        import gdown
    except ImportError:
        raise UserError(
            "--download needs a package: pip install -r requirements-download.txt, or use --archive"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    fetch = gdown.download_folder if "/folders/" in DRIVE[name] else gdown.download
    try:
        fetch(url=DRIVE[name], output=f"{folder}{os.sep}", resume=True)
    except (OSError, RuntimeError, gdown.exceptions.DownloadError) as error:
        raise UserError(
            f"--download: {DRIVE[name]} failed ({first_line(error)}): open this link in a browser, and pass the "
            "downloaded files with --archive"
        ) from None
    return folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = ScriptParser(__doc__, parents=[parent(groups.Data), parent(groups.Decoding)])
    parser.add_argument(
        "name",
        type=in_any_case(NAMES),
        choices=NAMES,
        help="dataset to lay out, or checkpoints for those of CLIP4Cir",
    )
    parser.add_argument(
        "--archive",
        nargs="+",
        action=Several,
        type=usable_path,
        metavar="PATH",
        default=[],
        help="zip files, tar files and folders to search for files; the first that contains a file is used",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="download FashionIQ's images or CLIP4Cir's checkpoints from Google Drive into downloads/",
    )
    parser.add_argument(
        "--unofficial", action="store_true", help="do not compare counts with the official counts"
    )
    args = parser.parse_args(argv)
    if not args.archive and not args.download:
        parser.error("pass archives or folders with --archive, or use --download")
    if args.download and args.name not in DRIVE:
        parser.error(
            f"--download does not offer {args.name}: request its images at lil.nlp.cornell.edu/nlvr, then pass the "
            "archives with --archive"
        )
    return args


@command
def main(argv: list[str] | None = None) -> None:
    """Lay out the files, and print the report on the dataset."""
    args = parse(argv)
    for source in args.archive:
        if not (source.is_file() or source.is_dir()):
            raise UserError(
                f"--archive {source} is missing, or not a file: pass a file or a folder"
            )
    root = args.data_root
    check_writable({"--data-root": root})
    root.mkdir(parents=True, exist_ok=True)
    with locked(root, f"--data-root {root} is in use by another get_data.py: wait until it ends"):
        sources = list(args.archive)
        if args.download:
            sources.append(download(args.name, root / "downloads" / args.name))
        if args.name == CHECKPOINTS:
            get_checkpoints(root / "models_final", sources)
            return
        benchmark = BENCHMARKS[args.name](root)
        get_benchmark(benchmark, sources)
    report = check(benchmark, None, official=not args.unofficial, workers=args.num_workers)
    print(as_text(report))
    if report.exit_code:
        raise SystemExit(report.exit_code)


if __name__ == "__main__":
    main()
