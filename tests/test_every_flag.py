"""Rules for the flags of all scripts, found by walking their parsers: a new flag is held to them too.

What decides about a flag's values is its type: values are tried on one flag of each, and on all in `make soak`.
"""

import argparse
import importlib
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.parsers import ScriptParser
from conftest import CASES, ROOT, one_of_each_kind
from settings.flag_types import Several, model_name, pair_place, path_or_auto, usable_path

SCRIPTS = sorted(
    file.stem for file in (ROOT / "src").glob("*.py") if "@command" in file.read_text()
)
PATH_TYPES = (usable_path, path_or_auto, pair_place, model_name)


def takes_number(action: argparse.Action) -> bool:
    """Whether a flag is of a type that `number` or `whole_number` made."""
    name = getattr(action.type, "__qualname__", "")
    return name in ("whole_number.<locals>.number", "number.<locals>.number")


class Built(Exception):
    """A parser on its way to what was typed."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script builds."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Built(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Built) as built:
            importlib.import_module(script).parse([])
    return built.value.args[0]


def parsers(script: str) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """The parser of each command of a script, with the words that choose it."""
    parser = parser_of(script)
    commands = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    if not commands:
        yield [], parser
    for action in commands:
        for word, inner in action.choices.items():
            yield [word], inner


# Words of this project's own where the field has one: results, query, besides, again, training runs, resume, synthetic.
PRIVATE_WORDS = re.compile(
    r"(?i)\b(answers|ask|question|beside|anew|trainings|goes? on|drawn data|image workers|wings?)\b"
)


def flags_where(chosen: Callable[[argparse.Action], bool]) -> list:
    """A case for each flag of each command: the parser, and the flag's action."""
    cases = []
    for script in SCRIPTS:
        for words, parser in parsers(script):
            for action in parser._actions:
                if chosen(action):
                    name = action.option_strings[-1] if action.option_strings else action.dest
                    label = " ".join([script, *words, name])
                    cases.append(pytest.param(parser, action, id=label))
    return cases


def kind_of(case) -> tuple:
    """What decides how a flag takes a value: its type but for its bounds, and how many values there are."""
    _, action = case.values
    type_of_value = getattr(action.type, "__qualname__", None)
    return (
        type_of_value,
        action.nargs,
        type(action),
        action.choices is None,
        not action.option_strings,
    )


def typed(action: argparse.Action, text: str) -> list[str]:
    """A flag with a value as it is typed."""
    if not action.option_strings:
        return ["--", text]
    if isinstance(action.nargs, int):
        return [action.option_strings[-1], *[text] * action.nargs]
    return [f"{action.option_strings[-1]}={text}"]


@pytest.fixture
def refusal(capsys):
    """The one line in which a parser refuses a value; None where it takes it."""

    def refusal(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> str | None:
        capsys.readouterr()
        # What else is required is left out: a bad value is found first.
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(typed(action, text))
            raise SystemExit(0)
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if "required" not in line]
        if not said:
            return None
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].isprintable()
        return lines[0]

    return refusal


NUMBERS = flags_where(takes_number)
PATHS = flags_where(lambda action: action.type in PATH_TYPES)
VALUES = flags_where(lambda action: action.nargs != 0 and action.dest != "help")
NO_NUMBERS = (
    "", " ", "x", "nan", "-nan", "inf", "-inf", "Infinity", "-1", "-0.5", "1e300", "-1e300", "1e31", "9" * 30,
    "9" * 5000, "0x10", "1,5", "1;2", "1 2", "１２ ３", "\x1b[31m", "1\n2", "true", "None",
)  # fmt: skip


@pytest.mark.parametrize(("parser", "action"), one_of_each_kind(NUMBERS, kind_of))
def test_every_flag_that_takes_a_number_has_bounds(parser, action, refusal):
    below_zero = {"-1", "-0.5"} if action.dest == "min_similarity" else set()  # may be a cosine
    for text in (text for text in NO_NUMBERS if text not in below_zero):
        line = refusal(parser, action, text)
        assert line is not None, text
        assert action.option_strings[-1] in line
        is_missing = isinstance(action.nargs, int) and text.startswith(
            "-"
        )  # taken for another flag
        assert is_missing or " from " in line  # the bounds
        CASES["values of flags that take a number", "refused"] += 1


def test_no_number_is_taken_without_bounds():
    """Guards against a flag that Python's own int or float converts, which take anything."""
    assert len(NUMBERS) > 100
    for case in VALUES:
        _, action = case.values
        assert action.type not in (int, float, complex), case.id
        is_number = isinstance(action.default, int | float) and not isinstance(action.default, bool)
        assert not is_number or takes_number(action), case.id


@pytest.mark.parametrize(("parser", "action"), one_of_each_kind(PATHS, kind_of))
def test_every_flag_that_takes_a_path_refuses_what_no_file_can_be_called(
    parser, action, refusal, tmp_path
):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    names = (
        "", "a" * 256, "é" * 128, "a/" * 2500, "nul\0byte", "half\udcff", f"{loop}", f"{loop}/x",
        f"{tmp_path}/\udcff/x", "~nobody-of-this-name/x",
    )  # fmt: skip
    for name in names:
        line = refusal(parser, action, name)
        assert line is not None, name
        assert not action.option_strings or action.option_strings[-1] in line
        CASES["values of flags that take a path", "refused"] += 1


@pytest.mark.parametrize(("parser", "action"), one_of_each_kind(PATHS, kind_of))
def test_every_flag_that_takes_a_path_knows_the_home_folder(parser, action, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(action.type("~/x")) == str(tmp_path / "x")
    assert str(action.type("a b/~")) == "a b/~"


def test_no_path_is_taken_as_it_is():
    assert len(PATHS) > 60
    for case in VALUES:
        _, action = case.values
        assert action.type is not Path, case.id
        is_path = isinstance(action.default, Path) or action.metavar in ("FILE", "DIR", "PATH")
        assert not is_path or action.type in PATH_TYPES, case.id


SEVERAL = flags_where(lambda action: action.nargs == "+" and bool(action.option_strings))


@pytest.mark.parametrize(("parser", "action"), one_of_each_kind(SEVERAL, kind_of))
def test_every_flag_that_takes_several_values_may_be_given_again(parser, action, tmp_path):
    """None is dropped, and a default is not among them."""
    one, other = ["0", "1"] if action.choices is None else list(action.choices)[:2]
    name = action.option_strings[-1]
    namespace = argparse.Namespace(**{action.dest: action.default})
    required = parser._actions
    try:
        parser._actions = [action]
        args = parser.parse_args([name, one, name, other], namespace)
    finally:
        parser._actions = required
    wanted = [one, other] if action.type is None else [action.type(one), action.type(other)]
    assert getattr(args, action.dest) == wanted


def test_no_flag_that_takes_several_values_forgets_the_earlier():
    assert SEVERAL
    for case in SEVERAL:
        _, action = case.values
        assert isinstance(action, Several), case.id


@pytest.mark.parametrize(("parser", "action"), one_of_each_kind(VALUES, kind_of))
def test_no_value_reaches_the_terminal_as_it_is(parser, action, refusal):
    """Line breaks and escape sequences of what was typed are spelled out; see `refusal`."""
    for text in ("\x1b[31mred\x1b[0m", "two\nlines", "\x07", "\u202e", "\udcff", "a\rb"):
        line = refusal(parser, action, text)
        assert line is None or text not in line
        CASES["values of any flag", "taken" if line is None else "refused"] += 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_knows_debug(script):
    for _, parser in parsers(script):
        assert isinstance(parser, ScriptParser)
        assert "--debug" in parser.format_help()


def test_help_says_of_every_flag_what_it_is_and_its_default():
    for case in flags_where(lambda action: True):
        parser, action = case.values
        told = parser._get_formatter()._expand_help(action)
        assert action.help and not told.startswith(("(default", "of ", "in ", "that ")), case.id
        does_nothing = action.required or action.default in (None, False, "", [], "==SUPPRESS==")
        assert told.count("(default: ") == 1 or does_nothing, (case.id, told)
        assert not re.search(r"\(default: (none|off)?\)", told), (case.id, told)


def test_help_is_in_the_words_of_the_field():
    """See docs/glossary.md. It names no absolute path as a default, which is one of this machine."""
    for case in flags_where(lambda action: True):
        parser, action = case.values
        told = parser._get_formatter()._expand_help(action)
        assert not PRIVATE_WORDS.search(told), (case.id, told)
        assert not told.startswith(("what ", "where ", "how ", "which ", "whether ")), case.id
        assert not re.search(r"\(default: (/|[A-Z]:\\)", told), (case.id, told)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_the_terminal_and_the_commands_in_it_can_be_pasted(script, columns, monkeypatch):
    """Every command of the docstring is in it, as a shell would read it, and no place of this machine."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for words, parser in parsers(script):
        told = parser.format_help()
        assert max(map(len, told.splitlines())) <= columns, (script, words)
        assert str(ROOT) not in told, (script, words)
    lines = parser_of(script).format_help().replace("\\\n", " ").splitlines()
    shown = [shlex.split(line, comments=True) for line in lines if line.startswith("    python")]
    typed = importlib.import_module(script).__doc__.replace("\\\n", " ")
    for command in re.findall(r"^ *(python .*)", typed, re.M):
        assert shlex.split(command, comments=True) in shown


def test_a_default_that_nobody_wrote_down_is_said(capsys):
    for typed_help in ("", "half of %% "):
        parser = ScriptParser("A script.")
        parser.add_argument("--share", default=2e-6, help=f"{typed_help}a share")
        parser.add_argument("--seed", default=0, help="a seed")
        parser.add_argument("--places", nargs="+", default=["100%", "b"], help="places")
        parser.add_argument("--folder", default=ROOT / "runs", help="a folder")
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        told = " ".join(capsys.readouterr().out.split())
        for end in (
            "a share (default: 2e-06)",
            "a seed (default: 0)",
            "places (default: 100% b)",
            "a folder (default: runs/ in the project)",
        ):
            assert end in told


@pytest.mark.parametrize(
    ("parser", "action"),
    one_of_each_kind(
        flags_where(lambda action: action.choices is not None and action.option_strings), kind_of
    ),
)
def test_a_slip_in_a_choice_is_told(parser, action, refusal):
    for choice in action.choices:
        slips = [str(other)[:3].lower() + str(other)[4:] for other in action.choices]
        slip = str(choice)[:3].lower() + str(choice)[4:]
        if isinstance(choice, str) and len(choice) > 4 and slips.count(slip) == 1:
            assert f"did you mean {choice}?" in refusal(parser, action, slip)
            break
    else:
        pytest.skip("its choices are too short to be told by a slip")


def test_a_path_is_found_in_both_forms_of_an_accent(tmp_path):
    composed, apart = (
        tmp_path / unicodedata.normalize(form, "ảnh/áo.jpg") for form in ("NFC", "NFD")
    )
    apart.parent.mkdir()
    apart.touch()
    assert usable_path(str(composed)) == apart
    assert usable_path(str(apart)) == apart
    assert usable_path(str(composed.with_name("khác"))) == apart.with_name("khác")
