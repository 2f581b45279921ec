"""Every setting of a training, and those that other scripts share with it, by subject."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from benchmarks import BENCHMARKS
from runtime.choices import (
    AUTO,
    BACKGROUNDS,
    COMBINER_TYPES,
    DECODINGS,
    ENCODE_PRECISIONS,
    ENCODERS,
    HARD_NEGATIVES,
    LORA_TARGETS,
    LOSSES,
    MINED,
    NEGATIVES,
    PRECISIONS,
    TRANSFORMS,
)
from runtime.trackers import TRACKERS
from settings.declaring import (
    AnyText,
    Flags,
    OneOf,
    Typed,
    UsablePath,
    changed,
    names_where,
    setting,
)
from settings.flag_types import MILLION, in_any_case, model_name, path_or_auto
from settings.recipes import RECIPES
from utils import PROJECT_ROOT

Count = Annotated[int, Field(ge=1, le=MILLION)]
Number = Annotated[int, Field(ge=0, le=MILLION)]
Rows = Annotated[int, Field(ge=1, le=10**9)]  # of a table in memory: as many as there are, if fewer
Workers = Annotated[int, Field(ge=0, le=256)]  # a process of some hundred megabytes each
Width = Annotated[int, Field(ge=1, le=100_000)]  # of a layer
Experts = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Positive = Annotated[float, Field(ge=1e-9, le=1e9)]
LearningRate = Annotated[float, Field(ge=1e-12, le=100)]
Weight = Annotated[float, Field(ge=0, le=MILLION)]  # of a part of the loss
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=1e-9, le=1 - 1e-9)]
# Of an image; below 1 it pads all images, and by more than it needs at most tenfold.
SideRatio = Annotated[float, Field(ge=0.1, le=1000)]
BenchmarkName = Annotated[str, Typed(in_any_case(list(BENCHMARKS))), OneOf(BENCHMARKS)]
ClipName = Annotated[str, Typed(model_name)]
CachePlace = Annotated[
    Path | str, Typed(path_or_auto, lambda text: text if text == AUTO else Path(text))
]


class Origin(Flags):
    """How a training was started."""

    script: AnyText = setting("", where="computes")
    command: AnyText = setting("", where="free")
    started_in: AnyText | None = setting(None, where="free")


class Dataset(Flags):
    """Which benchmark."""

    title = "benchmark"
    dataset: BenchmarkName = setting(..., "which benchmark, in upper or lower case")


class Data(Flags):
    """Where benchmarks are."""

    title = "data"
    data_root: UsablePath = setting(
        PROJECT_ROOT,
        "the folder that holds fashionIQ_dataset/, cirr_dataset/ and the like (default: the project's root)",
        metavar="DIR",
        where="free",
    )


class Device(Flags):
    """What computes."""

    title = "machine"
    device: AnyText | None = setting(
        None,
        "what computes, such as cuda:1 or cpu (default: cuda where there is one)",
        metavar="DEV",
        where="free",
    )


class Decoding(Flags):
    """Processes, which pay where many images are decoded."""

    title = "machine"
    num_workers: Workers = setting(
        min(8, os.cpu_count() or 1),
        "processes that decode images (default: one a CPU core, at most 8)",
        where="free",
    )


class Evaluation(Flags):
    """What is left out of the data, and how much of it is ranked at a time."""

    title = "evaluation"
    exclusions: UsablePath | None = setting(
        None,
        "leave out the images of a list that check_dataset.py wrote",
        metavar="FILE",
        where="moves",
    )
    similarity_block: Rows | None = setting(
        None,
        "queries whose similarities to the gallery are in memory at a time (default: at most 1 GiB)",
        metavar="ROWS",
        where="free",
    )


class Clip(Flags):
    """Which CLIP, how its images are preprocessed and in what precision it encodes; None where the flags are silent."""

    title = "CLIP"
    about = "what no flag says is as the weights were trained; where there are none, the default"
    clip_model_name: ClipName | None = setting(
        None,
        "which CLIP: a name of --list-models, or a checkpoint's path (default: RN50x4)",
        metavar="NAME",
    )
    transform: Annotated[str, OneOf(TRANSFORMS)] | None = setting(
        None, "how images are padded and cut to a square (default: targetpad)"
    )
    target_ratio: SideRatio | None = setting(
        None, "how long and narrow an image may be that targetpad does not pad (default: 1.25)"
    )
    encode_precision: Annotated[str, OneOf(ENCODE_PRECISIONS)] | None = setting(
        None,
        "arithmetic of features that nothing learns from: validations, frozen ones, indexes (default: fp32)",
    )
    decode: Annotated[str, OneOf(DECODINGS)] | None = setting(
        None,
        "how images are decoded; draft: large JPEG files at 1/2, 1/4 or 1/8: faster, other pixels (default: full)",
    )
    background: Annotated[str, OneOf(BACKGROUNDS)] | None = setting(
        None,
        "what transparent images are read on; with a color, images are read upright, scaled to 8 bits and in sRGB; "
        "original: as the original reads them (default: white, but original for published benchmarks)",
    )


class TunedClip(Flags):
    """Weights of stage 1."""

    title = "fine-tuned CLIP"
    clip_model_path: UsablePath | None = setting(
        None, "weights of stage 1: a checkpoint, or a run's folder", metavar="PATH", where="moves"
    )


class Training(Flags):
    """What both stages of training share."""

    title = "training"
    recipe: Annotated[str, OneOf(RECIPES)] = setting(
        "original",
        "values in place of the defaults of flags that are not given, see docs/recipe.md; original: none",
    )
    num_epochs: Count = setting(300, "passes over the triplets")
    batch_size: Count = setting(512, "triplets of a step, of all processes together")
    validation_frequency: Count = setting(1, "epochs from one validation to the next")
    validate_last: bool = setting(False, "validate after the last epoch too")
    save_training: bool = setting(False, "save weights at validations")
    save_best: bool = setting(False, "save only the best weights, not those of each validation")
    save_every: Count | None = setting(
        None, "save weights after every N epochs too, validated or not", metavar="N", where="free"
    )
    seed: Seed = setting(0, "random seed of new weights, of the order of triplets and of dropout")
    seeds: list[Seed] | None = setting(
        None, "train once with each of some seeds, in place of --seed"
    )
    output_dir: UsablePath = setting(
        PROJECT_ROOT / "models", "the folder that holds the runs", metavar="DIR", where="free"
    )
    resume: UsablePath | None = setting(
        None, "go on with the run in a folder, with its flags", metavar="RUN_DIR", where="free"
    )
    verify: bool = setting(
        False,
        "tell changed images by all of their bytes, in caches and when the run is resumed (default: by size, "
        "modification time and the first, middle and last 4 KiB)",
    )
    checkpoint_every_minutes: Positive = setting(
        10.0,
        "how often the state is saved within epochs: what a crash may cost at most",
        metavar="M",
        where="free",
    )
    precision: Annotated[str, OneOf(PRECISIONS)] = setting(
        "amp", "arithmetic of the training; amp: fp16 on CUDA, fp32 on the CPU"
    )
    compile: bool = setting(False, "compile what is trained, with torch.compile")

    @field_validator("seeds")
    @classmethod
    def each_seed_once(cls, seeds: list[int] | None) -> list[int] | None:
        """Each seed has a folder."""
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
            raise PydanticCustomError("seeds", "it names a seed twice: name each once")
        return seeds

    @property
    def validated_epochs(self) -> list[int]:
        """The epochs that a validation follows: the first, and so on as the original; if asked for, the last."""
        epochs = list(range(0, self.num_epochs, self.validation_frequency))
        last = self.num_epochs - 1
        return [*epochs, last] if self.validate_last and epochs[-1] != last else epochs

    @property
    def saved_epochs(self) -> list[int]:
        """The epochs whose weights are saved whatever the validations say."""
        epochs = set()
        if self.save_training and not self.save_best:
            epochs.update(self.validated_epochs)
        if self.save_every:
            epochs.update(range(self.save_every - 1, self.num_epochs, self.save_every))
        return sorted(epochs)


class BeyondOriginal(Flags):
    """What the original's trainings have not."""

    title = "training, beyond the original"
    about = "all off by default"
    mask_duplicate_targets: bool = setting(
        False,
        "triplets of a batch with the same target are not each other's negatives",
        off="they are, whatever the recipe says",
    )
    loss: Annotated[str, OneOf(LOSSES)] = setting(
        "contrastive", "what is minimised; symmetric: targets look for their queries too"
    )
    learn_temperature: bool = setting(
        False, "learn the temperature of the loss, from the original's 1/100 on and never below"
    )
    label_smoothing: Annotated[float, Field(ge=0, le=1 - 1e-9)] = setting(
        0.0, "share of a query's answer that is spread evenly over all it is compared with"
    )
    hard_negatives: Number = setting(
        0, "further images a triplet, each a negative of all queries of the batch", metavar="N"
    )
    hard_negatives_from: Annotated[str, OneOf(HARD_NEGATIVES)] = setting(
        MINED,
        "where they are from; mined: images near the target; group: the triplet's group (CIRR); column: `negatives` of "
        "own triplets",
    )
    negatives_margin: Share = setting(
        0.05, "mine no image whose cosine to the target is above 1 - M", metavar="M"
    )
    warmup_steps: Number = setting(0, "steps in which the learning rate rises linearly")
    cosine: bool = setting(
        False,
        "let the learning rate fall to 0, along half a cosine",
        off="keep it, whatever the recipe says",
    )
    clip_grad_norm: Positive | None = setting(
        None,
        "clip the gradient to a norm",
        metavar="NORM",
        off="clip none, whatever the recipe says",
    )
    ema_decay: Fraction | None = setting(
        None,
        "evaluate and save a moving average of the weights",
        metavar="DECAY",
        off="average none, whatever the recipe says",
    )


class Regularisation(Flags):
    """What both stages learn in spite of."""

    title = "regularisation and noise, beyond the original"
    about = "all off by default, see docs/recipe.md"
    drop_text: Share = setting(
        0.0, "share of the queries of a step whose text is left out", metavar="P"
    )
    drop_image: Share = setting(
        0.0, "share of the queries of a step whose image is left out, never both", metavar="P"
    )
    noise: Share = setting(
        0.0,
        "share of the training triplets whose targets are shuffled among them: how robust a training is",
        metavar="S",
    )
    noise_seed: Seed = setting(0, "random seed of these, whatever the seed of the training")

    @field_validator("drop_image")
    @classmethod
    def never_both(cls, drop_image: float, info: ValidationInfo) -> float:
        """A query keeps its image or its text."""
        if info.data.get("drop_text", 0) + drop_image > 1:
            raise PydanticCustomError("drop_image", "with drop_text it should be at most 1")
        return drop_image


class Tracking(Flags):
    """What mirrors a run."""

    title = "tracking"
    about = "beside the CSV files of the run"
    tracker: list[Annotated[str, OneOf(TRACKERS)]] = setting(
        [],
        "what mirrors the run, several too; TensorBoard's files are in the run's folder",
        where="free",
    )
    api_key: AnyText | None = setting(
        None, "key of an account of Comet; no file keeps it", where="secret"
    )
    workspace: AnyText | None = setting(
        None, "workspace of Comet that the run appears in", where="free"
    )
    experiment_name: AnyText | None = setting(
        None, "what trackers call the run (default: its folder's name)", where="free"
    )


class FineTuning(Flags):
    """What learns in stage 1, and how fast."""

    title = "stage 1"
    encoder: Annotated[str, OneOf(ENCODERS)] = setting("both", "which encoders of CLIP learn")
    learning_rate: LearningRate = setting(2e-6, "learning rate of AdamW")
    micro_batch_size: Count | None = setting(
        None, "triplets in memory at a time; the gradient stays exact", metavar="N"
    )
    mine_every: Count = setting(
        1,
        "epochs after which hard negatives are mined again, with the weights of then",
        metavar="E",
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations a second time, not to keep them: less memory, more time"
    )
    flip: Share = setting(
        0.0,
        "probability that reference and target are mirrored together, unless a caption says what a mirror changes",
        metavar="P",
    )
    crop: Annotated[float, Field(ge=0.01, le=1)] = setting(
        1.0, "least share of an image's area that a random square of it keeps", metavar="S"
    )
    image_cache: CachePlace | None = setting(
        AUTO,
        "keep preprocessed images on disk (default: in pixels/ of the project, if it has room and repays)",
        metavar="DIR",
        where="free",
        off="keep no preprocessed images on disk",
    )


class Lora(Flags):
    """Adapters that learn in place of CLIP's weights."""

    title = "LoRA"
    about = "off by default; needs requirements-lora.txt"
    lora_rank: Width | None = setting(
        None, "learn low-rank adapters of CLIP's layers alone, of some rank", metavar="R"
    )
    lora_targets: Annotated[str, OneOf(LORA_TARGETS)] = setting(
        LORA_TARGETS[0], "which layers of the encoders that learn have adapters"
    )
    lora_norms: bool = setting(False, "let the norms learn beside the adapters")

    @field_validator("lora_targets", "lora_norms")
    @classmethod
    def only_with_adapters(cls, value: str | bool, info: ValidationInfo) -> str | bool:
        """Where there are adapters."""
        if value not in (False, LORA_TARGETS[0]) and not info.data.get("lora_rank"):
            raise PydanticCustomError("lora", "it is of adapters: give --lora-rank too")
        return value


class Combiner(Flags):
    """Kind and sizes of a Combiner that is trained."""

    title = "Combiner"
    combiner_type: Annotated[str, OneOf(COMBINER_TYPES)] = setting(
        "moe", "kind of Combiner; moe: with experts; clip4cir: that of CLIP4Cir"
    )
    projection_dim: Width = setting(2560, "width that either feature is projected to")
    hidden_dim: Width = setting(5120, "width of the hidden layers")
    num_experts: Experts = setting(4, "experts of a mixture")
    top_k: Experts = setting(2, "experts of a mixture that a query goes to")
    shared_expert: bool = setting(
        False, "give a mixture one more expert, which every query goes through (Dai et al. 2024)"
    )
    router_norm: bool = setting(False, "layer-normalise what the router of a mixture sees")

    @field_validator("top_k")
    @classmethod
    def no_more_than_experts(cls, top_k: int, info: ValidationInfo) -> int:
        """A query goes to at most all experts of a mixture."""
        experts = info.data.get("num_experts")
        if experts and top_k > experts and info.data.get("combiner_type") != "clip4cir":
            raise PydanticCustomError(
                "top_k", "it should be at most num_experts, {experts}", {"experts": experts}
            )
        return top_k


class WantedCombiner(Flags):
    """What a Combiner of a checkpoint is wanted to be; None where the flags are silent."""

    title = "Combiner"
    about = "a flag that disagrees with the checkpoint is an error"
    silent: ClassVar[str] = " (default: the checkpoint's)"
    combiner_type: Annotated[str, OneOf(COMBINER_TYPES)] | None = changed(
        Combiner, "combiner_type", None, silent
    )
    projection_dim: Width | None = changed(Combiner, "projection_dim", None, silent)
    hidden_dim: Width | None = changed(Combiner, "hidden_dim", None, silent)
    num_experts: Experts | None = changed(Combiner, "num_experts", None, silent)
    top_k: Experts | None = changed(Combiner, "top_k", None, silent)
    shared_expert: bool | None = changed(Combiner, "shared_expert", None, silent)
    router_norm: bool | None = changed(Combiner, "router_norm", None, silent)


class Frozen(Flags):
    """What is particular to stage 2."""

    title = "stage 2"
    combiner_lr: LearningRate = setting(2e-5, "learning rate of Adam")
    negatives: Annotated[str, OneOf(NEGATIVES)] = setting(
        "batch",
        "what a query is told apart from; bank: from all training targets, not those of its batch alone",
    )
    feature_noise: Weight = setting(
        0.0,
        "noise on reference and caption features, as a share of their lengths",
        metavar="SIGMA",
    )
    mix: Weight = setting(
        0.0,
        "mix the triplets of a step in pairs, by a share from Beta(ALPHA, ALPHA) (Zhang et al. 2018)",
        metavar="ALPHA",
    )
    load_balancing_weight: Weight = setting(
        0.0,
        "weight of the loss that spreads queries over the experts (Fedus et al. 2021), 0 in the original",
        metavar="W",
    )
    router_z_weight: Weight = setting(
        0.0,
        "weight of the loss that keeps the router's logits small (Zoph et al. 2022), 0 in the original",
        metavar="W",
    )
    router_noise: Weight = setting(
        0.0,
        "standard deviation of noise on the router's logits in training (Shazeer et al. 2017), 0 in the original",
        metavar="SIGMA",
    )
    router_bias: Weight = setting(
        0.0,
        "how far each step moves a bias on the choice of experts against their load (Wang et al. 2024), 0 in the "
        "original: no bias",
        metavar="RATE",
    )
    clip_bs: Count = setting(32, "images or texts that CLIP encodes at a time")
    feature_cache: UsablePath | None = setting(
        PROJECT_ROOT / "features",
        "the folder that keeps features on disk",
        metavar="DIR",
        where="free",
        off="keep no features on disk",
    )

    @field_validator("mix")
    @classmethod
    def targets_of_a_batch(cls, mix: float, info: ValidationInfo) -> float:
        """Mixed targets are in no bank, and are no neighbours of any image."""
        if mix and (info.data.get("negatives") == "bank" or info.data.get("hard_negatives")):
            raise PydanticCustomError(
                "mix", "it should be 0 with --negatives bank and --hard-negatives"
            )
        return mix


class BothStages(
    Origin,
    Dataset,
    Clip,
    Training,
    BeyondOriginal,
    Regularisation,
    Tracking,
    Data,
    Decoding,
    Device,
    Evaluation,
):
    """What both trainings take."""


class Stage1(FineTuning, Lora, BothStages):
    """All that fine-tuning CLIP takes."""


class Stage2(Frozen, Combiner, TunedClip, BothStages):
    """All that training a Combiner takes."""

    batch_size: Count = changed(Training, "batch_size", 1024)
    validation_frequency: Count = changed(Training, "validation_frequency", 3)


class AnyTraining(Stage1, Stage2):
    """What a run or a checkpoint may say of its training, whichever it was."""

    dataset: BenchmarkName | None = setting(None, "which benchmark, in upper or lower case")  # type: ignore[assignment]


# The script of a training -> its settings.
STAGES: dict[str, type[BothStages]] = {"clip_fine_tune.py": Stage1, "combiner_train.py": Stage2}
# What may be another when a run is resumed, and of that what names files whose content is computed with.
FREE_FLAGS = names_where(AnyTraining, "free", "moves", "secret")
MOVABLE_FLAGS = names_where(AnyTraining, "moves")


@dataclass(frozen=True, kw_only=True)
class PairChoice:
    """The trained pair that an evaluation asks for.

    Attributes:
        combining_function: one of COMBINING_FUNCTIONS; None for the combiner where its path is given, else the sum.
        clip_path: stage-1 weights, None for the model's own.
        combiner_path: stage-2 weights.
        exported: an exported pair, which stands for both paths: its folder, or "hf-hub:" and a repository.
        workers: processes that decode images.
        feature_cache: keeps the features of what is measured; None for none.
        told_by: how it tells a changed image, see `runtime.files.stamp`.
    """

    combining_function: str | None
    clip_path: Path | None
    combiner_path: Path | None
    exported: Path | str | None = None
    clip: Clip = field(default_factory=Clip)
    combiner: WantedCombiner = field(default_factory=WantedCombiner)
    workers: int = 0
    feature_cache: Path | None = None
    told_by: str = "sample"
