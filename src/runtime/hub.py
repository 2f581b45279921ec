"""The Hugging Face Hub, by its own package, which is imported where it is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import UserError, first_line

HUB = "hf-hub:"  # before the name of a repository, where a folder may be named too


def import_hub() -> Any:
    """The package huggingface_hub, which only the Hub needs."""
    try:
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"{HUB} and --push need a package: pip install huggingface_hub") from None
    return huggingface_hub


def fetched(repository: str, files: Sequence[str]) -> Path:
    """A folder with some files of a repository, fetched unless the Hub's cache has them.

    Raises:
        UserError: the package is missing, or the Hub cannot be reached or refuses.
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
    """Put a folder's files into a repository, which is made if it is not there.

    Raises:
        UserError: the package is missing, or the Hub cannot be reached or refuses.
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
    """Return the exceptions of the package and of the package that it uses for the network."""
    return OSError, ValueError, hub.errors.HfHubHTTPError, *hub.errors.HfHubHTTPError.__bases__
