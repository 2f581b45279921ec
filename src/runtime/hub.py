"""Download from and upload to the Hugging Face Hub, by its own package, which is imported on demand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import UserError, first_line

HUB = "hf-hub:"  # prefix of a repository's name, where a folder may be given too


def import_hub() -> Any:
    """Import huggingface_hub, an optional package; raise UserError if it is missing."""
    try:
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"{HUB} and --push need a package: pip install huggingface_hub") from None
    return huggingface_hub


def fetched(repository: str, files: Sequence[str]) -> Path:
    """Return a folder with some files of a repository, downloaded unless the Hub's cache has them.

    Raises:
        UserError: the package is missing, or the Hub cannot be reached or denies access.
    """
    hub = import_hub()
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(files)))
    except _errors(hub) as error:
        raise UserError(
            f"{HUB}{repository} could not be fetched ({first_line(error)}): download its {', '.join(files)} on another "
            f"machine, and pass their folder"
        ) from None


def upload(folder: Path, repository: str) -> None:
    """Upload a folder's files to a repository, which is created if it does not exist.

    Raises:
        UserError: the package is missing, or the Hub cannot be reached or denies access.
    """
    hub = import_hub()
    try:
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except _errors(hub) as error:
        raise UserError(
            f"--push {repository}: {first_line(error)}; {folder} is complete: push it later with "
            f"`hf upload {repository} {folder}`"
        ) from None


def _errors(hub: Any) -> tuple[type[BaseException], ...]:
    """Return the exceptions of the package, and of the network package that it uses."""
    return OSError, ValueError, hub.errors.HfHubHTTPError, *hub.errors.HfHubHTTPError.__bases__
