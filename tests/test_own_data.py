"""The guide to one's own data, line by line: every command is run, and prints what the guide says."""

import csv
import importlib
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

GUIDE = ROOT / "docs" / "own-data.md"
CPU = "--device cpu --num-workers 0"
# As small as it goes; where a flag is given twice, the second one holds.
SMALL = {
    "check_dataset": "--num-workers 0",
    "clip_fine_tune": f"{CPU} --num-epochs 1 --no-image-cache",
    "combiner_train": f"{CPU} --num-epochs 1 --no-feature-cache --projection-dim 16 --hidden-dim 24",
    "search": "--device cpu",
    "triplets_test_submission": CPU,
    "validate": CPU,
    "visualize": CPU,
}
ROWS = 250


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def steps() -> list[tuple[str, list[str]]]:
    """Each command of the guide, with what it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks("console")).replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line:
            found[-1][1].append(line)
    return found


def spaced(line: str) -> str:
    """A line with single spaces: columns are as wide as their numbers."""
    return " ".join(line.split())


@pytest.fixture
def shop(drawn, tmp_path, monkeypatch) -> None:
    """Photos, and a spreadsheet that begins as that of the guide."""
    monkeypatch.chdir(tmp_path)
    Path("emoji").symlink_to(drawn)
    (sheet,) = blocks("csv")
    header, *rows = csv.reader(sheet.splitlines())
    names = sorted(set(re.findall(r"\w+/\d+\.jpg", sheet)))
    names += [f"boots/{number}.jpg" for number in range(100, 150)]
    images = sorted((drawn / "triplets_dataset" / "images").rglob("*.jpg"))
    for name, image in zip(names, images, strict=False):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, Path("photos", name))
    rng = random.Random(0)
    for number in range(ROWS):
        reference, *targets = rng.sample(names, rng.choice((2, 3)))
        rows.append([reference, f"is red, and {number} larger", " | ".join(targets)])
    with Path("products.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.mark.long
def test_every_line_of_the_guide(shop, drawn, capsys, caplog):
    caplog.set_level("INFO")
    for command, expected in steps():
        if not command.startswith("python "):
            subprocess.run(["bash", "-ec", command], check=True)
            continue
        words = []
        for word in shlex.split(command.replace("RN50x4", str(drawn / "tiny_clip_vit.pt"))):
            words += map(str, Path().glob(word)) if "*" in word else [word]
        script = Path(words[1]).stem
        extra = SMALL.get(script, "").split()
        if "index" in words:
            extra += ["--num-workers", "0"]
        capsys.readouterr()
        caplog.clear()
        importlib.import_module(script).main([*words[2:], *extra])
        said = "\n".join([*capsys.readouterr(), *caplog.messages])
        printed = [spaced(line) for line in said.splitlines()]
        for line in expected:
            pattern = re.escape(spaced(line)).replace(re.escape("..."), ".*")
            assert any(re.fullmatch(pattern, own) for own in printed), f"{command}: {line}: {said}"
