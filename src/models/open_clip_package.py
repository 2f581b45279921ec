"""Load and describe models of open_clip, which only this file imports, and only when such a model is chosen."""

import contextlib
import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone, Tokenizer
from models.clip_model import VITAL, checkpoint_blocks
from models.names import (
    FOLDER,
    HUB_SCHEME,
    MODEL_CONFIG,
    OPEN_CLIP,
    REQUIREMENTS,
    OpenClipName,
    check_clip,
    checked_config,
    read_config,
)
from models.weights_file import read_clip
from runtime import distributed
from runtime.files import read_json, write_text
from runtime.tensors import LOADING_ERRORS
from runtime.weights import fitted
from utils import UserError, first_line

try:
    import open_clip
    from open_clip.convert import convert_state_dict
    from open_clip.factory import _find_checkpoint_in_dir
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict
    from open_clip.modified_resnet import Bottleneck
    from open_clip.pretrained import download_pretrained_from_hf
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict
    from open_clip.transformer import TextTransformer, text_global_pool

    if not open_clip.__version__.startswith("3."):
        raise ImportError(f"version {open_clip.__version__} is installed")
except ImportError as error:
    raise UserError(
        f"this CLIP needs open_clip_torch >= 3.0 and < 4 ({first_line(error)}): {REQUIREMENTS}"
    ) from None

logger = logging.getLogger(__name__)

QUICK_GELU_ENDING = "-quickgelu"  # suffix of the name of an architecture with QuickGELU
HUB_PAGE = "https://huggingface.co"
HUB_WEIGHTS = "open_clip_model.safetensors"
TOKENIZER_FILES = "tokenizer.json, tokenizer_config.json and special_tokens_map.json"
TEXT_CONFIG = "config.json"  # configuration of a Hugging Face text encoder
# Allowed implementations of an encoder's attention and experts; for others, transformers may download and run code.
OWN_WAYS = (None, "eager", "sdpa")
# Vocabulary size of a Hugging Face text encoder, in effect no limit; the real size is in its own configuration.
ANY = 2**31
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
# Exceptions of open_clip and the packages below it for a bad configuration, download or tokenizer.
PACKAGE_ERRORS = (
    *LOADING_ERRORS,
    AssertionError,
    AttributeError,
    ImportError,
    TypeError,
    ZeroDivisionError,
)
Fetched = TypeVar("Fetched")


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """Name and sizes of a published model."""

    name: str
    dim: int
    pixels: int
    context: int


def known_models() -> Iterator[KnownModel]:
    """Yield the models that can be loaded by a tag."""
    for architecture in open_clip.list_models():
        config = open_clip.get_model_config(architecture)
        for tag in open_clip.list_pretrained_tags_by_model(architecture):
            if "multimodal_cfg" in config or _lacks_quick_gelu(architecture, tag):
                continue
            yield KnownModel(
                name=f"{OPEN_CLIP}:{architecture}/{tag}",
                dim=config["embed_dim"],
                pixels=config["vision_cfg"].get("image_size", CLIPVisionCfg.image_size),
                context=config["text_cfg"].get("context_length", CLIPTextCfg.context_length),
            )


def load(name: OpenClipName, typed: str, device: torch.device) -> tuple[nn.Module, Backbone]:
    """Load a model of open_clip in eval mode with float32 weights; return it and its description.

    Args:
        typed: value of `--clip-model-name`.

    Raises:
        UserError: the model does not exist, a download fails, or files do not fit the model.
    """
    source = _checked_name(name, typed)
    published = _published(name, source)
    content = _configuration(name, source)
    # Files that may be missing are checked first, because building a large model takes minutes.
    describe = _described(name, content, source, published=published)
    path = _weights_file(name, published, source)
    model = _built(name, content["model_cfg"], source)
    backbone = describe(dim=content["model_cfg"]["embed_dim"], resolution=_side(model, source))
    quick_gelu = bool(content["model_cfg"].get("quick_gelu"))
    model.load_state_dict(_weights(path, model, source, quick_gelu=quick_gelu, name=name))
    return _ready(model, device), backbone


def load_exported(
    folder: Path, state: Mapping[str, Any], path: Path, *, device: torch.device
) -> tuple[nn.Module, Backbone]:
    """Load the model of an exported pair from the files in its folder, without downloading anything.

    Args:
        folder: folder of the files that `Backbone.write` wrote.
        path: file of the weights, for error messages.

    Raises:
        UserError: the weights do not fit the model, or this version of open_clip cannot read a
            file.
    """
    source = f"--pair {path}"
    name = OpenClipName(scheme=FOLDER, model=str(folder))
    content = checked_config(read_json(folder / MODEL_CONFIG, "open_clip"), folder / MODEL_CONFIG)
    remedy = "copy the folder again, or export it again"
    text_files = _text_files(name, content["model_cfg"]["text_cfg"])
    if text_files and text_files != name.model:
        raise UserError(f"{source}: {folder} contains no {TEXT_CONFIG} from {text_files}: {remedy}")
    describe = _described(name, content, source)
    model = _built(name, content["model_cfg"], source)
    backbone = describe(dim=content["model_cfg"]["embed_dim"], resolution=_side(model, source))
    weights = fitted(state, model.state_dict(), source=source, remedy=remedy, vital=VITAL)
    model.load_state_dict(weights)
    return _ready(model, device), backbone


def without_weights(name: OpenClipName, typed: str) -> tuple[nn.Module, Backbone]:
    """Build a model on the meta device, to count its operations; no weights and no tokenizer are downloaded.

    Args:
        typed: value of `--clip-model-name`.

    Raises:
        UserError: the model does not exist, or its configuration is not available.
    """
    source = _checked_name(name, typed)
    config = _configuration(name, source)["model_cfg"]
    model = _built(name, config, source, device="meta")
    context = config["text_cfg"].get("context_length", CLIPTextCfg.context_length)
    backbone = Backbone(
        dim=config["embed_dim"],
        resolution=_side(model, source),
        mean=PreprocessCfg.mean,
        std=PreprocessCfg.std,
        interpolation="bicubic",
        resize_mode="shortest",
        tokenizer=Tokenizer(lambda captions, columns: torch.zeros(len(captions), columns), context),
        checkpoint_gradients=checkpoint_gradients,
    )
    return model.eval(), backbone


def _checked_name(name: OpenClipName, typed: str) -> str:
    """Check a model's name and return its form for messages. A folder or repository is logged before it is opened."""
    if name.scheme != OPEN_CLIP and distributed.is_main():
        logger.info("opening %s", name.for_open_clip)
    check_clip(typed)
    return f"--clip-model-name {typed}"


def _described(
    name: OpenClipName,
    content: Mapping[str, Any],
    source: str,
    *,
    published: Mapping[str, Any] | None = None,
) -> Callable[..., Backbone]:
    """Return a function that describes a model; its arguments are the built model's feature dimension and resolution.

    Raises:
        UserError: the model has a decoder, or its tokenizer cannot be loaded.
    """
    config = content["model_cfg"]
    if "multimodal_cfg" in config:
        raise UserError(
            f"{source} has a decoder, which is not supported: choose a model with two encoders"
        )
    preprocess = _preprocessing(name, published or content.get("preprocess_cfg"), source)
    own = _tokenizer(name, config, source)
    tells = json.dumps({"model": config, "tokenizer": _fingerprint(own)}, sort_keys=True)
    whole = {"model_cfg": config, "preprocess_cfg": dict(preprocess)}
    return functools.partial(
        Backbone,
        mean=_colour(preprocess["mean"]),
        std=_colour(preprocess["std"]),
        interpolation="bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic",
        resize_mode=preprocess["resize_mode"],
        tokenizer=_checked_tokenizer(own, config, source),
        checkpoint_gradients=checkpoint_gradients,
        architecture=hashlib.sha256(tells.encode()).hexdigest(),
        write=functools.partial(
            _write, content=whole, own=own, text_files=_text_files(name, config["text_cfg"])
        ),
    )


def _write(folder: Path, *, content: Mapping[str, Any], own: Any, text_files: str) -> None:
    """Write the files that a model is built from, apart from its weights, in the layout of open_clip's `local-dir:`.

    These are its configuration, its tokenizer, and the configuration of a Hugging Face text
    encoder.
    """
    write_text(folder / MODEL_CONFIG, json.dumps(content, indent=1) + "\n")
    if hasattr(own, "tokenizer"):
        own.tokenizer.save_pretrained(folder)
    if text_files:
        from transformers import PretrainedConfig

        text_config, _ = PretrainedConfig.get_config_dict(text_files)
        write_text(folder / TEXT_CONFIG, json.dumps(text_config, indent=1) + "\n")


def _ready(model: Any, device: torch.device) -> nn.Module:
    model = model.float().eval().to(device)
    for module in model.modules():
        module.__class__ = ANY_COLUMNS.get(type(module), type(module))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.visual.modules())
    if device.type == "cuda" and convolutions > 1:  # a ViT has only one, its patch embedding
        model.visual.to(memory_format=torch.channels_last)
    return model


def checkpoint_gradients(model: Any) -> None:
    """Make a model recompute activations in the backward pass, also in ResNets, which open_clip leaves out."""
    checkpoint_blocks(model, Bottleneck)
    with _quiet():
        model.set_grad_checkpointing(True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence log lines and warnings of open_clip, which users do not need."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Turn the packages' exceptions into a UserError; the reason replaces `{}` in its message."""
    try:
        with _quiet():
            yield
    except PACKAGE_ERRORS as error:
        raise UserError(message.replace("{}", first_line(error)[:120])) from None


def _published(name: OpenClipName, source: str) -> dict[str, Any] | None:
    """Return open_clip's configuration for the weights of a tag; None without a tag."""
    if not name.tag:
        return None
    found = open_clip.get_pretrained_cfg(name.model, name.tag)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name.model)) or "none"
        raise UserError(f"{source}: {name.model} has no such tag: choose {tags}")
    if _lacks_quick_gelu(name.model, name.tag):
        raise UserError(
            f"{source}: these weights need QuickGELU: pass {OPEN_CLIP}:{name.model}{QUICK_GELU_ENDING}/{name.tag}"
        )
    return found


def _lacks_quick_gelu(architecture: str, tag: str) -> bool:
    """Check whether the weights of a tag were trained with QuickGELU although the architecture has GELU.

    open_clip only logs a warning, and lists such weights under both architectures.
    """
    wants = open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu")
    return bool(wants) and not open_clip.get_model_config(architecture).get("quick_gelu")


def _configuration(name: OpenClipName, source: str) -> dict[str, Any]:
    """Return the model's configuration: `model_cfg`, and `preprocess_cfg` if it has one."""
    if name.scheme == FOLDER:
        return read_config(Path(name.model))
    if name.scheme == HUB_SCHEME:
        fetch = functools.partial(download_pretrained_from_hf, name.model, filename=MODEL_CONFIG)
        file = Path(_fetched(fetch, source, name.model))
        return checked_config(read_json(file, "open_clip"), file)
    return {"model_cfg": open_clip.get_model_config(name.model)}


def _fetched(fetch: Callable[[], Fetched], source: str, repository: str) -> Fetched:
    """Download a file from a repository on the Hub, or get it from the cache."""
    refusing = _refusing(
        f"{source} could not be downloaded ({{}}): fetch {MODEL_CONFIG}, {HUB_WEIGHTS} and, if they exist, "
        f"{TOKENIZER_FILES} from {HUB_PAGE}/{repository} into a folder and pass {FOLDER}:FOLDER"
    )
    with refusing, distributed.first_on_machine():
        return fetch()


def _built(
    name: OpenClipName, config: Mapping[str, Any], source: str, *, device: str = "cpu"
) -> Any:
    """Build the model with random weights.

    Args:
        config: the model's `model_cfg`, after it was checked.
    """
    # All weights will be read from one file, so no part of the model may download weights.
    text = {**config["text_cfg"], "hf_model_pretrained": False}
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    if files := _text_files(name, text):
        text["hf_model_name"] = files
        if name.scheme == HUB_SCHEME:
            logger.info("opening %s, the text encoder of %s", files, name.model)

    refusing = _refusing(
        f"{source}: open_clip cannot build it ({{}}): choose a model whose parts are all available"
    )
    with refusing:
        if files:
            _check_no_code(files, source)
        return open_clip.create_model(
            name.for_open_clip,
            load_weights=False,
            pretrained_text=False,
            device=device,
            vision_cfg=vision,
            text_cfg=text,
        )


def _text_files(name: OpenClipName, text: Mapping[str, Any]) -> str:
    """Return the folder or repository that has the configuration of a Hugging Face text encoder; "" for other encoders.

    It is the model's own folder if the configuration is in it.
    """
    if (
        text.get("hf_model_name")
        and name.scheme == FOLDER
        and Path(name.model, TEXT_CONFIG).is_file()
    ):
        return name.model
    return text.get("hf_model_name") or ""


def _side(model: Any, source: str) -> int:
    """Return the side of a model's input images, in pixels."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(
            f"{source} expects images of {height} x {width} pixels: choose a model with square input"
        )
    return height


def _preprocessing(
    name: OpenClipName, told: Mapping[str, Any] | None, source: str
) -> dict[str, Any]:
    """Return the preprocessing of images in the model's own evaluations.

    Args:
        told: preprocessing recorded for a tag, in a folder or in a repository.
    """
    if name.weights:
        told = _as_tags(name.model, source)
    elif not told:
        logger.warning(
            "warning: %s does not record how images are preprocessed: using OpenAI's preprocessing",
            source,
        )
    return merge_preprocess_dict(PreprocessCfg(), dict(told or {}))


def _as_tags(architecture: str, source: str) -> dict[str, Any]:
    """Return the preprocessing of most tags of an architecture, for a file of weights that does not record any."""
    ways = {}
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        published = open_clip.get_pretrained_cfg(architecture, tag)
        ways[tag] = [published.get(part) for part in PREPROCESSING]
    if not ways:
        logger.warning(
            "warning: %s: no file records how images are preprocessed: using OpenAI's preprocessing",
            source,
        )
        return {}
    usual = max(ways.values(), key=list(ways.values()).count)
    others = sorted(tag for tag, way in ways.items() if way != usual)
    if others:
        logger.warning(
            "warning: %s: images are preprocessed as for %s; for %s, which need different preprocessing, pass a "
            "tag, or %s:FOLDER with a %s",
            source,
            next(tag for tag, way in ways.items() if way == usual),
            ", ".join(others),
            FOLDER,
            MODEL_CONFIG,
        )
    return dict(zip(PREPROCESSING, usual, strict=True))


def _colour(value: Any) -> tuple[float, float, float]:
    """Return the mean or deviation of the three colour channels; a single number applies to all three."""
    red, green, blue = [value] * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def _tokenizer(name: OpenClipName, config: Mapping[str, Any], source: str) -> Any:
    """Return open_clip's tokenizer for a model, which cleans captions as in the model's training.

    A Hugging Face tokenizer is created here, since open_clip would pass unchecked settings to
    transformers.
    """
    text = config["text_cfg"]
    wanted = text.get("hf_tokenizer_name")
    where = f"{HUB_PAGE}/{wanted}" if name.scheme == OPEN_CLIP else "where the weights are from"
    if wanted and name.scheme == HUB_SCHEME:
        logger.info("opening %s, the tokenizer of %s", wanted, name.model)
    refusing = _refusing(
        f"{source}: its tokenizer cannot be created ({{}}): pip install transformers[sentencepiece], or fetch "
        f"{TOKENIZER_FILES} from {where} into the folder of the weights and pass {FOLDER}:FOLDER"
    )
    with refusing, distributed.first_on_machine():
        if not wanted:
            return open_clip.get_tokenizer(name.for_open_clip)
        files = name.model if name.scheme == FOLDER else wanted
        _check_no_code(files, source)
        return HFTokenizer(
            files,
            context_length=text.get("context_length", DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            **text.get("tokenizer_kwargs", {}),
        )


def _check_no_code(files: str, source: str) -> None:
    """Raise UserError if a Hugging Face folder or repository requires running code of its own."""
    from transformers import PretrainedConfig, dynamic_module_utils
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # transformers asks on stdin whether to run code that it finds, unless the time to answer is 0.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    for read in (
        lambda: PretrainedConfig.get_config_dict(files)[0],
        lambda: get_tokenizer_config(files),
    ):
        try:
            content = read()
        except (OSError, ValueError):  # a missing file is reported by the code that needs it
            continue
        if found := _wanted_code(content):
            raise UserError(
                f"{source}: {files} needs its own code to run ({found}), which is not allowed: choose another model"
            )


def _wanted_code(content: Any) -> str:
    """Return the field of a configuration, at any depth, that would make transformers run other code; "" for none."""
    if isinstance(content, list):
        return next(filter(None, map(_wanted_code, content)), "")
    if not isinstance(content, dict):
        return ""
    for field, value in content.items():
        is_way = field.endswith("_implementation") and not isinstance(value, dict)
        if (field == "auto_map" and value) or (is_way and value not in OWN_WAYS):
            return field
        if found := _wanted_code(value):
            return found
    return ""


def _checked_tokenizer(own: Any, config: Mapping[str, Any], source: str) -> Tokenizer:
    """Return the tokenizer as a `Tokenizer`, after trying it on a caption."""
    text = config["text_cfg"]
    made = getattr(own, "tokenizer", None)
    tokenizer = Tokenizer(
        lambda captions, columns: own(captions, context_length=columns).long(),
        context=own.context_length,
        pad=getattr(made, "pad_token_id", None) or 0,
        vocabulary=text.get("vocab_size", ANY if "hf_model_name" in text else 49408),
        is_trimmed=is_trimmed(text),
    )
    with _refusing(f"{source}: its tokenizer cannot be used ({{}}): download it again"):
        tokenizer(["a"])
    return tokenizer


def _fingerprint(own: Any) -> str:
    """Return a digest of a Hugging Face tokenizer; "" for the tokenizer that is part of open_clip."""
    made = getattr(own, "tokenizer", None)
    if made is None:
        return ""
    backend = getattr(made, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend else made.get_vocab()
    # These two parts describe the last call, not the tokenizer.
    known = {part: content[part] for part in content if part not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _weights_file(name: OpenClipName, published: Mapping[str, Any] | None, source: str) -> Path:
    """Return the file of a model's weights, after downloading it if necessary."""
    if name.weights:
        return name.weights
    if name.scheme == FOLDER:
        with _quiet():
            return Path(_find_checkpoint_in_dir(Path(name.model)))
    if published is None:
        fetched = _fetched(lambda: download_pretrained_from_hf(name.model), source, name.model)
    elif repository := published.get("hf_hub"):
        fetch = functools.partial(open_clip.download_pretrained, published)
        fetched = _fetched(fetch, source, "/".join(repository.split("/")[:2]))
    else:
        refusing = _refusing(
            f"{source} could not be downloaded ({{}}): download {published.get('url')} on another machine and pass "
            f"{OPEN_CLIP}:{name.model}=FILE"
        )
        with refusing, distributed.first_on_machine():
            fetched = open_clip.download_pretrained(published)
    return Path(fetched)


def _weights(
    path: Path, model: Any, source: str, *, quick_gelu: bool, name: OpenClipName
) -> dict[str, Tensor]:
    """Read the weights in a file, and rename them to the model's names.

    Raises:
        UserError: the weights belong to another architecture, are damaged, or need another
            activation than the model's.
    """
    found = read_clip(path)
    if str(path) not in source:
        source = f"{source}: {path}"
    wants_it = found.activation == "quick_gelu"
    if found.activation and wants_it != quick_gelu:
        plain = name.model.removesuffix(QUICK_GELU_ENDING)
        other = f"{OPEN_CLIP}:{plain}{QUICK_GELU_ENDING if wants_it else ''}={path}"
        remedy = (
            f"pass {other}"
            if name.scheme == OPEN_CLIP
            else f'set "quick_gelu" to {json.dumps(wants_it)} in its {MODEL_CONFIG}'
        )
        wanted = "QuickGELU" if wants_it else "GELU"
        raise UserError(f"{source} contains weights that need {wanted}: {remedy}")
    has_other = f"{name.model}{QUICK_GELU_ENDING}" in open_clip.list_models()
    if name.weights and not found.activation and not quick_gelu and has_other:
        logger.warning(
            "warning: %s does not record its activation; OpenAI's and DFN's weights need QuickGELU: for these, "
            "pass %s:%s%s=FILE",
            source,
            OPEN_CLIP,
            name.model,
            QUICK_GELU_ENDING,
        )
    remedy = "choose the architecture of the weights"
    with _refusing(f"{source} cannot be converted ({{}}): {remedy}"):
        state = _converted(found.state, model)
    return fitted(state, model.state_dict(), source=source, remedy=remedy, vital=VITAL)


def _converted(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """Convert weights of earlier versions and other packages to open_clip's names, as open_clip itself does."""
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for part in ("logit_scale", "logit_bias"):
        # A single number, stored as a tensor of zero dimensions or of one.
        if part in state and part in own and state[part].numel() == own[part].numel():
            state[part] = state[part].reshape(own[part].shape)
    if "logit_bias" in own:
        state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    positions = "text.transformer.embeddings.position_ids"
    if positions not in own:
        state.pop(positions, None)
    return state


def is_trimmed(text: Mapping[str, Any]) -> bool:
    """Check whether a text encoder reads features at a caption's end token, unaffected by the columns after it.

    Args:
        text: `text_cfg` of the model's configuration.
    """
    looks_back = not text.get("no_causal_mask") and not text.get("embed_cls")
    at_the_end = text.get("pool_type", "argmax") in ("argmax", "eos")
    return looks_back and at_the_end and not text.get("hf_model_name")


class TrimmedCLIP(open_clip.CLIP):
    """open_clip's CLIP whose text encoder is not a separate module, for any number of columns."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode tokens (b, L) as features (b, D)."""
        columns = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:columns]
        mask = None if self.attn_mask is None else self.attn_mask[:columns, :columns]
        x = self.ln_final(self.transformer(x, attn_mask=mask))  # (b, L, W)
        end = getattr(self, "text_eos_id", None)
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=end)
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x


class TrimmedTextTransformer(TextTransformer):
    """open_clip's text encoder as a separate module, for any number of columns."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)
        columns = x.shape[1]
        return x, None if mask is None else mask[..., :columns, :columns]


# open_clip's text encoders require the maximum number of columns.
ANY_COLUMNS: dict[type, Any] = {
    open_clip.CLIP: TrimmedCLIP,
    TextTransformer: TrimmedTextTransformer,
}
