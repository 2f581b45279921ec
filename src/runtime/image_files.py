"""Decode image files, as they were saved or as a viewer shows photos, and make small JPEGs of them."""

import contextlib
import functools
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

from runtime.choices import ORIGINAL, WHITE
from runtime.image_source import IMAGES
from utils import UserError, first_line

try:
    import pi_heif
except ImportError:
    HEIF_KINDS: set[str] = set()
else:
    pi_heif.register_heif_opener()
    HEIF_KINDS = {".heic", ".heif"}
AVIF_KINDS = {".avif"} if features.check("avif") else set()

# Formats that are accepted. Pillow's decoders of other formats are old, or start other programs.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
if AVIF_KINDS:
    FORMATS += ("AVIF",)
if HEIF_KINDS:
    FORMATS += ("HEIF",)

# Exceptions of Pillow's decoders for damaged files.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError, TypeError, LookupError, AttributeError,
    ArithmeticError, AssertionError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
# In pixels. Padded to a square, an image with this side needs 1.3 GB in RGB, and 2.5 GB with transparency.
LONGEST_SIDE = 18_000
SHRINK = "scale it down, for example with ImageMagick: magick FILE -resize 12000x12000 FILE"

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # all other chunks are metadata

WHITES = (1, 255, 65_535)  # possible values of white in images with more than 8 bits
ROWS = 256  # rows of an image with more than 8 bits that are scaled at a time
SAME_COLOUR = 2  # out of 255; a profile that changes no colour by more counts as sRGB

Used = TypeVar("Used")


def decoded(
    file: Path | BinaryIO, formats: tuple[str, ...] | None = None, side: int | None = None
) -> Image.Image:
    """Decode an image as it was saved.

    Args:
        formats: Pillow's formats that the image may have; None for all.
        side: minimum length of the shorter side in pixels; a larger JPEG may be scaled down to
            decode it faster.

    Raises:
        PIL.UnidentifiedImageError: the file is not an image. PIL.Image.DecompressionBombError: the
        image has too many pixels, or a side so long that padding needs gigabytes.
        OSError: the image is damaged, or is not a file.
    """

    def decode(image: Image.Image) -> Image.Image:
        if max(image.size) > LONGEST_SIDE:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height}, a side above {LONGEST_SIDE:,} pixels"
            )
        if side:
            image.draft("RGB", (side, side))
        image.load()
        return image

    if isinstance(file, str | os.PathLike):
        with IMAGES.open(Path(file)) as stream:
            return _opened(stream, formats, decode)
    return _opened(file, formats, decode)


def image_size(file: BinaryIO, formats: tuple[str, ...]) -> tuple[int, int]:
    """Return width and height of an image in pixels, without decoding it. Raises the same exceptions as `decoded`."""
    return _opened(file, formats, lambda image: image.size)


def _opened(
    file: BinaryIO, formats: tuple[str, ...] | None, use: Callable[[Image.Image], Used]
) -> Used:
    """Apply a function to an opened image; if that fails for a PNG, apply it to the image without its metadata."""
    try:
        try:
            with Image.open(file, formats=formats) as image:
                return use(image)
        except DECODING_ERRORS:
            bare = _without_metadata(file)
            if not bare:
                raise
        with Image.open(io.BytesIO(bare), formats=formats) as image:
            return use(image)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("not an image of a known format") from None
    except OSError:
        raise
    except DECODING_ERRORS as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def _without_metadata(file: BinaryIO) -> bytes:
    """Return a PNG without metadata, except for undamaged EXIF data; return b"" for another file."""
    file.seek(0)
    if file.read(len(PNG)) != PNG:
        return b""
    content = file.read()
    kept = [PNG]
    start = 0
    while start < len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        chunk = content[start : start + length + 12]
        kind = chunk[4:8]
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind in PNG_PIXELS or (kind == b"eXIf" and is_whole):
            kept.append(chunk)
        start += length + 12
    return b"".join(kept)


def read_photo(
    file: Path | BinaryIO,
    background: str = WHITE,
    *,
    side: int | None = None,
    formats: tuple[str, ...] | None = FORMATS,
) -> Image.Image:
    """Read a photo as a viewer shows it, in RGB: upright, with 8 bits, in sRGB, on a background.

    Args:
        background: one of BACKGROUNDS, which replaces transparent pixels; ORIGINAL means white
            here.
        side, formats: see `decoded`, also for the exceptions.
    """
    image = decoded(file, formats, side)
    with contextlib.suppress(*DECODING_ERRORS):  # damaged EXIF data affect only the orientation
        ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    alpha = None
    if is_transparent(image):
        has_channel = "A" in image.getbands()
        alpha = (image if has_channel else image.convert("RGBA")).getchannel("A")
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode) if profile else None
    if transform is not None:
        image = transform.apply(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is None:
        return image
    ground = Image.new("RGB", image.size, WHITE if background == ORIGINAL else background)
    ground.paste(image, mask=alpha)
    return ground


def is_transparent(image: Image.Image) -> bool:
    """Check whether an image has transparency; an image that has lost its palette has none."""
    return (image.mode != "P" or image.palette is not None) and image.has_transparency_data


@functools.lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile's colours to sRGB; None if they are sRGB or the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode != "RGB":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
    seen = np.asarray(transform.apply(Image.fromarray(colours)))
    return transform if np.abs(seen.astype(int) - colours).max() > SAME_COLOUR else None


def has_more_bits(image: Image.Image) -> bool:
    """Check whether an image has more than 8 bits per channel; Pillow's conversion to RGB clips values above 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image with more than 8 bits per channel to 8 bits; Pillow's own conversion would make it white."""
    if not has_more_bits(image):
        return image
    values = np.asarray(image)
    # Scaled in parts, because a large image needs gigabytes as float64.
    parts = [slice(top, top + ROWS) for top in range(0, image.height, ROWS)]
    largest = max(_finite(values[part]).max() for part in parts)
    largest = max(largest, 0)
    white = next((value for value in WHITES if largest <= value), largest)
    eight = np.empty(values.shape, np.uint8)
    for part in parts:
        scaled = _finite(values[part]).clip(0) * 255 / white
        eight[part] = scaled.round()
    grey = Image.fromarray(eight)
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(values != image.info["transparency"]))
    return grey


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64))


def unreadable(file: object, error: Exception) -> UserError:
    """Return the error for an image that cannot be decoded, with the reason and a remedy."""
    remedy = "replace the file with a complete copy of the image"
    if isinstance(error, Image.DecompressionBombError):
        remedy = SHRINK
    elif Path(str(file)).suffix.lower() in {".heic", ".heif"} - HEIF_KINDS:
        remedy = "pip install pi-heif, or convert it to JPEG"
    return UserError(f"image {file} cannot be decoded ({first_line(error)}): {remedy}")


def thumbnail(file: Path | BinaryIO, side: int, background: str = WHITE) -> bytes:
    """Make a JPEG of a photo, at most `side` pixels wide and high; of a grey square if it is missing or damaged."""
    try:
        image = read_photo(file, background, side=side)
    except (OSError, ValueError, Image.DecompressionBombError):
        image = Image.new("RGB", (side, side), "lightgrey")
    return jpeg(image, side)


def jpeg(image: Image.Image, side: int, quality: int = 80) -> bytes:
    """Make a JPEG of an RGB image, at most `side` pixels wide and high, without comments or colour profile."""
    copy = image.copy()
    copy.info.clear()  # Pillow would write these metadata
    copy.thumbnail((side, side))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
