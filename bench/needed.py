"""Report the missing packages that `gpu_check.py` needs, or install them from a folder of wheels."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

WHEELS = Path(__file__).parent / "wheels"
# Module that cases import -> name of its package for pip.
NEEDED = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "pandas": "pandas", "PIL": "pillow",
    "clip": "clip-anytorch", "pydantic": "pydantic", "cachetools": "cachetools",
}  # fmt: skip


def missing() -> list[str]:
    """Return pip's names of the needed packages that are not installed."""
    importlib.invalidate_caches()
    return [package for name, package in NEEDED.items() if not importlib.util.find_spec(name)]


def install(packages: list[str], wheels: Path, folder: str) -> None:
    """Install packages from a folder of wheels into a folder, from which this process and its forks import them."""
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    subprocess.run([sys.executable, *words, "--target", folder, *packages])
    sys.path.append(folder)


def install_or_leave(wheels: Path = WHEELS) -> None:
    """Install missing packages for this run only; exit with code 2 and a message if some are still missing."""
    if missing() and wheels.is_dir():
        install(missing(), wheels, tempfile.mkdtemp())
    if lacking := " ".join(missing()):
        print(
            f"missing: {lacking}: pip install them, or put their wheels into {wheels}",
            file=sys.stderr,
        )
        sys.exit(2)
