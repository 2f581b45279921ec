"""What every script parses its flags with."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any

from utils import DEBUG, printable


class WithDefaults(argparse.HelpFormatter):
    """Ends the help of a flag with its default, unless the help says what that is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        about = action.help or ""
        default = action.default
        is_switch = isinstance(action, argparse._StoreConstAction)
        has_none = default is argparse.SUPPRESS or (is_switch and default is not False)
        if has_none or action.required or not action.option_strings or "(default:" in about:
            return about
        return f"{about} (default: {in_words(default).replace('%', '%%')})".lstrip()


def in_words(default: Any) -> str:
    """A default as `--help` says it."""
    if default is None or default == []:
        return "none"
    if default is False:
        return "off"
    if isinstance(default, list):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


class ScriptParser(argparse.ArgumentParser):
    """The parser of a script: it describes it by the first line of its docstring, and knows `--debug`.

    Args:
        about: the docstring; Python started with -OO has none.
    """

    def __init__(self, about: str | None = None, **settings: Any) -> None:
        description = about.strip().splitlines()[0] if about else None
        super().__init__(description=description, formatter_class=WithDefaults, **settings)
        self.add_argument(
            DEBUG,
            action="store_true",
            default=argparse.SUPPRESS,
            help="where it fails, print all of what Python says too",
        )

    typed: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and keep what was typed for the message if that fails."""
        self.typed = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is none of a flag's choices, and name the one that was meant."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            known = {str(choice).casefold(): choice for choice in action.choices or ()}
            for likely in difflib.get_close_matches(str(value).casefold(), known, n=1):
                error.message += f": did you mean {known[likely]}?"
            raise

    def error(self, message: str) -> Any:
        """Print a message in one line, whatever was typed, and end with exit code 2."""
        reason = printable(message)
        if any(word.isspace() for word in self.typed):
            reason += "; a blank behind the \\ at the end of a line is a word of its own: delete the blank"
        self.exit(2, f"{self.prog}: error: {reason} (see --help)\n")


class ListModels(argparse.Action):
    """A flag without a value that prints the models that `--clip-model-name` takes, and ends."""

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
    """A flag that says what another one says, which then need not be given.

    Args:
        other: the other flag's name for its value.
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
