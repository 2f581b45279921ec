"""List the meaning of emoji names: people, pairs, gestures, faces, animals, and things in several variants.

The tables use the names of the PyPI package `emoji`, without skin tones.
"""

import re

Facts = tuple[tuple[str, str], ...]


def _words(text: str) -> list[str]:
    return text.split()


# Families whose concept is one of the facts, so that two pictures of a triplet may differ in it.
CONCEPT_IS_A_FACT = {"people", "hand", "face", "time"}

# People

HAIR = ("red_hair", "curly_hair", "white_hair", "blond_hair", "bald", "beard")
AGES = {
    "girl": ("woman", "child"), "woman": ("woman", "adult"), "old_woman": ("woman", "old"),
    "boy": ("man", "child"), "man": ("man", "adult"), "old_man": ("man", "old"),
    "child": ("person", "child"), "person": ("person", "adult"), "older_person": ("person", "old"),
}  # fmt: skip
# Names that are not of the form woman_ROLE.
ROLES = {
    "mermaid": ("woman", "merperson"), "merman": ("man", "merperson"), "merperson": ("person", "merperson"),
    "princess": ("woman", "royal"), "prince": ("man", "royal"), "person_with_crown": ("person", "royal"),
    "Mrs._Claus": ("woman", "Claus"), "Santa_Claus": ("man", "Claus"), "Mx_Claus": ("person", "Claus"),
    "pregnant_woman": ("woman", "pregnant"), "pregnant_man": ("man", "pregnant"),
    "pregnant_person": ("person", "pregnant"),
    "deaf_woman": ("woman", "deaf"), "deaf_man": ("man", "deaf"), "deaf_person": ("person", "deaf"),
}  # fmt: skip
GENDER_IS_NOT_SEEN = ("cartwheeling",)
# Activity -> name -> who. Pairs without gender are left out: OpenMoji draws them like men, or like a woman and a man.
PAIRS = {
    "holding hands": {
        "women_holding_hands": "women", "men_holding_hands": "men", "woman_and_man_holding_hands": "a woman and a man",
    },
    "kissing": {
        "kiss_woman_woman": "women", "kiss_man_man": "men", "kiss_woman_man": "a woman and a man",
    },
    "in love": {
        "couple_with_heart_woman_woman": "women", "couple_with_heart_man_man": "men",
        "couple_with_heart_woman_man": "a woman and a man",
    },
    "wrestling": {"women_wrestling": "women", "men_wrestling": "men"},
    "with bunny ears": {"women_with_bunny_ears": "women", "men_with_bunny_ears": "men"},
    "handshake": {"handshake": ""},
}  # fmt: skip

# Hands

POINTING = {
    "backhand_index_pointing_up": ("pointing finger", "up"),
    "backhand_index_pointing_down": ("pointing finger", "down"),
    "backhand_index_pointing_left": ("pointing finger", "left"),
    "backhand_index_pointing_right": ("pointing finger", "right"),
    "left-facing_fist": ("fist bump", "left"), "right-facing_fist": ("fist bump", "right"),
    "leftwards_hand": ("flat hand", "left"), "rightwards_hand": ("flat hand", "right"),
    "leftwards_pushing_hand": ("pushing hand", "left"), "rightwards_pushing_hand": ("pushing hand", "right"),
    "thumbs_up": ("thumb", "up"), "thumbs_down": ("thumb", "down"),
}  # fmt: skip
GESTURES = _words("""
    OK_hand call_me_hand clapping_hands crossed_fingers flexed_biceps folded_hands hand_with_fingers_splayed
    hand_with_index_finger_and_thumb_crossed heart_hands index_pointing_at_the_viewer index_pointing_up
    love-you_gesture middle_finger oncoming_fist open_hands palm_down_hand palm_up_hand palms_up_together
    pinched_fingers pinching_hand raised_back_of_hand raised_fist raised_hand raising_hands sign_of_the_horns
    victory_hand vulcan_salute waving_hand writing_hand
""")

# Faces

EXPRESSION = re.compile(r"(^|_)face(_|$)|star-struck|rolling_on_the_floor_laughing|exploding_head")
NO_EXPRESSION = _words("""
    new_moon_face first_quarter_moon_face last_quarter_moon_face full_moon_face sun_with_face wind_face mouse_face
    cow_face tiger_face rabbit_face cat_face dragon_face horse_face monkey_face dog_face pig_face clown_face
    angry_face_with_horns smiling_face_with_horns
""")
EXPRESSION_OF_CAT = {
    "grinning_cat": "grinning_face_with_big_eyes",
    "grinning_cat_with_smiling_eyes": "grinning_face_with_smiling_eyes",
    "cat_with_tears_of_joy": "face_with_tears_of_joy", "cat_with_wry_smile": "smirking_face",
    "smiling_cat_with_heart-eyes": "smiling_face_with_heart-eyes", "kissing_cat": "kissing_face_with_closed_eyes",
    "pouting_cat": "angry_face", "crying_cat": "crying_face", "weary_cat": "face_screaming_in_fear",
}  # fmt: skip

# Things: name -> family, concept, facts.

THINGS: dict[str, tuple[str, str, Facts]] = {}


def _add(family: str, concept: str, names: dict[str, str], fact: str) -> None:
    """Add pictures of one thing that differ in one fact: name -> value of the fact."""
    for name, value in names.items():
        THINGS[name] = (family, concept, ((fact, value),))


COLORS = ("red", "orange", "yellow", "green", "light blue", "blue", "purple", "brown", "black", "grey", "pink",
          "white")  # fmt: skip
for _thing in ("heart", "circle", "square", "apple"):
    _names = {f"{color.replace(' ', '_')}_{_thing}": color for color in COLORS}
    _add("color", _thing, _names, "colour")
_add("color", "book", {f"{color}_book": color for color in ("green", "blue", "orange")}, "colour")
_add("color", "mushroom", {"mushroom": "red", "brown_mushroom": "brown"}, "colour")
_add(
    "color", "question mark", {"red_question_mark": "red", "white_question_mark": "white"}, "colour"
)
_add("color", "flag on a pole", {"white_flag": "white", "black_flag": "black"}, "colour")
_add("color", "button", {"black_square_button": "black", "white_square_button": "white"}, "colour")

for _color in ("black", "white"):
    _squares = {}
    for _size in ("small", "medium-small", "medium", "large"):
        _squares[f"{_color}_{_size}_square"] = _size.replace("medium-small", "small to medium")
    _add("size", f"{_color} square", _squares, "size")
for _color in ("orange", "blue"):
    _diamonds = {f"{_size}_{_color}_diamond": _size for _size in ("small", "large")}
    _add("size", f"{_color} diamond", _diamonds, "size")
_add(
    "size", "cloud", {"sun_behind_small_cloud": "small", "sun_behind_large_cloud": "large"}, "size"
)

HOURS = _words("one two three four five six seven eight nine ten eleven twelve")
for _hour in HOURS:
    _times = {f"{_hour}_o’clock": f"{_hour} o'clock", f"{_hour}-thirty": f"half past {_hour}"}
    _add("time", _hour, _times, "time")

DIRECTIONS = {
    "arrow": {
        "up_arrow": "up", "down_arrow": "down", "left_arrow": "left", "right_arrow": "right",
        "up-left_arrow": "up left", "up-right_arrow": "up right",
        "down-left_arrow": "down left", "down-right_arrow": "down right",
    },
    "curved arrow": {"right_arrow_curving_up": "up", "right_arrow_curving_down": "down"},
    "fast button": {
        "fast_up_button": "up", "fast_down_button": "down", "fast_reverse_button": "left",
        "fast-forward_button": "right",
    },
    "triangle": {"red_triangle_pointed_up": "up", "red_triangle_pointed_down": "down"},
    "small button": {"upwards_button": "up", "downwards_button": "down"},
    "play button": {"play_button": "right", "reverse_button": "left"},
    "track button": {"next_track_button": "right", "last_track_button": "left"},
    "magnifying glass": {"magnifying_glass_tilted_left": "left", "magnifying_glass_tilted_right": "right"},
    "chart": {"chart_increasing": "up", "chart_decreasing": "down"},
}  # fmt: skip
for _thing, _names in DIRECTIONS.items():
    _add("direction", _thing, _names, "direction")

# Thing -> the names of the two pictures.
OPEN_AND_CLOSED = {
    "lock": ("unlocked", "locked"), "book": ("open_book", "closed_book"),
    "folder": ("open_file_folder", "file_folder"), "umbrella": ("umbrella", "closed_umbrella"),
    "mailbox": ("open_mailbox_with_lowered_flag", "closed_mailbox_with_lowered_flag"),
    "mailbox with its flag up": ("open_mailbox_with_raised_flag", "closed_mailbox_with_raised_flag"),
}  # fmt: skip
ONE_AND_SEVERAL = {
    "beer": ("beer_mug", "clinking_beer_mugs"), "note": ("musical_note", "musical_notes"),
    "bust": ("bust_in_silhouette", "busts_in_silhouette"), "loop": ("curly_loop", "double_curly_loop"),
    "exclamation mark": ("red_exclamation_mark", "double_exclamation_mark"), "house": ("house", "houses"),
    "drop": ("droplet", "sweat_droplets"), "paperclip": ("paperclip", "linked_paperclips"),
    "star": ("star", "sparkles"),
}  # fmt: skip
ALLOWED_AND_FORBIDDEN = {
    "bicycle": ("bicycle", "no_bicycles"), "phone": ("mobile_phone", "no_mobile_phones"),
    "smoking": ("cigarette", "no_smoking"), "litter": ("litter_in_bin_sign", "no_littering"),
    "water": ("potable_water", "non-potable_water"), "bell": ("bell", "bell_with_slash"),
    "sound": ("speaker_high_volume", "muted_speaker"),
}  # fmt: skip
SIDE_AND_FRONT = {
    "bus": ("bus", "oncoming_bus"), "police car": ("police_car", "oncoming_police_car"),
    "taxi": ("taxi", "oncoming_taxi"), "car": ("automobile", "oncoming_automobile"),
}  # fmt: skip
FACE_AND_BODY = {
    animal: (f"{animal}_face", animal)
    for animal in _words("mouse cow tiger rabbit cat dragon horse monkey dog pig")
}
for _fact, _values, _table in (
    ("part", ("face", "body"), FACE_AND_BODY),
    ("open", ("open", "closed"), OPEN_AND_CLOSED),
    ("count", ("one", "several"), ONE_AND_SEVERAL),
    ("crossed out", ("allowed", "crossed out"), ALLOWED_AND_FORBIDDEN),
    ("view", ("from the side", "from the front"), SIDE_AND_FRONT),
):
    for _thing, _twins in _table.items():
        _add(_fact, _thing, dict(zip(_twins, _values, strict=True)), _fact)

ADULTS = ("man", "woman", "man_man", "man_woman", "woman_woman")
CHILDREN = {
    "boy": "a boy", "girl": "a girl", "girl_boy": "a girl and a boy", "boy_boy": "two boys", "girl_girl": "two girls",
}  # fmt: skip
for _adults in ADULTS:
    _families = {f"family_{_adults}_{child}": said for child, said in CHILDREN.items()}
    _add("family", _adults, _families, "children")
