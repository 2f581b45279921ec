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
from pathlib import Path

from cli import options, startup
from image_search import vectors
from image_search.image_index import as_made, manifest, update_index
from image_search.photos import find_images, opened, thumbnail
from image_search.searcher import Found, load_searcher
from models.configuration import read_checkpoint, settle
from models.encoder import load_encoder
from reports import pages
from reports.sheets import results_page, shares
from runtime.files import check_file_writable, check_writable, write_text
from runtime.interruption import listening
from utils import Stopped, UserError, command

logger = logging.getLogger(__name__)

SIDE = 176  # pixels of an image on a page of answers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of both commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    clip = [options.clip_flags(), options.tuned_clip_flag()]
    index = commands.add_parser(
        "index", parents=[*clip, options.compute_flags()], help="encode a folder, or bring its index up to date"
    )
    index.add_argument("--images", type=Path, nargs="+", default=[], metavar="DIR", help="beside those it has already")
    index.add_argument("--forget", type=Path, nargs="+", default=[], metavar="DIR", help="folders to drop from it")
    index.add_argument("--output", type=Path, required=True, metavar="INDEX", help="a folder for the index")
    index.add_argument(
        "--index-type",
        choices=vectors.KINDS,
        help="flat is exact, the others are for large galleries (default: as it is, flat for a new one)",
    )
    index.add_argument("--clip-bs", type=options.positive_int, default=32, help="batch size of CLIP (default: 32)")
    query = commands.add_parser(
        "query", parents=[*options.search_flags(), *clip, options.compute_flags(False)], help="ask an index"
    )
    query.add_argument("--image", type=Path, required=True, metavar="REF", help="the reference")
    query.add_argument("--text", required=True, help="what to change")
    query.add_argument("--k", type=options.positive_int, default=10, help="answers (default: 10)")
    how = query.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the answers as JSON")
    how.add_argument("--html", type=Path, metavar="FILE", help="write a page of them")
    return parser.parse_args(argv)


def chosen_folders(held: list[str], named: list[Path], forgotten: list[Path], output: Path) -> list[Path]:
    """The folders that an index is to hold: those it has already and those that are named, but for forgotten ones."""
    gone = {path.resolve() for path in forgotten}
    for path in sorted(gone - set(map(Path, held))):
        raise UserError(
            f"--forget {path}: {output} does not hold it, but {', '.join(held) or 'nothing'}: name one of it"
        )
    chosen = sorted({*map(Path, held), *(path.resolve() for path in named)} - gone)
    if not chosen:
        raise UserError("--images: name a folder that holds images")
    return chosen


def make_index(args: argparse.Namespace) -> None:
    """Encode what is new, and say what was done."""
    check_writable({"--output": args.output})
    vectors.import_faiss()
    earlier = manifest(args.output) or {}
    folders = chosen_folders(earlier.get("folders", []), args.images, args.forget, args.output)
    images = find_images(folders)
    kind = args.index_type or earlier.get("kind", "flat")
    device = startup.pick_device(args.device)
    choice, path = as_made(earlier, options.clip_choice(args), args.clip_model_path)
    tuned = read_checkpoint("--clip-model-path", path, "CLIP")
    settings = settle(choice, [tuned])
    encoder = load_encoder(settings, tuned, device, args.num_workers, args.clip_bs, opened)
    pair = settings | {"clip_model_path": str(tuned.path.resolve()) if tuned else None}
    with listening() as stop:
        encoder = dataclasses.replace(encoder, between=stop.check)
        try:
            done = update_index(args.output, folders, images.paths, encoder, kind, pair)
        except Stopped as stopped:
            raise Stopped(stopped.signal, "what was encoded is kept: go on with the same command") from None
    for reason in [*done.unreadable.values(), *(f"{file}: {why}" for file, why in images.left_out.items())]:
        logger.warning("left out: %s", reason)
    for ending, count in sorted(images.skipped.items()):
        logger.warning("left out: %d files %s, which are not read: convert them to .jpg or .png", count, ending)
    left_out = len(done.unreadable) + len(images.left_out)
    print(f"{args.output}: {done.added} images added, {done.kept} kept, {done.removed} removed, ", end="")
    print(f"{left_out} left out that cannot be read")
    report = (manifest(args.output) or {}).get("recall against exact")
    if report:
        print(f"recall@{report['k']} against exact: {report['recall']:.3f} over {report['queries']} queries")


def ask(args: argparse.Namespace) -> None:
    """Answer a query."""
    check_file_writable({"--html": args.html})
    device = startup.pick_device(args.device)
    searcher = load_searcher(args.index, options.pair_choice(args), device)
    if not args.text.strip():
        raise UserError("--text is empty: say what to change")
    found = searcher.search(searcher.reference_features(args.image), args.text, args.k)
    if found.note:
        logger.warning("note: %s", found.note)
    if args.json:
        print(json.dumps(as_json(found), indent=1))
    elif args.html:
        answers = [(str(path), similarity) for path, similarity in found.answers]
        shown = {name: thumbnail(Path(name), SIDE) for name in (str(args.image), *(name for name, _ in answers))}
        small = {name: pages.thumbnail(image, SIDE) for name, image in shown.items()}
        write_text(args.html, results_page(args.text, str(args.image), answers, about(found), small))
        logger.info("%s: %d images", args.html, len(answers))
    else:
        for place, (path, similarity) in enumerate(found.answers, start=1):
            print(f"{place:4} {similarity:.4f} {path}")


def as_json(found: Found) -> dict:
    """What was found, in plain types."""
    answers = [{"image": str(path), "similarity": round(similarity, 6)} for path, similarity in found.answers]
    return {"answers": answers, "gate": found.gate, "experts": found.experts, "note": found.note}


def about(found: Found) -> str:
    """What the Combiner did, in a line."""
    parts = [found.note] if found.note else []
    parts += [f"{name} {share:.2f}" for name, share in shares(found.gate, found.experts).items() if share]
    return "; ".join(parts)


@command
def main(argv: list[str] | None = None) -> None:
    """Index or ask."""
    args = parse(argv)
    {"index": make_index, "query": ask}[args.command](args)


if __name__ == "__main__":
    main()
