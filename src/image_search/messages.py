"""What the page's browser may say to its server, in schemas. Whatever else is said is refused before it is acted on."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from image_search.photos import KINDS
from runtime.files import file_size
from utils import UserError


class Sent(BaseModel):
    """A part of a message: types are exact, and what is not known is dropped."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class File(Sent):
    """An upload, by where the server put it."""

    path: str = Field(max_length=1024)


class Selection(Sent):
    """The image of a gallery that was clicked on."""

    index: int = Field(ge=0, lt=2**31)


class Message(Sent):
    """That something happened on the page: which of its events, in whose session, and what was typed or uploaded."""

    fn_index: int
    session_hash: str = Field(pattern=r"^\w{1,64}$")
    trigger_id: int | None = None
    data: list[str | File | None] = Field(max_length=8)
    event_data: Any = None


# Types of Gradio's components -> what a browser sends of them. A state stays with the server.
SENT: dict[str, type] = {"state": type(None), "textbox": str, "uploadbutton": File}


@dataclass(frozen=True)
class Event:
    """What a message of an event holds.

    Attributes:
        kinds: types of its data.
        selects: whether it says what was clicked on.
    """

    kinds: list[type]
    selects: bool


def events_of(config: Mapping[str, Any]) -> dict[int, Event]:
    """The events of a page, by number, from the description that Gradio gives its browser."""
    types = {component["id"]: component["type"] for component in config["components"]}
    events = {}
    for dependency in config["dependencies"]:
        kinds = [SENT[types[component]] for component in dependency["inputs"]]
        selects = any(name == "select" for _, name in dependency["targets"])
        events[dependency["id"]] = Event(kinds, selects)
    return events


def is_in(folder: Path, path: str) -> bool:
    """Whether a path is of a file in a folder, its links followed."""
    if file_size(Path(path)) is None:
        return False
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def cleaned(body: bytes, events: Mapping[int, Event], uploads: Path) -> dict[str, Any]:
    """A message with all that Gradio needs of it, and nothing else.

    Raises:
        UserError: it is none of the page's.
    """
    try:
        message = Message.model_validate_json(body)
        event = events[message.fn_index]
        selection = Selection.model_validate(message.event_data) if event.selects else None
    except (ValidationError, KeyError):
        raise UserError("this is no message of the page: load it again") from None
    if [type(value) for value in message.data] != event.kinds:
        raise UserError("this is no message of the page: load it again")
    data: list[Any] = []
    for value in message.data:
        if isinstance(value, File):
            if not is_in(uploads, value.path):
                raise UserError("there is no such upload: upload it again")
            # Gradio refuses it too, with a report in the terminal.
            if Path(value.path).suffix.lower() not in KINDS:
                raise UserError(f"this is not an image: upload one of {' '.join(sorted(KINDS))}")
            data.append({"path": value.path, "meta": {"_type": "gradio.FileData"}})
        else:
            data.append(value)
    return {
        "fn_index": message.fn_index,
        "session_hash": message.session_hash,
        "trigger_id": message.trigger_id,
        "data": data,
        "event_data": selection and {"index": selection.index, "value": None},
    }
