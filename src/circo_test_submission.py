"""Write the submission file for CIRCO's evaluation server from the test split, and check it.

    python src/circo_test_submission.py --submission-name my_submission --combining-function combiner \
        --combiner-path models_final/combiner_trained_on_cirr --clip-model-path models_final/clip_finetuned_on_cirr

With `--split val` it writes the same file for the validation split, whose targets are known, and scores it.
"""

import argparse

from benchmarks.server_files import CircoForm
from cli.options import add_protocol
from cli.submission import submission_parser, submit_as_asked
from utils import command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a submission."""
    parser = submission_parser(__doc__, CircoForm.kind)
    add_protocol(
        parser,
        help="protocol of the submission; protocols differ in the text of the queries and in whether the reference may "
        "be retrieved",
    )
    args = parser.parse_args(argv)
    if args.protocol and len(args.protocol) > 1:
        parser.error("--protocol: a submission uses only one protocol: choose one")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    """Write the results of every query, ranked from the split's gallery; exit with code 1 if the file breaks a rule."""
    submit_as_asked(CircoForm, parse(argv))


if __name__ == "__main__":
    main()
