"""Write the two submission files for CIRR's evaluation server from the test1 split, and check them.

    python src/cirr_test_submission.py --submission-name my_submission --combining-function combiner \
        --combiner-path models_final/combiner_trained_on_cirr --clip-model-path models_final/clip_finetuned_on_cirr

With `--split val` it writes the same files for the validation split, whose targets are known, and scores them.
"""

import argparse

from benchmarks.server_files import CirrForm
from cli.submission import submission_parser, submit_as_asked
from utils import command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a submission."""
    return submission_parser(__doc__, CirrForm.kind).parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Write the rankings of the split's gallery and of each query's group; exit with code 1 if a file breaks a rule."""
    submit_as_asked(CirrForm, parse(argv))


if __name__ == "__main__":
    main()
