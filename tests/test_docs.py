"""What the guides say: every command has flags that exist, every link leads somewhere, both languages say the same."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT
from utils import UserError

GUIDES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("[!.]*/README.md"))
BLOCK = re.compile(r"```(?:bash|console)\n(.*?)```", re.DOTALL)


def commands(guide: Path) -> list[list[str]]:
    """The words of each command of our scripts in a guide, from the script's name on."""
    text = "\n".join(BLOCK.findall(guide.read_text())).replace("\\\n", " ")
    found = (
        re.search(r"\bsrc/\w+\.py\b.*", line) for line in text.splitlines() if "python" in line or "torchrun" in line
    )
    return [shlex.split(line.group(), comments=True) for line in found if line]


def test_guides_have_commands():
    assert len(commands(ROOT / "README.md")) > 15
    assert len(commands(ROOT / "docs" / "tutorial.md")) > 10


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_commands_of_guides_have_flags_that_exist(guide, capsys):
    for script, *words in commands(guide):
        if "..." in words:
            continue
        try:
            importlib.import_module(Path(script).stem).parse(words)
        except UserError as error:
            assert "--resume" in words, error  # the run that it names is not here
        except SystemExit:
            raise AssertionError(f"{script} {shlex.join(words)}: {capsys.readouterr().err}") from None


def anchors(guide: Path) -> set[str]:
    """What links may name in a guide: its headings, as they are spelled in addresses."""
    headings = re.findall(r"^#+ (.*)", guide.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_links_of_guides_lead_somewhere(guide):
    for link in re.findall(r"\]\(\s*([^)]+?)\s*\)", guide.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            assert (guide.parent / file).exists(), link
            assert not anchor or anchor in anchors(guide.parent / file if file else guide), link


def test_both_languages_give_the_same_commands_and_numbers():
    own, other = (ROOT / "README.md"), (ROOT / "README.vi.md")
    assert commands(own) == commands(other)
    tables = [re.findall(r"\d+\.\d\d ± \d\.\d\d", guide.read_text()) for guide in (own, other)]
    assert tables[0] == tables[1] != []
