"""The argument parser of all scripts, its help format and its actions."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils import DEBUG, PROJECT_ROOT, printable

COMMAND = 4 * " "  # indentation of a command
CONTINUED = " \\"  # end of each line of a command except the last
LONGEST_CHOICES = 40  # number of characters of choices that fit in a usage line
TOGETHER = r"'[^']*'|\"[^\"]*\"|--\S+ (?!-)"  # a line break may not split a quotation, or a flag and its value


class WithDefaults(argparse.HelpFormatter):
    """Help format that adds missing defaults to the help of flags, and wraps lines to the terminal's width."""

    def _get_help_string(self, action: argparse.Action) -> str:
        about = action.help or ""
        if _lists_choices(action):
            about += f"; choices: {', '.join(action.choices or ())}"
        default = in_words(action.default)
        if not default or action.required or not action.option_strings or "(default:" in about:
            return about
        return f"{about} (default: {default.replace('%', '%%')})"

    def _metavar_formatter(
        self, action: argparse.Action, default_metavar: str
    ) -> Callable[[int], tuple[str, ...]]:
        if _lists_choices(action):
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap paragraphs, and commands in such a way that they can be pasted into a shell."""
        lines: list[str] = []
        for paragraph in re.split(r"\n\n|\n(?= *python )|(?<=:)\n", text.replace("\\\n", "")):
            if paragraph.lstrip().startswith("python "):
                words = " ".join(paragraph.split())
                parts = textwrap.wrap(
                    re.sub(TOGETHER, lambda found: found[0].replace(" ", "\0"), words),
                    width - len(CONTINUED),
                    initial_indent=COMMAND,
                    subsequent_indent=2 * COMMAND,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                lines.append(f"{CONTINUED}\n".join(parts).replace("\0", " "))
            else:
                lines += ["", *textwrap.wrap(paragraph, width)]
        return "\n".join(lines).strip("\n")


def _lists_choices(action: argparse.Action) -> bool:
    """Check whether a flag's help should list its choices: several may be given, or they do not fit in a usage line."""
    if not action.choices or not action.option_strings:
        return False
    return action.nargs == "+" or len(",".join(map(str, action.choices))) > LONGEST_CHOICES


def in_words(default: Any) -> str:
    """Return a default as `--help` shows it; "" if the flag has no effect unless it is given."""
    if default is False or default in (None, "", [], argparse.SUPPRESS):
        return ""
    if isinstance(default, list):
        return " ".join(map(str, default))
    if isinstance(default, Path) and default.is_relative_to(PROJECT_ROOT):
        return f"{default.relative_to(PROJECT_ROOT)}/ in the project"
    return f"{default:g}" if isinstance(default, float) else str(default)


class ScriptParser(argparse.ArgumentParser):
    """Parser of a script, with `--debug`; its help consists of the script's docstring and the flags.

    Args:
        about: docstring of the script; None if Python was started with -OO.
    """

    def __init__(self, about: str | None = None, **settings: Any) -> None:
        description, _, examples = (about or "").strip().partition("\n")
        super().__init__(
            description=description,
            epilog=examples.strip("\n"),
            formatter_class=WithDefaults,
            **settings,
        )
        self.add_argument(
            DEBUG,
            action="store_true",
            default=argparse.SUPPRESS,
            help="on failure, also print the traceback",
        )

    typed: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and keep the arguments for the error message."""
        self.typed = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Reject a value that is not among a flag's choices, and suggest the most similar choice."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            known = {str(choice).casefold(): choice for choice in action.choices or ()}
            for likely in difflib.get_close_matches(str(value).casefold(), known, n=1):
                error.message += f": did you mean {known[likely]}?"
            raise

    def error(self, message: str) -> Any:
        """Print an error message on one line, and exit with code 2."""
        reason = printable(message)
        if any(word.isspace() for word in self.typed):
            reason += (
                "; whitespace after the \\ at the end of a line is passed as an argument: delete it"
            )
        self.exit(2, f"{self.prog}: error: {reason} (see --help)\n")


class ListModels(argparse.Action):
    """Action of a flag without a value: print the models that `--clip-model-name` accepts, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        nothing = argparse.SUPPRESS
        super().__init__(option_strings, nothing, nargs=0, default=nothing, **settings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from cli.model_list import model_list

        print(model_list())
        parser.exit()


class Alias(argparse.Action):
    """Action of a flag that replaces another flag, which is then no longer required.

    Args:
        other: `dest` of the other flag.
    """

    def __init__(self, *, other: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.other = other

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == self.other:
                action.required = False
