"""Write the test results for your own triplets: a JSON file that maps each query's id to its 50 nearest images.

    python src/triplets_test_submission.py --submission-name my_answers --combining-function combiner \
        --combiner-path models/THE_RUN --clip-model-path models/THE_OTHER_RUN

A query without an id is identified by its index, starting at 0. With `--split val` the script writes the same file for
the validation split, whose targets are known, and scores it.
"""

import argparse

from benchmarks.server_files import TripletsForm
from cli.submission import submission_parser, submit_as_asked
from utils import command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the test results."""
    return submission_parser(__doc__, TripletsForm.kind).parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Write the rankings of the split's gallery, references excluded; exit with code 1 if the file breaks a rule."""
    submit_as_asked(TripletsForm, parse(argv))


if __name__ == "__main__":
    main()
