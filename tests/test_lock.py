"""The locked versions: they hold all that is required, within its bounds, and are what runs here."""

import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement

from conftest import ROOT

LISTS = (
    "requirements.txt",
    "requirements-app.txt",
    "requirements-demo.txt",
    "requirements-lora.txt",
    "requirements-milvus.txt",
    "requirements-open-clip.txt",
    "requirements-trackers.txt",
    "requirements-dev.txt",
)


def lines(name: str) -> list[str]:
    """The requirements of a file, without comments, hashes and references to other files."""
    text = (ROOT / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-r", " "))]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


LOCKED = {
    canonical(name): version
    for name, version in (line.rstrip(" \\").split("==") for line in lines("requirements.lock"))
}


def test_every_locked_version_has_the_hashes_of_its_files():
    """pip then installs nothing else, as from a mirror that was tampered with."""
    blocks = re.split(r"\n(?=[\w.-]+==)", (ROOT / "requirements.lock").read_text())[1:]
    assert len(blocks) == len(LOCKED)
    for block in blocks:
        hashes = block.splitlines()[1:]
        assert hashes, block
        for line in hashes:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), block


@pytest.mark.parametrize("name", LISTS)
def test_the_lock_keeps_all_bounds(name):
    for line in lines(name):
        requirement = Requirement(line)
        assert requirement.specifier.contains(LOCKED[canonical(requirement.name)]), line


def test_the_lock_holds_what_the_required_packages_require():
    """Guards against a package that a new version of another needs, and that nobody locked."""
    required = [Requirement(line).name for name in LISTS for line in lines(name)]
    for name in required:
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies:
                assert canonical(requirement.name) in LOCKED, f"{name} needs {line}"
