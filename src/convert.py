"""Convert the annotation files of FashionIQ, CIRR, LaSCo or Shoes to the format for your own triplets.

    python src/convert.py --dataset LaSCo --output-dir lasco
    python src/clip_fine_tune.py --dataset Triplets --data-root lasco

FashionIQ and CIRR are read from the same folders as for training on them, and FashionIQ's three galleries become one.
LaSCo and Shoes need one folder each for the files of their repository and the images: lasco_dataset/ with
lasco_{train,val}.json, lasco_val_corpus.json, train2014/ and val2014/; shoes_dataset/ with
relative_captions_shoes.json, {train,eval}_im_names.txt and womens_*/. Images are linked, not copied.
"""

import argparse
import json
import logging

from benchmarks import Triplets
from benchmarks.published import SOURCES, usable
from cli.parsers import ScriptParser
from runtime.files import check_new_or_empty, check_writable, folder_made_beside, write_text
from settings import groups
from settings.declaring import parent
from settings.flag_types import in_any_case, usable_path
from utils import UserError, command

logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the conversion."""
    parser = ScriptParser(__doc__, parents=[parent(groups.Data)])
    parser.add_argument(
        "--dataset",
        type=in_any_case(SOURCES),
        choices=list(SOURCES),
        required=True,
        help="benchmark whose annotation files are converted (not case-sensitive)",
    )
    parser.add_argument(
        "--output-dir",
        type=usable_path,
        required=True,
        metavar="DIR",
        help="output folder for the triplets, to be passed as --data-root",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Write the triplets and the gallery of each split, and link the images."""
    args = parse(argv)
    name, read = SOURCES[args.dataset]
    source = args.data_root / name
    made = args.output_dir / Triplets.folder
    check_new_or_empty("--output-dir", made)
    check_writable({"--output-dir": args.output_dir})
    splits = {split: usable(split, converted) for split, converted in read(source).items()}
    if not splits:
        raise UserError(f"{source} has no annotation files: add them, or set --data-root")
    with folder_made_beside(made) as folder:
        (folder / "images").symlink_to(source.resolve(), target_is_directory=True)
        for split, converted in splits.items():
            lines = map(json.dumps, converted.lines)
            write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
            if converted.gallery:
                gallery = "\n".join(converted.gallery)
                write_text(folder / f"gallery.{split}.txt", gallery + "\n")
    for split, converted in splits.items():
        logger.info("%s: %d queries", made / f"{split}.jsonl", len(converted.lines))


if __name__ == "__main__":
    main()
