"""
Images on their way to a model: decoded once, then augmented and normalised batch by batch in the collator.

Shape suffixes: B batch, N channels, Y height, X width.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as EncodedImage
from datasets.formatting.formatting import LazyBatch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.image_utils import load_image

from .counted import counted
from .labels import name_some


Augmentation = Callable[[Tensor], Tensor]

# Small images are decoded together up to so many pixels, by which a character takes a fourth of the time.
PIXELS_AT_ONCE = 2**16


def decode_images(rows: Mapping[str, Sequence], image_processor: BaseImageProcessor) -> dict[str, list[bytes]]:
    """
    Decodes images, converts and resizes them as the processor says, and keeps the raw bytes, for `map`:

    ```python
    data = data.map(partial(decode_images, image_processor=processor), batched=True, remove_columns=["image"])
    ```

    A file format is undone once here instead of in every epoch: 54 microseconds for a character of 28x28, 136 for a
    photograph of 32x32, against 11 for the bytes. Whatever the `batch_size` of `map`, no more than one large image is
    in memory at a time.

    Args:
        rows (`Mapping[str, Sequence]`): A batch of rows with a column `image`, of PIL images or arrays.
        image_processor ([`~transformers.BaseImageProcessor`]): Gives all images one shape.

    Returns:
        `dict[str, list[bytes]]`: `pixel_values`, unsigned bytes in the order channel, row, column, for
        [`ImageCollator`].

    Raises:
        ValueError: When there is no such column, or names the images of the batch that cannot be decoded.
    """
    if "image" not in rows:
        raise ValueError(
            f"There is no column `image` among {list(rows)}: rename it, `load_source(..., image_column=...)`."
        )
    if not isinstance(rows, LazyBatch) and isinstance(rows["image"], Image.Image):
        raise ValueError("`rows` is a single row: give `map` the argument `batched=True`.")
    decode = _Decoder(image_processor)
    decoded: list[bytes] = []
    waiting: list[Any] = []
    images, pixels = _one_by_one(rows), 0
    while True:
        row = len(decoded) + len(waiting)
        try:
            waiting.append(decode.read(next(images)))
        except StopIteration:
            break
        except Exception as error:
            raise ValueError(_in_row(rows, row, error) + _others(decode, rows, row)) from error
        pixels += math.prod(waiting[-1].size if isinstance(waiting[-1], Image.Image) else np.shape(waiting[-1]))
        if pixels >= PIXELS_AT_ONCE:
            decoded += _decode_all(decode, waiting, rows, len(decoded))
            waiting, pixels = [], 0
    return {"pixel_values": decoded + _decode_all(decode, waiting, rows, len(decoded))}


def name_undecodable(datasets: Mapping[str, Dataset], image_processor: BaseImageProcessor, known: str) -> str:
    """
    Names the images of datasets that [`decode_images`] fails at, for a message that knows those of one batch.

    Args:
        datasets (`Mapping[str, datasets.Dataset]`): With a column `image`, by what they are called.
        image_processor ([`~transformers.BaseImageProcessor`]): As in [`decode_images`].
        known (`str`): The message. Images that it has by name are left out.

    Returns:
        `str`: A sentence to follow it; nothing where it has all.
    """
    decode, faults = _Decoder(image_processor), []
    for name, rows in datasets.items():
        encoded = rows.cast_column("image", EncodedImage(decode=False))
        for row in range(len(rows)):
            try:
                decode([decode.read(rows[row]["image"])])
            except Exception:
                faults.append(_path(encoded[row]) or f"row {row} of the {name}")
    # As whole names: "3.png" is part of "13.png".
    told = (rf"(?<![\w./-]){re.escape(fault)}(?![\w-])" for fault in dict.fromkeys(faults))
    more = [fault for fault, it in zip(dict.fromkeys(faults), told, strict=True) if not re.search(it, known)]
    return f" And with {counted(len(more), 'image')} of other batches: {name_some(more)}." if more else ""


def _one_by_one(rows: Mapping[str, Sequence]) -> Iterator[Any]:
    """The images of a batch of `map`, which by itself would decode all of them before it gives the first."""
    if isinstance(rows, LazyBatch) and "image" in rows.keys_to_format:
        for row in range(rows.pa_table.num_rows):
            yield _image(rows, row)
    else:
        yield from rows["image"]


def _image(rows: Mapping[str, Sequence], row: int) -> Any:
    """One image of a batch of `map`, and of it alone."""
    if isinstance(rows, LazyBatch) and "image" in rows.keys_to_format:
        return rows.formatter.format_column(rows.pa_table.select(["image"]).slice(row, 1))[0]
    return rows["image"][row]


def _decode_all(decode: "_Decoder", images: list[Any], rows: Mapping[str, Sequence], start: int) -> list[bytes]:
    """Together, which is faster for small images; one by one to find the row at fault."""
    if not images:
        return []
    try:
        return decode(images)
    except Exception:
        decoded = []
        for row, image in enumerate(images, start):
            try:
                decoded += decode([image])
            except Exception as error:
                raise ValueError(_in_row(rows, row, error) + _others(decode, rows, row)) from error
        return decoded


def _in_row(rows: Mapping[str, Sequence], row: int, error: Exception) -> str:
    values, count = _values(rows, row), _count(rows)
    path = _path(values)
    beside = "".join(f", `{name}` {str(v)[:80]!r}" for name, v in values.items() if isinstance(v, int | str))
    place = f"row {row} of this batch of `map` ({count} rows{beside})"
    begin = f"The image {path!r}, {place}," if path else f"`image` of {place}"
    return f"{begin} cannot be decoded: {str(error)[:300].rstrip('.')}. Mend the image, or leave it out."


def _others(decode: "_Decoder", rows: Mapping[str, Sequence], first: int) -> str:
    """Names those of a batch after the first that cannot be read either: copies that broke off leave many."""
    faults = []
    for row in range(first + 1, _count(rows)):
        try:
            decode([decode.read(_image(rows, row))])
        except Exception:
            faults.append(_path(_values(rows, row)) or f"row {row}")
    if not faults:
        return ""
    return f" So it is with {counted(len(faults), 'more image')} of this batch: {name_some(faults)}."


def _values(rows: Mapping[str, Sequence], row: int) -> dict[str, Any]:
    if isinstance(rows, LazyBatch):  # whose columns would be decoded whole
        return rows.pa_table.slice(row, 1).to_pylist()[0]
    return {name: rows[name][row] for name in rows}


def _count(rows: Mapping[str, Sequence]) -> int:
    return rows.pa_table.num_rows if isinstance(rows, LazyBatch) else len(rows["image"])


def _path(values: Mapping[str, Any]) -> str | None:
    return values["image"].get("path") if isinstance(values["image"], dict) else None


class _Decoder:
    """
    Makes bytes `[N, Y, X]` of images, all that a processor does but for what [`ImageCollator`] does by itself.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]): Also one that puts channels into another order.
    """

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor
        self.name = type(image_processor).__name__
        self.num_channels = num_channels(image_processor)
        # EfficientNet's processor divides by the deviation once more unless the last is off.
        settings = {"do_rescale", "do_normalize"} | ({"include_top"} & image_processor.to_dict().keys())
        self._settings: dict[str, Any] = dict.fromkeys(settings, False)

    def read(self, image: Any) -> Image.Image | np.ndarray | Tensor:
        """An image as a processor takes it; of a PIL image what an image pipeline would make of it."""
        if image is None:
            raise ValueError("there is none (None)")
        if isinstance(image, list):
            return np.asarray(image, dtype=np.uint8)
        if isinstance(image, np.ndarray | Tensor):
            if not math.prod(image.shape):
                raise ValueError(f"it has the shape {tuple(image.shape)}, no pixel")
            if image.dtype not in (np.uint8, torch.uint8):
                raise ValueError(f"it is of {image.dtype}: convert it to bytes (uint8) from 0 to 255")
        if not isinstance(image, Image.Image) or (self.num_channels == 1 and image.mode == "L"):
            return image
        if is_deep(image):
            raise ValueError(f"its mode is {image.mode!r}, more than 8 bits a channel: convert it to bytes")
        return load_image(image)

    def __call__(self, images: list[Any]) -> list[bytes]:
        found = self.image_processor(images, **self._settings, return_tensors="pt")
        pixels_BNYX = found.get("pixel_values")
        if pixels_BNYX is None:
            raise ValueError(f"{self.name} makes {list(found)} of it, no `pixel_values`")
        if pixels_BNYX.dtype != torch.uint8 or pixels_BNYX.shape[1:-2] != (self.num_channels,):
            raise ValueError(
                f"{self.name} makes {pixels_BNYX.dtype} of shape {tuple(pixels_BNYX.shape[1:])} of it, not bytes of "
                f"{self.num_channels} channels, height and width"
            )
        return [image_NYX.tobytes() for image_NYX in pixels_BNYX.numpy()]


def is_deep(image: Image.Image) -> bool:
    """Tells whether an image has more than 8 bits a channel, which pipelines and pages would cut to white."""
    return image.mode.startswith(("I", "F"))


def num_channels(image_processor: BaseImageProcessor) -> int:
    """Returns the number of channels of the images that a processor makes."""
    mean = getattr(image_processor, "image_mean", None)
    return len(mean) if isinstance(mean, Sequence) else 3


class ImageCollator:
    """
    Makes a batch of examples from [`decode_images`]: augmented as bytes, then rescaled and normalised.

    How a processor does that it is asked, with images of one colour, and with a photograph whether decoding and
    collating together do what it does. What is random comes from torch's global generator, which a federated run
    seeds for each client and round.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]): Makes images of one shape.
        augmentations (`Sequence[Callable]`, *optional*): Functions of a batch `[B, N, Y, X]` of bytes, called in this
            order; for training only, so give evaluation a collator without.

    Raises:
        ValueError: When training would see other pixels than the processor makes.
    """

    def __init__(self, image_processor: BaseImageProcessor, augmentations: Sequence[Augmentation] = ()):
        self.augmentations = tuple(augmentations)
        name, N = type(image_processor).__name__, num_channels(image_processor)
        # Neither square nor of the size of the others.
        noise = np.random.default_rng(0).integers(0, 256, (48, 80, N), dtype=np.uint8)
        black, white = (_pixels(image_processor, np.full((64, 64, N), byte, np.uint8)) for byte in (0, 255))
        expected = _pixels(image_processor, Image.fromarray(noise) if N == 3 else noise)
        self.shape = tuple(expected.shape)
        if black.shape != self.shape:
            raise ValueError(
                f"`image_processor`, a {name}, makes images of shape {tuple(black.shape)} from some and {self.shape} "
                'from others: give it `do_resize=True` and `size={"height": ..., "width": ...}`.'
            )
        # Each byte becomes byte * scale + shift, one multiplication and one addition. At the border may be padding.
        black_N, white_N = (image_NYX[:, self.shape[1] // 2, self.shape[2] // 2] for image_NYX in (black, white))
        self._scale_N11 = ((white_N - black_N) / 255).float()[:, None, None]
        self._shift_N11 = black_N.float()[:, None, None]
        try:
            (decoded,) = decode_images({"image": [noise]}, image_processor)["pixel_values"]
            found = self._normalised([{"pixel_values": decoded}])[0]
            problem = f"which differ by up to {(found - expected).abs().max():.3g} from those"
            same = torch.allclose(found.double(), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
        except ValueError as error:
            same, problem = False, f"which it cannot make ({error}) unlike those"
        if not same:
            raise ValueError(
                f"`image_processor`, a {name}, does more than resize, rescale and normalise: training would see "
                f"images {problem} of a pipeline. Leave `decode_images` out, map the data with the processor itself, "
                "and give `data_collator=default_data_collator`."
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            examples (`Sequence[Mapping]`): Rows with `pixel_values` (bytes) and `label` or `labels`.

        Returns:
            `dict[str, Tensor]`: `pixel_values` of shape `[B, N, Y, X]`, channels last in memory, and `labels` of
            shape `[B]`.

        Raises:
            ValueError: When an example is no decoded image of the processor's shape.
        """
        for example in examples:
            pixels = example.get("pixel_values")
            if not isinstance(pixels, bytes) or len(pixels) != math.prod(self.shape):
                found = f"{len(pixels)} bytes" if isinstance(pixels, bytes) else f"a {type(pixels).__name__}"
                found = found if "pixel_values" in example else "missing"
                raise ValueError(
                    f"`pixel_values` of an example is {found}, but the image processor makes images of shape "
                    f"{self.shape}, {math.prod(self.shape)} bytes: map the data with `decode_images` and this "
                    "image processor."
                )
        batch = {"pixel_values": self._normalised(examples, self.augmentations)}
        name = next((name for name in ("label", "labels") if name in examples[0]), None)
        if name is not None:
            batch["labels"] = torch.tensor([example[name] for example in examples])
        return batch

    def _normalised(self, examples: Sequence[Mapping[str, Any]], augmentations: Sequence[Augmentation] = ()) -> Tensor:
        joined = bytearray(b"".join(example["pixel_values"] for example in examples))
        pixels_BNYX = torch.frombuffer(joined, dtype=torch.uint8).view(len(examples), *self.shape)
        for augment in augmentations:
            pixels_BNYX = augment(pixels_BNYX)
        # By channels last in memory convolutions are faster: on a CPU MobileNetV2's local step by a third.
        normalised_BNYX = torch.empty(pixels_BNYX.shape, memory_format=torch.channels_last)
        return torch.mul(pixels_BNYX, self._scale_N11, out=normalised_BNYX).add_(self._shift_N11)


def _pixels(image_processor: BaseImageProcessor, image: Image.Image | np.ndarray) -> Tensor:
    """The float64 `[N, Y, X]` that a processor makes of an image, as a pipeline asks it."""
    name = type(image_processor).__name__
    try:
        found = image_processor(images=image, return_tensors="pt").get("pixel_values")
    except Exception as error:
        raise ValueError(
            f"`image_processor`, a {name}, cannot read an image of {num_channels(image_processor)} channels: {error}"
        ) from error
    if found is None or found.dim() != 4:
        raise ValueError(
            f"`image_processor`, a {name}, makes no `pixel_values` of shape (channels, height, width) from an image: "
            "take one of an image classifier."
        )
    return found[0].double()


def random_crop(pixels_BNYX: Tensor, padding: int = 4) -> Tensor:
    """Moves each image by up to `padding` pixels in either direction; what comes in from outside is 0."""
    B, _, Y, X = pixels_BNYX.shape
    padded = torch.nn.functional.pad(pixels_BNYX, (padding,) * 4)
    rows_BY = torch.randint(2 * padding + 1, (B, 1)) + torch.arange(Y)
    columns_BX = torch.randint(2 * padding + 1, (B, 1)) + torch.arange(X)
    images_B11 = torch.arange(B)[:, None, None]
    # Indices on both sides of a slice put its axis last.
    return padded[images_B11, :, rows_BY[:, :, None], columns_BX[:, None, :]].movedim(-1, 1)


def random_flip(pixels_BNYX: Tensor) -> Tensor:
    """Mirrors every second image, left to right."""
    flipped_B = torch.rand(len(pixels_BNYX)) < 0.5
    return torch.where(flipped_B[:, None, None, None], pixels_BNYX.flip(-1), pixels_BNYX)


def cutout(pixels_BNYX: Tensor, size: int = 16, fill: int = 128) -> Tensor:
    """
    Covers a square of `size` pixels around a random centre of each image (DeVries & Taylor 2017), but no more than
    half of its height and width. At the border part of it lies outside. `fill` is the middle grey by default, 0 once
    it is normalised to [-1, 1].
    """
    B, _, Y, X = pixels_BNYX.shape
    covered_BY, covered_BX = (_random_stretch(B, Z, min(size, Z // 2)) for Z in (Y, X))
    return pixels_BNYX.masked_fill((covered_BY[:, :, None] & covered_BX[:, None, :])[:, None], fill)


def _random_stretch(B: int, Z: int, length: int) -> Tensor:
    """Marks, of Z places, those in a stretch around a random one of them, `[B, Z]`."""
    offset_BZ = torch.arange(Z) - torch.randint(Z, (B, 1)) + length // 2
    return (offset_BZ >= 0) & (offset_BZ < length)


def random_resized_crop(pixels_BNYX: Tensor, scale: tuple[float, float] = (0.8, 1.0)) -> Tensor:
    """
    Cuts a square from each image, `scale` of its area (uniform in this interval) at a random place, and resizes it to
    the whole by bilinear interpolation. No other aspect ratios: they would make other characters of some.
    """
    B = len(pixels_BNYX)
    side_B = torch.empty(B).uniform_(*scale).sqrt()
    # In the coordinates of `affine_grid` the image goes from -1 to 1, so a crop's centre has 1 - side to either side.
    centre_B2 = torch.empty(B, 2).uniform_(-1, 1) * (1 - side_B)[:, None]
    theta_B23 = torch.cat([torch.diag_embed(side_B[:, None].expand(B, 2)), centre_B2[:, :, None]], dim=2)
    grid = torch.nn.functional.affine_grid(theta_B23, list(pixels_BNYX.shape), align_corners=False)
    cropped = torch.nn.functional.grid_sample(
        pixels_BNYX.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return cropped.round().to(torch.uint8)


# By the name that recipes call them; the first is that of the Fed-MoE paper on CIFAR.
AUGMENTATIONS: dict[str, tuple[Augmentation, ...]] = {
    "photographs": (random_crop, random_flip, cutout),
    "characters": (random_resized_crop,),
    "none": (),
}
