"""Search your own images: index any folder, then search with a reference image and what to change.

    python src/search.py index --images photos/ --output photos_index --clip-model-path models_final/clip_finetuned
    python src/search.py query --index photos_index --image photos/shirt.jpg --text "is red and has no sleeves" \\
        --combiner-path models_final/combiner_trained

`index --output photos_index` updates it: new images are added, missing ones removed. Moved images are recognised by
their content and not encoded again. An interrupted update resumes with the same command.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_files, pick_device
from image_search.manifest import as_made, check_index, made_with, read_manifest
from image_search.stores.base import all_addresses, all_stores, chosen_keeping, store_of
from runtime import torchrun
from runtime.choices import WHITE
from runtime.files import check_file_writable, check_writable, write_text
from runtime.interruption import listening
from settings import groups
from settings.declaring import parent
from settings.flag_types import Several, number, usable_path
from settings.groups import PairChoice
from utils import Stopped, UserError, command, flag, printable

if TYPE_CHECKING:
    from image_search.image_index import Update
    from image_search.photos import FoundImages
    from image_search.searcher import Found
    from image_search.stores.base import Keeping

logger = logging.getLogger(__name__)

MOST_NAMED = 20  # maximum number of changed and of missing images that `move_images` lists
SIDE = 176  # pixels of the longer side of an image on a page of results


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of both commands."""
    parser: argparse.ArgumentParser = ScriptParser(__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{index,query}", required=True)
    clip = [options.clip_flags(), parent(groups.TunedClip)]
    index = commands.add_parser(
        "index",
        parents=[options.exported_flag(), *clip, options.compute_flags()],
        help="index folders of images, or update their index",
    )
    add_folders(index)
    add_keeping(index)
    options.add_clip_batch_size(index, help="number of images or texts that CLIP encodes at a time")
    query = commands.add_parser(
        "query",
        parents=[*options.search_flags(), *clip, options.compute_flags(False)],
        help="search an index",
    )
    add_query(query)
    return parser.parse_args(argv)


def add_folders(index: argparse.ArgumentParser) -> None:
    """Add the flags for the content of an index."""
    index.add_argument(
        "--images",
        type=usable_path,
        nargs="+",
        action=Several,
        default=[],
        metavar="DIR",
        help="folders of images to add to the folders of the index",
    )
    index.add_argument(
        "--forget",
        type=usable_path,
        nargs="+",
        action=Several,
        default=[],
        metavar="DIR",
        help="folders to remove from the index",
    )
    index.add_argument(
        "--relocate",
        type=usable_path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="rewrite the paths of images that were moved from folder OLD to folder NEW, and do nothing else",
    )
    index.add_argument(
        "--output",
        type=usable_path,
        required=True,
        metavar="INDEX",
        help="index folder, created or updated",
    )


def add_query(query: argparse.ArgumentParser) -> None:
    """Add the flags for the query and for the output of the results."""
    query.add_argument(
        "--image",
        type=usable_path,
        metavar="REF",
        help="reference image (default: none; search by text alone)",
    )
    query.add_argument(
        "--text",
        help="caption, what to change in the reference (default: none; search by image alone)",
    )
    options.add_k(query, default=10)
    query.add_argument(
        "--min-similarity",
        type=number(-1, 1),
        metavar="X",
        help="smallest cosine similarity of a result, from -1 to 1 (default: no limit)",
    )
    query.add_argument(
        "--distinct",
        action="store_true",
        help="show only the first of identical images (default: show all and mark the copies)",
    )
    query.add_argument(
        "--filter",
        default="",
        metavar="CONDITION",
        help="condition on the results, only for an index in Milvus: a Milvus expression over path, category, size and "
        "time, as 'path like \"shoes/%%\"'",
    )
    how = query.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the results as JSON")
    how.add_argument(
        "--html",
        type=usable_path,
        metavar="FILE",
        help="output file for an HTML page of the results",
    )


def add_keeping(index: argparse.ArgumentParser) -> None:
    """Add the flags for the storage of the index."""
    kinds = [kind for store in all_stores() for kind in store.kinds]
    index.add_argument(
        "--index-type",
        choices=dict.fromkeys(kinds),
        help="type of the index; flat: exact search; others: approximate search of large galleries (default: "
        "unchanged, flat for a new index)",
    )
    options.add_store(
        index,
        help=f"store of the features: {all_addresses()}; faiss: files in the index folder; a Milvus server is sent the "
        "environment variable MILVUS_TOKEN (default: unchanged, faiss for a new index)",
    )
    index.add_argument(
        "--on-disk",
        action=argparse.BooleanOptionalAction,
        help="keep the lists of ivfpq in a file instead of memory (default: unchanged, in memory for a new index)",
    )
    options.add_verify(
        index,
        help="detect changed images by hashing whole files (default: unchanged; a new index compares size, "
        "modification time and the first, middle and last 4 KiB, in Milvus only size and time)",
    )


def chosen_folders(
    held: Sequence[str], named: Sequence[Path], forgotten: Sequence[Path], output: Path
) -> tuple[list[Path], list[Path]]:
    """Return the folders of an index: its present folders and the named folders, without the forgotten folders.

    Args:
        held: present folders of the index.

    Returns:
        The folders that exist, and the folders that are missing, whose images may be in the named folders now.
    """
    typed = {path.resolve() for path in named}
    gone = {path.resolve() for path in forgotten}
    for path in sorted(gone - set(map(Path, held))):
        raise UserError(
            f"--forget {path}: {output} does not contain this folder: choose from {', '.join(held) or 'none'}"
        )
    chosen = sorted({*map(Path, held), *typed} - gone)
    if not chosen:
        raise UserError("--images is missing: pass a folder that contains images")
    missing = [folder for folder in chosen if not folder.is_dir()]
    for folder in missing:
        if folder in typed or not typed:
            raise UserError(
                f"--images {folder} is not a folder: choose one that contains images, pass its new location with "
                f"--relocate, or remove it from the index with --forget"
            )
    return [folder for folder in chosen if folder not in missing], missing


def make_index(args: argparse.Namespace) -> None:
    """Create or update an index, and report the changes."""
    check_files(args)
    check_writable({"--output": args.output})
    earlier = read_manifest(args.output) or {}
    # Indexing needs only the CLIP of the pair.
    named = PairChoice(
        combining_function="sum",
        clip_path=args.clip_model_path,
        combiner_path=None,
        exported=args.pair,
        clip=groups.Clip.of(args),
        workers=args.num_workers,
    )
    if args.relocate:
        as_made(args.output, earlier, named)  # rejects an index from another machine
        move_images(args)
        return
    held = earlier.get("folders", [])
    folders, gone = chosen_folders(held, args.images, args.forget, args.output)
    keeping = chosen_keeping(earlier, args.store, args.index_type, args.on_disk, verify=args.verify)

    from image_search.photos import FoundImages, find_images

    # The first process lists the files and sends the list to the others.
    told_by = keeping.told_by
    images = find_images(folders, told_by) if torchrun.is_first() else FoundImages(folders)
    images.gone = gone
    choice = as_made(args.output, earlier, named)
    update = encode_images(args, images, choice, keeping)
    if update is not None:
        report(args.output, update, images)


def move_images(args: argparse.Namespace) -> None:
    """Rewrite the paths of an index, and report changed and missing images."""
    for name in ("images", "forget", "index_type", "on_disk", "verify"):
        if getattr(args, name):
            raise UserError(
                f"{flag(name)} cannot be combined with --relocate, which only rewrites paths: remove one of the two "
                "flags"
            )

    from image_search.image_index import relocate

    moved = relocate(args.output, *args.relocate, store=args.store)
    for path in moved.changed[:MOST_NAMED]:
        logger.warning(
            "%s has changed since it was indexed: the next update will encode it again", path
        )
    for path in moved.missing[:MOST_NAMED]:
        logger.warning("%s is missing: the next update will remove it from the index", path)
    print(
        f"{printable(args.output)}: {moved.count} paths rewritten; {len(moved.changed)} of these images have changed "
        f"content, {len(moved.missing)} are missing"
    )


def encode_images(
    args: argparse.Namespace, images: "FoundImages", choice: PairChoice, keeping: "Keeping"
) -> "Update | None":
    """Update the index with the CLIP of a pair; return the outcome in the first process, None in the others."""
    from image_search.image_index import update_index
    from models.pair import load_pair
    from runtime import distributed
    from runtime.image_files import FORMATS

    store_of(keeping.store).require()
    pair = load_pair(choice, pick_device(args.device), WHITE, FORMATS)
    with listening() as stop:
        # Processes do not wait for each other while they encode, so each can stop independently.
        encoder = dataclasses.replace(
            pair.encoder, batch_size=args.clip_bs, between=stop.check_alone
        )
        try:
            update = update_index(
                args.output,
                images,
                encoder,
                keeping=keeping,
                pair=made_with(choice, pair),
            )
            distributed.stop()
            return update
        except Stopped as stopped:
            raise Stopped(
                stopped.signal, "encoded features are kept: run the same command again to resume"
            ) from None


def report(folder: Path, update: "Update", images: "FoundImages") -> None:
    """Print the numbers of images and the recall of an approximate index, and log the files left out, with reasons."""
    for reason in update.unreadable.values():
        logger.warning("left out: %s", reason)
    for file, reason in images.left_out.items():
        logger.warning("left out: %s: %s", file, reason)
    for ending, count in sorted(images.skipped.items()):
        logger.warning(
            "left out: %d files of the unsupported type %s: convert them to .jpg or .png",
            count,
            ending,
        )
    added, kept, removed, moved = update.counts
    left_out = len(update.unreadable) + len(images.left_out)
    print(
        f"{printable(folder)}: {added} images added, {kept} kept, {removed} removed, {left_out} left out "
        "(unreadable)"
    )
    if moved:
        print(f"{moved} indexed images had moved and were recognised by their content")
    recall = (read_manifest(folder) or {}).get("recall against exact")
    if recall:
        print(
            f"recall@{recall['k']} against exact search: {recall['recall']:.3f} over {recall['queries']} queries"
        )


def run_query(args: argparse.Namespace) -> None:
    """Search an index, and print or write the results."""
    check_files(args)
    check_file_writable({"--html": args.html})
    check_index(args.index)
    choose_composition(args)

    from image_search.searcher import SearchQuery, load_searcher

    searcher = load_searcher(
        args.index, options.pair_choice(args), pick_device(args.device), args.store
    )
    query = SearchQuery(
        references=[] if args.image is None else [args.image],
        text=args.text or "",
        k=args.k,
        condition=args.filter,
        distinct=args.distinct,
        min_similarity=args.min_similarity,
    )
    (found,) = searcher.search([query])
    if found.note:
        logger.warning("note: %s", found.note)
    if args.json:
        print(json.dumps(as_json(found), indent=1))
    elif args.html:
        background = searcher.pair.encoder.preprocessing["background"]
        write_page(args.html, args.image, args.text or "", found, background=background)
    else:
        notes = marks(found)
        for rank, result in enumerate(found.results, start=1):
            path = printable(result.path)
            print(f"{rank:4} {result.similarity:.4f} {path}{notes[str(result.path)]}")


def choose_composition(args: argparse.Namespace) -> None:
    """Search by text or image alone if only one is given. Raises UserError if a necessary flag is missing."""
    if args.combining_function is None and args.combiner_path is None:
        if args.image is None and args.text is not None:
            args.combining_function = "text"
        elif args.text is None and args.image is not None:
            args.combining_function = "image"
    alone = args.combining_function
    if args.image is None and alone != "text":
        raise UserError(
            "--image is missing: pass the reference, or search by text alone with --combining-function text"
        )
    if not (args.text or "").strip() and alone != "image":
        fault = "missing" if args.text is None else "empty"
        raise UserError(
            f"--text is {fault}: pass what to change, or search by image alone with --combining-function image"
        )


def marks(found: "Found") -> dict[str, str]:
    """Map the path of each result to a mark: whether the file is gone, and the rank of the result it is a copy of."""
    ranks = {result.row: rank for rank, result in enumerate(found.results, start=1)}
    notes = {}
    for result in found.results:
        copy = "" if result.copy_of is None else f" (copy of {ranks[result.copy_of]})"
        notes[str(result.path)] = copy + (" (gone)" if result.is_gone else "")
    return notes


def write_page(
    file: Path, reference: Path | None, text: str, found: "Found", *, background: str
) -> None:
    """Write the results as an HTML page, with transparent images on a background colour."""
    from reports.sheets import results_page
    from runtime.image_files import thumbnail

    results = [(str(result.path), result.similarity) for result in found.results]
    shown = None if reference is None else str(reference)
    names = [name for name, _ in results] + ([shown] if shown else [])
    thumbnails = {name: thumbnail(Path(name), SIDE, background) for name in names}
    page = results_page(
        text, shown, results, about=about(found), thumbnails=thumbnails, marks=marks(found)
    )
    write_text(file, page)
    logger.info("%s: %d images", file, len(results))


def as_json(found: "Found") -> dict[str, Any]:
    """Return the results as plain types for JSON."""
    paths = {result.row: str(result.path) for result in found.results}
    results = []
    for result in found.results:
        copy_of = None if result.copy_of is None else paths[result.copy_of]
        results.append(
            {
                "image": str(result.path),
                "similarity": round(result.similarity, 6),
                "is_gone": result.is_gone,
                "copy_of": copy_of,
            }
        )
    return {"results": results, "gate": found.gate, "experts": found.experts, "note": found.note}


def about(found: "Found") -> str:
    """Return a line with the note on the query, the gate and the weights of the experts."""
    from reports.sheets import shares

    parts = [found.note] if found.note else []
    for name, share in shares(found.gate, found.experts).items():
        if share:
            parts.append(f"{name} {share:.2f}")
    return "; ".join(parts)


@command
def main(argv: list[str] | None = None) -> None:
    """Run the command, index or query."""
    args = parse(argv)
    if args.command == "index":
        make_index(args)
    else:
        run_query(args)


if __name__ == "__main__":
    main()
