"""Write the model card of an exported pair: its facts, how it was trained, its results, and how to use it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS
from evaluation.comparison import Column, Resampling, bounds, resampled_metrics, with_interval
from evaluation.result_file import Result
from models.configuration import trained_on
from models.exported import shared_settings
from models.names import open_clip_name
from runtime.choices import OPENAI_CLIPS
from utils import UserError, flag, printable

CARD_RESAMPLING = Resampling(resamples=2000, confidence=0.95, seed=0)
PARTS = {
    "clip": "CLIP (stage 1, `clip_fine_tune.py`)",
    "combiner": "Combiner (stage 2, `combiner_train.py`)",
}
MARKUP = re.compile(
    r"[\\`*_{}\[\]<>()#!|&~$]"
)  # Markdown, including the Hub's, may read these as markup
INTRODUCTION = """\
A reference image and a sentence that says what to change find the images that are like the one and as the other says.
`config.json` and the weights are all that is needed: no other model is downloaded. They were written by `export.py` of
CLIP4Cir-MoE, whose commands load them."""


@dataclass(frozen=True, kw_only=True)
class Exporting:
    """The exported pair that a model card describes.

    Attributes:
        config: the content of config.json.
        training: part -> settings of its training run, empty for a part without one.
        place: value of `--pair` in the card's commands.
    """

    config: Mapping[str, Any]
    training: Mapping[str, Mapping[str, Any]]
    place: str


def check_results(
    results: Mapping[Path, Result],
    weights: Sequence[Mapping[str, str]],
    preprocessing: Mapping[str, Any],
) -> None:
    """Check that results were obtained with a pair.

    Args:
        results: file -> its result.
        weights: digests of the pair's parts, as they are and as they are stored.
        preprocessing: preprocessing of the pair's images, see `Encoder.reported_preprocessing`.

    Raises:
        UserError: a result was measured with other weights or another preprocessing.
    """
    for file, result in results.items():
        for part, digest in result["weights_sha256"].items():
            if digest not in [known.get(part) for known in weights]:
                raise UserError(
                    f"--results {file}: weights_sha256.{part} is not the hash of the exported weights: evaluate the "
                    "exported weights"
                )
        for name, value in result["preprocessing"].items():
            if value != preprocessing.get(name):
                raise UserError(
                    f"--results {file}: preprocessing.{name} is {value}, but the exported model uses "
                    f"{preprocessing.get(name)}: evaluate again with the flags of this export"
                )


def model_card(exporting: Exporting, results: Sequence[Result]) -> str:
    """Return the card as Markdown, with the front matter that the Hugging Face Hub reads."""
    parts = [
        "---\nlicense: other\ntags:\n- composed-image-retrieval\n- clip\n---",
        f"# Composed image retrieval: {_title(exporting.config)}",
        INTRODUCTION,
        "## What it is",
        _facts(exporting.config),
        "## Training",
        *_training(exporting.training),
        "## Numbers",
        *_numbers(exporting.config, results),
        "## Use",
        _use(exporting, results),
        "## Licence",
        _licence(exporting),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """Escape any text for Markdown, as one line without markup or HTML."""
    return MARKUP.sub(r"\\\g<0>", printable(text))


def code(text: object) -> str:
    """Format any text as code in Markdown, as one line, fenced by more backticks than it has in a row."""
    line = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def _base(config: Mapping[str, Any]) -> str:
    """Return the CLIP from which training started: its name, or the name of its file."""
    name = config["recipe"]["clip_model_name"]
    if name in OPENAI_CLIPS:
        return name
    model = open_clip_name(name)
    return model.short if model else Path(name).name


def _title(config: Mapping[str, Any]) -> str:
    if config["combiner"] is None:
        return f"{plain(_base(config))} with the sum"
    kind = config["combiner"]["sizes"]["combiner_type"]
    return f"{plain(_base(config))} with a Combiner ({kind})"


def _facts(config: Mapping[str, Any]) -> str:
    """List model, preprocessing, sizes and versions."""
    preprocessing = {**config["recipe"], "clip_model_name": _base(config)}
    facts = {name.replace("_", " "): value for name, value in preprocessing.items()}
    facts["weights"] = "float16" if config["half"] else "float32"
    lines = [f"- {plain(name)}: {code(value)}" for name, value in facts.items()]
    if config["combiner"] is None:
        lines.append("- queries: the normalised sum of image and text features")
    else:
        sizes = config["combiner"]["sizes"]
        known = [f"{name} {value}" for name, value in sizes.items() if value is not None]
        lines.append(f"- queries: a Combiner, {', '.join(known).replace('_', ' ')}")
    versions = [f"{name} {version}" for name, version in config["versions"].items()]
    lines.append(f"- exported with {plain(', '.join(versions))}")
    return "\n".join(lines)


def _training(training: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe the dataset and flags with which each part was trained, if they are recorded."""
    told = {part: shared_settings(settings) for part, settings in training.items()}
    paragraphs = []
    for part, dataset in trained_on(told).items():
        flags = []
        for name, value in told[part]["flags"].items():
            if value not in (None, False) and name not in ("script", "dataset", "clip_model_name"):
                flags.append(f"{flag(name)} {value}" if value is not True else flag(name))
        paragraphs.append(f"{PARTS[part]}, on {plain(dataset)}:")
        paragraphs.append(f"```\n{printable(' '.join(flags))}\n```")
    return paragraphs or ["The weights do not record how they were trained."]


def _numbers(config: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    """Return a table for each result, with protocols as rows and metrics as columns."""
    if not results:
        return ["No results were passed to the export."]
    paragraphs = [
        f"In brackets: {CARD_RESAMPLING.confidence:.0%} confidence intervals (bootstrap over queries, resampled by "
        f"{CARD_RESAMPLING.by} image, {CARD_RESAMPLING.resamples} resamples). A protocol sets the gallery (all "
        "images of the split, or only references and targets) and whether the reference may be retrieved."
    ]
    for result in results:
        paragraphs.append(f"### {plain(_heading(config, result))}")
        paragraphs.append(_table(result))
    return paragraphs


def _heading(config: Mapping[str, Any], result: Result) -> str:
    """Return the heading of a result: benchmark, split and deviations from the defaults."""
    parts = [f"{result['dataset']} {result['split']}", result["combining_function"]]
    for part, digest in result["weights_sha256"].items():
        if digest != config[part]["weights_sha256"]:
            parts.append(f"before the weights of the {part} were rounded")
    if result["encode_precision"] != "fp32":
        parts.append(f"encoded in {result['encode_precision']}")
    left_out = sum(map(len, result["excluded_images"].values()))
    if left_out:
        parts.append(f"{left_out} images left out")
    if result["query_list"]:
        asked = sum(result["protocols"][result["protocol"]]["queries"].values())
        parts.append(f"on a list of {asked} queries")
    return ", ".join(parts)


def _table(result: Result) -> str:
    benchmark = BENCHMARKS[result["dataset"]](Path())
    column = Column(label="", results=[result])
    clusters = column.clusters(CARD_RESAMPLING)
    rows = {}
    for protocol in column.protocols:
        hits = column.hits(benchmark, protocol)
        (resampled,) = resampled_metrics(benchmark, [hits], clusters, resampling=CARD_RESAMPLING)
        intervals = bounds(resampled, CARD_RESAMPLING.confidence)
        cells = {}
        for metric, title in benchmark.titled(intervals).items():
            (value,) = column.values(protocol, metric)
            cells[title] = with_interval(value, intervals[metric])
        rows[protocol] = cells
    return _markdown(rows)


def _markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Format rows, by name, as a Markdown table. All rows have the same columns."""
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    for name, cells in rows.items():
        lines.append([plain(name), *(cells[column] for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _use(exporting: Exporting, results: Sequence[Result]) -> str:
    """Return commands that load the pair, for the benchmarks that it was trained or evaluated on."""
    datasets = [*trained_on(exporting.training).values(), *(r["dataset"] for r in results)]
    place = shlex.quote(exporting.place)
    commands = [
        f"python src/validate.py --dataset {dataset} --pair {place}"
        for dataset in dict.fromkeys(datasets)
    ]
    commands += [
        f"python src/search.py index --images photos/ --output photos_index --pair {place}",
        "python src/search.py query --index photos_index --image photos/shirt.jpg --text 'is red and has no sleeves'",
    ]
    listed = "\n".join(map(printable, commands))
    return f"```bash\n{listed}\n```"


def _licence(exporting: Exporting) -> str:
    """Describe the licence of the weights."""
    base = _base(exporting.config)
    terms = f"The weights were initialised from {code(base)}, whose terms apply to them."
    if base in OPENAI_CLIPS:
        terms = f"The weights were initialised from OpenAI's CLIP `{base}`, which is under the MIT licence."
    datasets = sorted(set(trained_on(exporting.training).values()))
    if datasets:
        named = plain(" and ".join(datasets))
        terms += (
            f" They were trained on {named}: the terms of its annotations and images also apply."
        )
    return terms
