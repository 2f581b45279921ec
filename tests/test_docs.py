"""What the guides say: every command has flags that exist, every link leads somewhere, both languages say the same."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT
from utils import UserError

GUIDES = (
    sorted(ROOT.glob("*.md"))
    + sorted(ROOT.glob("docs/**/*.md"))
    + sorted(ROOT.glob("[!.]*/README.md"))
)
READMES = [ROOT / "README.md", ROOT / "README.vi.md"]
FOR_USERS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TRANSLATED = [
    "README",
    "docs/training",
    "docs/evaluation",
    "docs/search",
    "docs/own-data",
    "docs/tutorial",
    "docs/reproduce",
    "docs/internals/deviations",
]
LONGEST_README = 140  # lines; what needs more goes to docs/
BLOCK = re.compile(r"```(?:bash|console)\n(.*?)```", re.DOTALL)


def commands(guide: Path) -> list[list[str]]:
    """The words of each command of our scripts in a guide, from the script's name on."""
    text = "\n".join(BLOCK.findall(guide.read_text())).replace("\\\n", " ")
    found = (
        re.search(r"\bsrc/\w+\.py\b.*", line)
        for line in text.splitlines()
        if "python" in line or "torchrun" in line
    )
    return [shlex.split(line.group(), comments=True) for line in found if line]


def scripts() -> set[str]:
    """The names of all scripts."""
    return {
        file.stem
        for file in (ROOT / "src").glob("*.py")
        if '__name__ == "__main__"' in file.read_text()
    }


def test_guides_have_commands():
    fewest = {
        "README.md": 4,
        "docs/training.md": 7,
        "docs/evaluation.md": 9,
        "docs/search.md": 8,
        "docs/tutorial.md": 19,
        "docs/own-data.md": 10,
    }
    for guide, number in fewest.items():
        assert len(commands(ROOT / guide)) >= number, guide


@pytest.mark.parametrize("guide", FOR_USERS, ids=lambda guide: guide.name)
def test_guides_are_in_the_words_of_the_field(guide):
    """See docs/glossary.md; of the words that this project once had for itself, those with no other sense."""
    own = re.compile(r"(?i)\b(trainings|drawn data|image workers|(plain|slow) twins?|wings?)\b")
    assert [line for line in guide.read_text().splitlines() if own.search(line)] == []


def test_every_script_has_a_command_in_a_guide():
    assert {Path(words[0]).stem for guide in GUIDES for words in commands(guide)} == scripts()


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.name)
def test_readmes_are_short(readme):
    assert len(readme.read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_files_that_guides_name_exist(guide):
    text = re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL)
    for name in re.findall(r"\b((?:src|bench|tests|docs)/[\w./-]*\w)", text):
        assert (ROOT / name).exists() or (guide.parent / name).exists(), name


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_commands_of_guides_have_flags_that_exist(guide, capsys):
    for script, *words in commands(guide):
        if "..." in words:
            continue
        try:
            importlib.import_module(Path(script).stem).parse(words)
        except UserError as error:
            assert "--resume" in words, error  # the run that it names is not here
        except SystemExit as stop:  # with 0 where a flag prints and ends, as --list-models
            assert stop.code == 0, f"{script} {shlex.join(words)}: {capsys.readouterr().err}"


def anchors(guide: Path) -> set[str]:
    """What links may name in a guide: its headings, as they are spelled in addresses."""
    headings = re.findall(r"^#+ (.*)", guide.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_links_of_guides_lead_somewhere(guide):
    for link in re.findall(r"\]\(\s*([^)]+?)\s*\)", guide.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            assert (guide.parent / file).exists(), link
            assert not anchor or anchor in anchors(guide.parent / file if file else guide), link


def both_languages(name: str) -> tuple[Path, Path]:
    """A guide in English and in Vietnamese."""
    return ROOT / f"{name}.md", ROOT / f"{name}.vi.md"


# What keeps its form in every language: code, addresses, versions, numbers of papers.
AS_IT_IS = r"```.*?```|`[^`]*`|\]\([^)]*\)|\w+://\S+|(?:arXiv|Python|BY-SA)\s[\d.]+"


def in_english_form(guide: Path) -> str:
    """A guide's text, with Vietnamese numbers (20.000 and 4,5) as English has them."""
    text = guide.read_text()
    if not guide.name.endswith(".vi.md"):
        return text
    return re.sub(
        rf"({AS_IT_IS})|(?<=\d)[.,](?=\d)",
        lambda found: found[1] or ("," if found[0] == "." else "."),
        text,
        flags=re.DOTALL,
    )


def numbers(text: str) -> list[str]:
    """All numbers in a text, in its order."""
    return re.findall(r"\d[\d.,]*\d|\d", text)


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_give_the_same_commands_and_numbers(name):
    own, other = both_languages(name)
    assert commands(own) == commands(other)
    texts = [in_english_form(guide) for guide in (own, other)]
    assert sorted(numbers(texts[0])) == sorted(
        numbers(texts[1])
    )  # a sentence may give them in another order
    tables = ["\n".join(re.findall(r"^\|.*", text, re.MULTILINE)) for text in texts]
    assert numbers(tables[0]) == numbers(tables[1])


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_headings(name):
    texts = [
        re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL)
        for guide in both_languages(name)
    ]
    levels = [re.findall(r"^#+(?= )", text, re.MULTILINE) for text in texts]
    assert levels[0] == levels[1] != []


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_name_each_other_at_the_top(name):
    own, other = both_languages(name)
    for guide, twin in ((own, other), (other, own)):
        before_the_first_part = guide.read_text().partition("\n## ")[0]
        assert f"]({twin.name})" in before_the_first_part
