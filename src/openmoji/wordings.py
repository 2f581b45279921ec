"""Word the captions: several wordings for each change, some of them Vietnamese.

{new} and {old} stand for the values in words. A wording that belongs to one value is used as it is.
"""

import re
from collections.abc import Mapping

# Fact -> the kind of triplet that changes it.
KINDS = {
    "gender": "gender", "skin": "skin tone", "left skin": "skin of one of two", "right skin": "skin of one of two",
    "who": "who", "hair": "hair", "age": "age", "role": "role", "gesture": "gesture", "direction": "direction",
    "expression": "expression", "colour": "colour", "size": "size", "time": "time", "children": "who",
    # Variants of one thing; each of these facts has few pairs.
    "species": "form", "part": "form", "count": "form", "open": "form", "crossed out": "form", "view": "form",
}  # fmt: skip
TWO_CHANGES = "two changes"

# Values in ascending order, and wordings for "more" and "less", for which several targets are correct.
ORDERS = {
    "skin": ("light", "medium-light", "medium", "medium-dark", "dark"),
    "age": ("child", "adult", "old"),
    "size": ("small", "small to medium", "medium", "large"),
}
MORE_AND_LESS = {
    "skin": (
        ("with darker skin", "darker skin", "make the skin darker", "skin tone should be darker", "da sẫm hơn"),
        ("with lighter skin", "lighter skin", "make the skin lighter", "skin tone should be lighter", "da sáng hơn"),
    ),
    "age": (
        ("older", "make them older", "someone older", "the same but some years later", "già hơn"),
        ("younger", "make them younger", "someone younger", "the same but years earlier", "trẻ hơn"),
    ),
    "size": (
        ("larger", "make it bigger", "the same but bigger", "a larger one", "to hơn"),
        ("smaller", "make it smaller", "the same but smaller", "a smaller one", "nhỏ hơn"),
    ),
}  # fmt: skip

ENGLISH = {
    "gender": ("{new} instead of {old}", "make it {new}", "change {old} to {new}", "is {new}",
               "now {new}, same otherwise"),
    "skin": ("with {new} skin", "has a {new} skin tone", "{new} skin instead of {old}", "change the skin to {new}",
             "make the skin {new}", "{new} skin tone"),
    "left skin": ("the left one has {new} skin", "{new} skin on the left", "make the skin of the left one {new}",
                  "left: {new} skin", "change the one on the left to a {new} skin tone"),
    "right skin": ("the right one has {new} skin", "{new} skin on the right", "make the skin of the right one {new}",
                   "right: {new} skin", "change the one on the right to a {new} skin tone"),
    "who": ("{new} instead of {old}", "show {new}", "change them to {new}", "with {new}", "the same with {new}"),
    "hair": ("{new} instead of {old}", "the same person {new}", "now {new}", "make it someone {new}",
             "same but {new}"),
    "age": ("{new} instead of {old}", "make it {new}", "show {new}", "is {new}", "as {new}"),
    "role": ("{new} instead of {old}", "show {new}", "{new}", "change {old} to {new}", "is {new} now"),
    "gesture": ("{new} instead of {old}", "show {new}", "{new}", "change the gesture to {new}", "the hand makes {new}"),
    "direction": ("facing {new}", "turn it to the {new}", "{new}, not {old}", "the other way: {new}",
                  "change the direction from {old} to {new}"),
    "expression": ("{new} instead of {old}", "show {new}", "{new}", "change the expression to {new}", "is {new}"),
    "colour": ("in {new}", "is {new}", "change the color to {new}", "{new} instead of {old}", "make it {new}",
               "the same but {new}"),
    "size": ("{new} in size", "make it {new}", "a {new} one", "{new} instead of {old}", "the {new} version"),
    "time": ("shows {new}", "{new} instead of {old}", "set the clock to {new}", "it is {new}",
             "change the time to {new}"),
    "children": ("with {new}", "{new} instead of {old}", "the same parents with {new}", "their children are {new}",
                 "change the kids to {new}"),
}  # fmt: skip
VIETNAMESE = {
    "gender": ("đổi thành {new}", "{new} thay vì {old}", "là {new}"),
    "skin": ("da {new}", "đổi màu da sang {new}", "cùng hình nhưng da {new}"),
    "left skin": ("người bên trái da {new}", "đổi màu da bên trái sang {new}"),
    "right skin": ("người bên phải da {new}", "đổi màu da bên phải sang {new}"),
    "hair": ("đổi thành {new}", "cùng người nhưng {new}"),
    "age": ("đổi thành {new}", "{new} thay vì {old}"),
    "direction": ("quay sang {new}", "hướng {new} thay vì {old}"),
    "colour": ("màu {new}", "đổi sang màu {new}", "màu {new} thay vì màu {old}"),
    "size": ("cỡ {new}", "đổi sang cỡ {new}"),
}

# Value -> its words in English and Vietnamese. `said` derives the words of other values from their names.
SAID = {
    "gender": {
        "woman": ("a woman", "phụ nữ"), "man": ("a man", "đàn ông"),
        "person": ("a gender-neutral person", "người trung tính"),
    },
    "skin": {
        "light": ("light", "sáng"), "medium-light": ("medium-light", "hơi sáng"), "medium": ("medium", "trung bình"),
        "medium-dark": ("medium-dark", "hơi sẫm"), "dark": ("dark", "sẫm"), "yellow": ("yellow", "vàng"),
    },
    "hair": {
        "red_hair": ("with red hair", "tóc đỏ"), "curly_hair": ("with curly hair", "tóc xoăn"),
        "white_hair": ("with white hair", "tóc trắng"), "blond_hair": ("with blond hair", "tóc vàng"),
        "bald": ("without hair", "hói đầu"), "beard": ("with a beard", "có râu"),
    },
    "age": {
        "child": ("a child", "trẻ em"), "adult": ("a grown-up", "người lớn"), "old": ("an old person", "người già"),
    },
    "direction": {"left": ("left", "trái"), "right": ("right", "phải")},
    "colour": {
        "red": ("red", "đỏ"), "orange": ("orange", "cam"), "yellow": ("yellow", "vàng"), "green": ("green", "xanh lá"),
        "light blue": ("light blue", "xanh da trời"), "blue": ("blue", "xanh dương"), "purple": ("purple", "tím"),
        "brown": ("brown", "nâu"), "black": ("black", "đen"), "grey": ("grey", "xám"), "pink": ("pink", "hồng"),
        "white": ("white", "trắng"),
    },
    "size": {"small": ("small", "nhỏ"), "large": ("large", "lớn"), "medium": ("medium", "vừa")},
    "who": {"women": ("two women", ""), "men": ("two men", "")},
    "role": {
        "royal": ("someone with a crown", ""), "Claus": ("someone dressed as Santa", ""),
        "pregnant": ("someone pregnant", ""), "deaf": ("someone who signals being deaf", ""),
        "in_tuxedo": ("someone in a tuxedo", ""), "with_veil": ("someone with a veil", ""),
        "wearing_turban": ("someone wearing a turban", ""), "with_white_cane": ("someone with a white cane", ""),
        "rowing_boat": ("someone rowing a boat", ""), "getting_haircut": ("someone getting a haircut", ""),
        "getting_massage": ("someone getting a massage", ""), "bouncing_ball": ("someone bouncing a ball", ""),
        "in_lotus_position": ("someone in the lotus position", ""), "raising_hand": ("someone raising a hand", ""),
        "in_motorized_wheelchair": ("someone in a motorized wheelchair", ""),
        "in_manual_wheelchair": ("someone in a manual wheelchair", ""), "tipping_hand": ("someone tipping a hand", ""),
        "in_steamy_room": ("someone in a sauna", ""), "facepalming": ("someone with a hand on the face", ""),
        "gesturing_NO": ("someone with crossed arms, saying no", ""),
        "gesturing_OK": ("someone with arms that say OK", ""), "feeding_baby": ("someone feeding a baby", ""),
    },
}  # fmt: skip
SAID["left skin"] = SAID["right skin"] = SAID["skin"]

# Values with wordings of their own, which replace the wordings of the fact: in English, and in Vietnamese.
OWN: Mapping[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("species", "cat"): (
        ("the same as a cat", "make it a cat", "a cat with this expression", "cat version", "with a cat's face"),
        ("đổi thành con mèo", "phiên bản mèo"),
    ),
    ("species", "person"): (
        ("the same as a smiley", "not a cat", "a round yellow face in place of the cat", "no cat, a smiley",
         "the smiley with this expression"),
        ("không phải mèo, mặt cười vàng",),
    ),
    ("part", "face"): (
        ("only its face", "just the head", "the face of this animal", "zoom in on its head", "its head from the front"),
        ("chỉ khuôn mặt", "chỉ lấy cái đầu"),
    ),
    ("part", "body"): (
        ("the whole animal", "with its whole body", "show the full body", "the entire animal from the side",
         "not only the head"),
        ("cả con vật", "toàn thân"),
    ),
    ("open", "open"): (("open it", "opened", "the same but open", "is open now", "not closed any more"), ("mở ra",)),
    ("open", "closed"): (
        ("close it", "shut", "the same but closed", "is closed now", "not open any more"), ("đóng lại",),
    ),
    ("count", "one"): (("only one", "just one of them", "a single one", "one instead of several", "without the others"),
                       ("chỉ một",)),
    ("count", "several"): (("more than one", "several of them", "two or more", "add another one", "not just one"),
                           ("nhiều hơn một",)),
    ("crossed out", "crossed out"): (
        ("crossed out", "it is forbidden", "with a line through it", "not allowed", "the sign that bans it"),
        ("bị cấm", "gạch chéo"),
    ),
    ("crossed out", "allowed"): (
        ("without the line through it", "allowed again", "not forbidden", "remove the ban", "not crossed out"),
        ("được phép", "bỏ dấu cấm"),
    ),
    ("view", "from the front"): (
        ("from the front", "coming towards me", "seen from ahead", "front view", "show the front"),
        ("nhìn từ phía trước",),
    ),
    ("view", "from the side"): (
        ("from the side", "driving past", "seen from its side", "side view", "show the side"), ("nhìn từ bên hông",),
    ),
}  # fmt: skip
# Wordings for directions other than left and right, with which "facing" and "turn it to the" sound wrong.
UP_AND_DOWN = (
    "pointing {new}", "{new} instead of {old}", "turn it {new}", "the same but {new}", "make it point {new}",
)  # fmt: skip


def wordings(fact: str, old: str, new: str) -> tuple[list[str], list[str]]:
    """Return all wordings that request a new value in place of an old one, in English and in Vietnamese."""
    if (fact, new) in OWN:
        english, vietnamese = OWN[fact, new]
        return list(english), list(vietnamese)
    templates = ENGLISH[fact]
    if fact == "direction" and not {old, new} <= {"left", "right"}:
        templates = UP_AND_DOWN
    english_words = {"old": said(fact, old), "new": said(fact, new)}
    in_english = [template.format(**english_words) for template in templates]
    in_vietnamese: list[str] = []
    table = SAID.get(fact, {})
    if old in table and new in table:
        words = {"old": table[old][1], "new": table[new][1]}
        in_vietnamese = [template.format(**words) for template in VIETNAMESE.get(fact, ())]
    return in_english, in_vietnamese


def said(fact: str, value: str) -> str:
    """Return a value in English words, with an article if it needs one."""
    if value in SAID.get(fact, {}):
        return SAID[fact][value][0]
    words = value.replace("_", " ")
    if fact == "role" and re.search("^(in|with) |ing( |$)", words):
        return f"someone {words}"
    if fact == "gesture" and words.endswith(("s", "together")):  # such as "folded hands"
        return words
    if fact in ("role", "gesture") or (fact == "expression" and "face" in words.split()):
        is_vowel = words[0].lower() in "aeiou" and not words.startswith("uni")
        return f"{'an' if is_vowel else 'a'} {words}"
    return words
