"""Search your own images: index any folder, then ask with a reference image and what to change.

    python src/search.py index --images photos/ --output photos_index --clip-model-path models_final/clip_finetuned
    python src/search.py query --index photos_index --image photos/shirt.jpg --text "is red and has no sleeves" \\
        --combiner-path models_final/combiner_trained

`index --output photos_index` brings it up to date: it adds what is new and drops what is gone. Interrupted, it goes on
where it was.
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
from settings.flag_types import Several, usable_path
from settings.groups import PairChoice
from utils import Stopped, UserError, command, printable

if TYPE_CHECKING:
    from image_search.image_index import Update
    from image_search.photos import FoundImages
    from image_search.searcher import Found
    from image_search.stores.base import Keeping

logger = logging.getLogger(__name__)

SIDE = 176  # pixels of an image on a page of answers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of both commands."""
    parser: argparse.ArgumentParser = ScriptParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    clip = [options.clip_flags(), parent(groups.TunedClip)]
    index = commands.add_parser(
        "index",
        parents=[options.exported_flag(), *clip, options.compute_flags()],
        help="encode a folder, or bring its index up to date",
    )
    index.add_argument(
        "--images",
        type=usable_path,
        nargs="+",
        action=Several,
        default=[],
        metavar="DIR",
        help="beside those it has already",
    )
    index.add_argument(
        "--forget",
        type=usable_path,
        nargs="+",
        action=Several,
        default=[],
        metavar="DIR",
        help="folders to drop from it",
    )
    index.add_argument(
        "--output", type=usable_path, required=True, metavar="INDEX", help="a folder for the index"
    )
    add_keeping(index)
    options.add_verify(
        index,
        help="tell changed images by all of their bytes; an index that told them otherwise is encoded anew (default: "
        "as it is; a new one by size, modification time and the first, middle and last 4 KiB, in Milvus by size and "
        "time)",
    )
    options.add_clip_batch_size(index, help="batch size of CLIP")
    query = commands.add_parser(
        "query",
        parents=[*options.search_flags(), *clip, options.compute_flags(False)],
        help="ask an index",
    )
    query.add_argument(
        "--image", type=usable_path, required=True, metavar="REF", help="the reference"
    )
    query.add_argument("--text", required=True, help="what to change")
    options.add_k(query, default=10)
    query.add_argument(
        "--filter",
        default="",
        metavar="CONDITION",
        help="of an index in Milvus, in its language over path, category, size and time: 'path like \"shoes/%%\"'",
    )
    how = query.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the answers as JSON")
    how.add_argument("--html", type=usable_path, metavar="FILE", help="write a page of them")
    return parser.parse_args(argv)


def add_keeping(index: argparse.ArgumentParser) -> None:
    """How and where the index is kept."""
    kinds = [kind for store in all_stores() for kind in store.kinds]
    index.add_argument(
        "--index-type",
        choices=dict.fromkeys(kinds),
        help="flat is exact, the others are for large galleries (default: as it is, flat for a new one)",
    )
    options.add_store(
        index,
        help=f"{all_addresses()}; faiss are files, and a server of Milvus gets MILVUS_TOKEN of the environment "
        "(default: as it is, faiss for a new one)",
    )
    index.add_argument(
        "--on-disk",
        action=argparse.BooleanOptionalAction,
        help="leave the lists of ivfpq in a file (default: as it is, in memory for a new one)",
    )


def chosen_folders(
    held: Sequence[str], named: Sequence[Path], forgotten: Sequence[Path], output: Path
) -> list[Path]:
    """The folders that an index is to hold: those it has already and those that are named, but for forgotten ones."""
    gone = {path.resolve() for path in forgotten}
    for path in sorted(gone - set(map(Path, held))):
        raise UserError(
            f"--forget {path}: {output} does not hold it, but {', '.join(held) or 'nothing'}: name one of it"
        )
    chosen = sorted({*map(Path, held), *(path.resolve() for path in named)} - gone)
    if not chosen:
        raise UserError("--images: name a folder that holds images")
    for folder in chosen:
        if not folder.is_dir():
            raise UserError(
                f"--images {folder} is no folder: name one that holds images, or drop it from the index with --forget"
            )
    return chosen


def make_index(args: argparse.Namespace) -> None:
    """Encode what is new, and say what was done."""
    check_files(args)
    check_writable({"--output": args.output})
    earlier = read_manifest(args.output) or {}
    folders = chosen_folders(earlier.get("folders", []), args.images, args.forget, args.output)
    keeping = chosen_keeping(earlier, args.store, args.index_type, args.on_disk, verify=args.verify)

    from image_search.photos import FoundImages, find_images

    # One process looks; the others are told what to encode.
    told_by = keeping.told_by
    images = find_images(folders, told_by) if torchrun.is_first() else FoundImages()
    # Its CLIP alone is needed.
    named = PairChoice(
        combining_function="sum",
        clip_path=args.clip_model_path,
        combiner_path=None,
        exported=args.pair,
        clip=groups.Clip.of(args),
        workers=args.num_workers,
    )
    choice = as_made(args.output, earlier, named)
    update = encode_images(args, folders, images, choice=choice, keeping=keeping)
    if update is not None:
        report(args.output, update, images)


def encode_images(
    args: argparse.Namespace,
    folders: Sequence[Path],
    images: "FoundImages",
    *,
    choice: PairChoice,
    keeping: "Keeping",
) -> "Update | None":
    """Bring the index up to date with the CLIP of a pair. One of several processes knows what was done."""
    from image_search.image_index import update_index
    from models.pair import load_pair
    from runtime import distributed
    from runtime.image_files import FORMATS

    store_of(keeping.store).require()
    pair = load_pair(choice, pick_device(args.device), WHITE, FORMATS)
    with listening() as stop:
        # None waits for another while it encodes, so that each can stop by itself.
        encoder = dataclasses.replace(
            pair.encoder, batch_size=args.clip_bs, between=stop.check_alone
        )
        try:
            update = update_index(
                args.output,
                images.files,
                encoder,
                folders=folders,
                keeping=keeping,
                pair=made_with(choice, pair),
            )
            distributed.stop()
            return update
        except Stopped as stopped:
            raise Stopped(
                stopped.signal, "what was encoded is kept: go on with the same command"
            ) from None


def report(folder: Path, update: "Update", images: "FoundImages") -> None:
    """Say what was left out and why, how many images there are, and how much of the exact answer the index finds."""
    for reason in update.unreadable.values():
        logger.warning("left out: %s", reason)
    for file, reason in images.left_out.items():
        logger.warning("left out: %s: %s", file, reason)
    for ending, count in sorted(images.skipped.items()):
        logger.warning(
            "left out: %d files %s, which are not read: convert them to .jpg or .png", count, ending
        )
    added, kept, removed = update.counts
    left_out = len(update.unreadable) + len(images.left_out)
    print(
        f"{printable(folder)}: {added} images added, {kept} kept, {removed} removed, {left_out} left out "
        "that cannot be read"
    )
    recall = (read_manifest(folder) or {}).get("recall against exact")
    if recall:
        print(
            f"recall@{recall['k']} against exact: {recall['recall']:.3f} over {recall['queries']} queries"
        )


def ask(args: argparse.Namespace) -> None:
    """Answer a query."""
    check_files(args)
    check_file_writable({"--html": args.html})
    check_index(args.index)
    if not args.text.strip():
        raise UserError("--text is empty: say what to change")

    from image_search.searcher import load_searcher

    searcher = load_searcher(
        args.index, options.pair_choice(args), pick_device(args.device), args.store
    )
    reference = searcher.reference_features(args.image)
    found = searcher.search(reference, args.text, args.k, args.filter)
    if found.note:
        logger.warning("note: %s", found.note)
    if args.json:
        print(json.dumps(as_json(found), indent=1))
    elif args.html:
        background = searcher.pair.encoder.preprocessing["background"]
        write_page(args.html, args.image, args.text, found, background)
    else:
        for place, (path, similarity) in enumerate(found.answers, start=1):
            print(f"{place:4} {similarity:.4f} {printable(path)}")


def write_page(file: Path, reference: Path, text: str, found: "Found", background: str) -> None:
    """Write the answers as a page of its own, transparent images on a background."""
    from reports.sheets import results_page
    from runtime.image_files import thumbnail

    answers = [(str(path), similarity) for path, similarity in found.answers]
    names = [str(reference), *(name for name, _ in answers)]
    thumbnails = {name: thumbnail(Path(name), SIDE, background) for name in names}
    write_text(
        file, results_page(text, str(reference), answers, about=about(found), thumbnails=thumbnails)
    )
    logger.info("%s: %d images", file, len(answers))


def as_json(found: "Found") -> dict[str, Any]:
    """What was found, in plain types."""
    answers = [
        {"image": str(path), "similarity": round(similarity, 6)}
        for path, similarity in found.answers
    ]
    return {"answers": answers, "gate": found.gate, "experts": found.experts, "note": found.note}


def about(found: "Found") -> str:
    """What the Combiner did, in a line."""
    from reports.sheets import shares

    parts = [found.note] if found.note else []
    for name, share in shares(found.gate, found.experts).items():
        if share:
            parts.append(f"{name} {share:.2f}")
    return "; ".join(parts)


@command
def main(argv: list[str] | None = None) -> None:
    """Index or ask."""
    args = parse(argv)
    if args.command == "index":
        make_index(args)
    else:
        ask(args)


if __name__ == "__main__":
    main()
