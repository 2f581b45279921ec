"""Augment the images of stage 1: mirror them and crop them to squares, at random in each epoch."""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import TrainingData
from training.step import Batch, Batches

# Words for directions and writing, in English and Vietnamese. A mirrored image makes captions with them false.
DIRECTED = re.compile(
    r"\b(left|right)(most|wards?)?\b|\b(clockwise|counter-?clockwise|anti-?clockwise|directions?|sideways|profile"
    r"|opposite|other (way|side)|facing|faces|mirror\w*|flip\w*|revers\w*"
    r"|texts?|letter(s|ing|ed)?|words?|wording|writing|written|writes|logos?|numbers?|numerals?|digits?|says|saying"
    r"|reads|slogans?|trái|phải|hướng|quay|lật|ngược|chữ)\b",
    re.IGNORECASE,
)
AT_A_TIME = 64  # number of images in memory as float32 at a time


def augmented(batches: Batches, data: TrainingData, flags: Any, images: int) -> Batches:
    """Return stage 1's batches with images mirrored and cropped at random.

    The random numbers depend only on the seed, the epoch and the position in the batch. All images of a triplet are
    mirrored together, but each is cropped separately.

    Args:
        flags: flags of stage 1.
        images: number of images of a triplet: its reference, its target and its hard negatives.
    """
    if not flags.flip and flags.crop == 1:
        return batches
    order = data.order
    triplets = data.train.triplets
    undirected = torch.tensor([not DIRECTED.search(" ".join(t.captions)) for t in triplets])

    def changed(epoch: int, first_step: int = 0) -> Iterable[Batch]:
        rows, _ = order.whole_batches(epoch)
        generator = order.generator(epoch, "images")
        drawn = torch.rand((*rows.shape, 1 + 3 * images), generator=generator)
        mirrored = order.own((drawn[..., 0] < flags.flip) & undirected[rows])[first_step:]
        boxes = order.own(drawn[..., 1:])[first_step:]  # (steps, b, 3 * images)
        steps = zip(batches(epoch, first_step), mirrored, boxes, strict=True)
        for ((references, targets, *others), ids), mirrors, own_boxes in steps:
            compared = targets.view(len(targets), -1, *targets.shape[-3:])  # (b, 1 + N, 3, R, R)
            pixels = torch.cat([references.unsqueeze(1), compared], dim=1)
            is_mirrored = mirrors.to(ids.device).view(-1, 1, 1, 1, 1)
            pixels = torch.where(is_mirrored, pixels.flip(-1), pixels)
            if flags.crop < 1:
                area, *place = own_boxes.to(ids.device).reshape(-1, 3).unbind(1)
                areas = flags.crop + (1 - flags.crop) * area
                squares = cropped(pixels.flatten(0, 1), areas, torch.stack(place, 1))
                pixels = squares.reshape_as(pixels)
            yield [pixels[:, 0], pixels[:, 1:].reshape_as(targets), *others], ids

    return changed


def cropped(images: Tensor, areas: Tensor, places: Tensor) -> Tensor:
    """Return a square crop of each image, resized to the size of the image by bilinear interpolation.

    Args:
        images: (n, 3, R, R) uint8.
        areas: (n,) area of each crop, as a fraction of the image's area.
        places: (n, 2) position of each crop, from 0 at the left and the top to 1 at the right and the bottom.
    """
    sides = areas.sqrt().unsqueeze(1)  # (n, 1) as fractions of the image's side
    middles = (1 - sides) * (2 * places - 1)  # (n, 2) in coordinates from -1 to 1
    maps = torch.cat([torch.diag_embed(sides.expand(-1, 2)), middles.unsqueeze(2)], dim=2)
    parts = []
    for some, own in zip(images.split(AT_A_TIME), maps.split(AT_A_TIME), strict=True):
        grid = F.affine_grid(own, list(some.shape), align_corners=False)
        pixels = F.grid_sample(some.float(), grid, padding_mode="border", align_corners=False)
        parts.append(pixels.round().to(torch.uint8))
    return torch.cat(parts)
