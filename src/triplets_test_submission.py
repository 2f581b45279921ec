"""Write the results of the test queries of your own triplets: a JSON file, query's id -> the 50 nearest images.

    python src/triplets_test_submission.py --submission-name my_answers --combining-function combiner \
        --combiner-path models/THE_RUN --clip-model-path models/THE_OTHER_RUN

A query without an id goes by its number, the first is 0. With `--split val` it writes the same file for the validation
split, whose answers are known, and scores it.
"""

import argparse

from benchmarks.server_files import TripletsForm
from cli.submission import submission_parser, submit_as_asked
from utils import command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the answers."""
    return submission_parser(__doc__, TripletsForm.kind).parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Rank the split's gallery for every query, without its reference; exit code 1 if the file breaks a rule."""
    submit_as_asked(TripletsForm, parse(argv))


if __name__ == "__main__":
    main()
