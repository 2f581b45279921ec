"""What the check for a GPU imports: named where it is missing, and installed where it lies in a folder of wheels."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

WHEELS = Path(__file__).parent / "wheels"
# What a case imports -> what pip calls it.
NEEDED = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "pandas": "pandas", "PIL": "pillow",
    "clip": "clip-anytorch", "pydantic": "pydantic", "cachetools": "cachetools",
}  # fmt: skip


def missing() -> list[str]:
    """Return the packages that are needed and not installed, as pip calls them."""
    importlib.invalidate_caches()
    return [package for name, package in NEEDED.items() if not importlib.util.find_spec(name)]


def install(packages: list[str], wheels: Path, folder: str) -> None:
    """Install packages from a folder of wheels into a folder that this process and its children import from."""
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    subprocess.run([sys.executable, *words, "--target", folder, *packages])
    sys.path.append(folder)


def install_or_leave(wheels: Path = WHEELS) -> None:
    """Install what is missing, for this run alone; exit with 2 and a line where something still is."""
    if missing() and wheels.is_dir():
        install(missing(), wheels, tempfile.mkdtemp())
    if lacking := " ".join(missing()):
        print(
            f"missing: {lacking}: pip install them, or put their wheels into {wheels}",
            file=sys.stderr,
        )
        sys.exit(2)
