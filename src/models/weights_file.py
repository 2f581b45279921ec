"""Read files of weights from any project, and rename the weights as in OpenAI's and open_clip's CLIPs.

Other projects store weights under a key next to an optimizer, add a prefix to their names, or use
Hugging Face's names. One log line reports the format that was found and the entries that were
ignored.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.files import parse_json
from runtime.tensors import load_tensors
from runtime.torchscript import archived_state, is_archive
from runtime.weights import counted, unwrapped
from utils import UserError

logger = logging.getLogger(__name__)

# Key of the weights in a checkpoint -> names that identify them without the key; text before such a name is a prefix.
TELLING = {"CLIP": ("logit_scale", "text_projection"), "Combiner": ("output_layer.weight",)}
STAGE_WEIGHTS = {"CLIP": "stage-1 weights", "Combiner": "stage-2 weights"}
# Fields of this project's checkpoints besides the weights.
BESIDE = ("epoch", "metrics", "config")
# Keys of the weights in the checkpoints of other projects.
NESTED = ("state_dict", "model_state_dict", "model", "module")
# Entries among the weights that are not weights; OpenAI's archives have three numbers.
OF_OPENAI = {"input_resolution", "context_length", "vocab_size"}
NO_WEIGHTS = OF_OPENAI | {"attn_mask"}
QUICK_GELU_NAME = "quick_gelu"
NAMES_SHOWN = 4  # maximum number of names in a message

# Hugging Face's weight names for a CLIP with a ViT -> OpenAI's names.
HUGGING_FACE = "text_model.embeddings.token_embedding.weight"
RENAMED = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
JOINED = re.compile(r"\.self_attn\.([qkv])_proj\.")
POSITIONS = ".embeddings.position_ids"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """The weights in a file, and its format.

    Attributes:
        is_tuned: whether a training run of this project, or of the original, wrote the file.
        beside: other fields that this run wrote.
        is_foreign: whether the file has the format of another project.
        activation: "quick_gelu" or "gelu"; "" if unknown.
    """

    state: dict[str, Any]
    is_tuned: bool
    beside: dict[str, Any]
    is_foreign: bool
    activation: str


def read_weights(flag_name: str, path: Path, kind: str) -> WeightsFile:
    """Read the weights of one kind from a file, whatever its format.

    Args:
        kind: "CLIP" or "Combiner".

    Raises:
        UserError: the file cannot be read, or contains another kind of weights or several models.
    """
    source = f"{flag_name} {path}"
    is_script = is_archive(path)
    try:
        content: dict[str, Any] = archived_state(path) if is_script else load_tensors(path)
    except UserError as error:
        raise UserError(f"{flag_name}: {error}") from None
    own = {name: content[name] for name in TELLING if isinstance(content.get(name), dict)}
    key = "" if own else next((key for key in NESTED if isinstance(content.get(key), dict)), "")
    if own:
        kinds = set(own)
        state = unwrapped(own.get(kind, {}), source)
    else:
        state = unwrapped(_tensors(content[key] if key else content), source)
        kinds = {name for name in TELLING if _places(state, name)}
    if kind not in kinds:
        names = counted(list(map(str, content)), NAMES_SHOWN)
        found = next((STAGE_WEIGHTS[name] for name in kinds), f"something else ({names})")
        raise UserError(
            f"{source} contains {found}, not {STAGE_WEIGHTS[kind]}: choose the right file"
        )
    weights, prefix = _without_prefix(state, kind, source)
    activation = QUICK_GELU_NAME if OF_OPENAI & weights.keys() else ""
    is_hugging_face = HUGGING_FACE in weights
    if is_hugging_face:
        weights = _renamed(weights, source)
        activation = _told_activation(path)
    beside = {} if key else {name: content[name] for name in BESIDE if name in content}
    forms = {
        "a TorchScript archive": is_script,
        f"a checkpoint of other training code ({key})": key,
        f"a model called {prefix}": prefix,
        "Hugging Face's CLIP": is_hugging_face,
    }
    kept = {*beside, *own, key, *_tensors(content)}
    left = [str(name) for name in content if name not in kept]
    left += [name for name in state if not name.startswith(prefix)]
    left += [name for name in weights if _is_no_weight(name)]
    told = [", ".join(form for form, is_so in forms.items() if is_so)]
    told.append(f"left out: {counted(left, NAMES_SHOWN)}" if left else "")
    if any(told):
        logger.info("%s: %s", source, "; ".join(filter(None, told)))
    return WeightsFile(
        state={name: weight for name, weight in weights.items() if not _is_no_weight(name)},
        is_tuned=bool(own),
        beside=beside,
        is_foreign=bool(key or prefix or is_hugging_face),
        activation=activation,
    )


def read_clip(path: Path) -> WeightsFile:
    """Read the CLIP weights at the path `--clip-model-name`. Raises UserError also if they are fine-tuned."""
    found = read_weights("--clip-model-name", path, "CLIP")
    if found.is_tuned:
        raise UserError(
            f"--clip-model-name {path} contains fine-tuned weights: pass it to --clip-model-path instead"
        )
    return found


def _tensors(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _is_no_weight(name: str) -> bool:
    return name.split(".")[-1] in NO_WEIGHTS


def _places(state: Mapping[str, Any], kind: str) -> set[str]:
    """Return the name prefix of each model of a kind in a state dict, "" if it has none; empty without a model."""
    for telling in TELLING[kind]:
        found = {name for name in state if f".{name}".endswith(f".{telling}")}
        if found:
            return {name.removesuffix(telling) for name in found}
    return set()


def _without_prefix(state: Mapping[str, Any], kind: str, source: str) -> tuple[dict[str, Any], str]:
    """Return the weights of the only model of a kind under its own names, and the prefix that they had.

    Raises:
        UserError: there are several models.
    """
    places = _places(state, kind) or {""}
    if "" in places:
        return dict(state), ""
    if len(places) > 1:
        raise UserError(
            f"{source} contains several models ({counted(sorted(places), NAMES_SHOWN)}): save the weights of one"
        )
    (prefix,) = places
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name] for name in names}, prefix


def _renamed(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename Hugging Face's CLIP weights as OpenAI does, and join query, key and value weights in one matrix.

    Raises:
        UserError: the weights belong to another model, such as SigLIP, or a part is missing.
    """
    renamed = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, weight in state.items():
        own = name
        for theirs, ours in RENAMED.items():
            own = own.replace(theirs, ours)
        if own.startswith(("text_model.", "vision_model.")) and not name.endswith(POSITIONS):
            raise UserError(
                f"{source} contains Hugging Face weights of a model that is not a CLIP with a ViT ({name}): choose "
                "an open_clip model, see --list-models"
            )
        if part := JOINED.search(own):
            joined.setdefault(JOINED.sub(".attn.in_proj_", own), {})[part[1]] = weight
        elif not name.endswith(POSITIONS):
            renamed[own] = weight.t().contiguous() if "_projection." in name else weight
    for name, parts in joined.items():
        if parts.keys() != {"q", "k", "v"} or len({part.shape for part in parts.values()}) > 1:
            raise UserError(f"{source} lacks a part of {name}: copy the file again")
        renamed[name] = torch.cat([parts[part] for part in "qkv"])
    return renamed


def _told_activation(path: Path) -> str:
    """Return the activation of Hugging Face weights, from the config.json next to them; "" if it is not recorded."""
    try:
        about = parse_json(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(about, dict) or about.get("model_type") != "clip":
        return ""
    encoders = [about.get("text_config"), about.get("vision_config")]
    told = [part.get("hidden_act", QUICK_GELU_NAME) for part in encoders if isinstance(part, dict)]
    return QUICK_GELU_NAME if all(activation == QUICK_GELU_NAME for activation in told) else "gelu"
