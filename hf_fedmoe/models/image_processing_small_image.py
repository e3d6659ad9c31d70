"""
An image processor for small images, grey or in colour. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, N channels, Y height, X width, V the 256 values of a byte.
"""

from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.utils import TensorType


GREY_MODES = ("1", "L", "LA", "La")
# Red, green and blue of ITU-R 601 in units of 2^-16, as Pillow rounds them: the same grey as `convert("L")`.
LUMA_N11 = np.array([19595, 38470, 7471], dtype=np.uint32)[:, None, None]


class SmallImageProcessorKwargs(TypedDict, total=False):
    """The arguments of [`SmallImageProcessor`], when it is built and in each call."""

    num_channels: int
    do_resize: bool
    size: int | dict[str, int]
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    input_data_format: str | ChannelDimension | None
    return_tensors: str | TensorType | None


class SmallImageProcessor(PilBackend):
    """
    Makes images of one size and number of channels: colour becomes grey (ITU-R 601 luma, as Pillow's `convert("L")`)
    or grey is repeated, whatever a file, a pipeline or a dataset hands over. By default pixels lie in [-1, 1].

    It takes PIL images of any mode with up to 8 bits a channel, and `uint8` arrays or tensors of shape `(Y, X)`,
    `(Y, X, N)` or `(N, Y, X)`, one, a list of them or, with four axes, a batch. Transparency is left out.

    Args:
        num_channels (`int`, *optional*, defaults to 1):
            1 for grey images, 3 for colour.
        size (`dict[str, int]`, *optional*, defaults to `{"height": 28, "width": 28}`):
            Height and width of the images; an integer makes them square.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether images of another size are resized.
        resample (`int`, *optional*, defaults to `PILImageResampling.BILINEAR`):
            How.
        do_rescale (`bool`, *optional*, defaults to `True`), rescale_factor (`float`, *optional*, defaults to 1/255):
            Whether bytes are multiplied, and by what.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether the mean is subtracted and the result divided by the standard deviation.
        image_mean (`float` or `list[float]`, *optional*, defaults to 0.5), image_std (same):
            One number, or one for each channel.

    Raises:
        `ValueError`: If an argument is out of its range or an image is none of those above.

    Example:

    ```python
    >>> processor = SmallImageProcessor(num_channels=1, size={"height": 28, "width": 28})
    >>> processor("character.png", return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 1, 28, 28])
    ```
    """

    valid_kwargs = SmallImageProcessorKwargs  # type: ignore[assignment]  # transformers takes any of this form
    num_channels = 1
    do_resize = True
    size = {"height": 28, "width": 28}
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    do_normalize = True
    image_mean = 0.5
    image_std = 0.5

    def __init__(self, **kwargs: Unpack[SmallImageProcessorKwargs]) -> None:
        given: dict[str, Any] = {**kwargs}
        super().__init__(**given)

    def to_dict(self) -> dict[str, Any]:
        """
        Returns what is saved. Without the last entry an image pipeline would make up a video processor from the auto
        map, and ask whoever loads the model whether to run its code.
        """
        return super().to_dict() | {"video_processor_type": "none"}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of a saved dictionary; arguments as in transformers."""
        given = {key: value for key, value in image_processor_dict.items() if key != "video_processor_type"}
        return super().from_dict(given, **kwargs)

    # The three below name what they take, as those of transformers' own processors do.
    def _standardize_kwargs(  # type: ignore[override]
        self, num_channels: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if num_channels not in (1, 3):
            raise ValueError(f"`num_channels` is {num_channels!r}: pass 1 for grey images or 3 for colour images.")
        for name in ("image_mean", "image_std"):
            values = kwargs[name]
            kwargs[name] = (values,) * num_channels if isinstance(values, int | float) else tuple(values)
            if len(kwargs[name]) != num_channels:
                raise ValueError(
                    f"`{name}` is {list(values)}, but `num_channels` is {num_channels}: pass {num_channels} values, "
                    "or one number for all channels."
                )
        kwargs = super()._standardize_kwargs(default_to_square=True, **kwargs)
        if not (kwargs["size"].height and kwargs["size"].width):
            raise ValueError(f"`size` is {dict(kwargs['size'])}: pass {{'height': ..., 'width': ...}}.")
        return kwargs | {"num_channels": num_channels}

    def _prepare_image_like_inputs(  # type: ignore[override]
        self, images: ImageInput, num_channels: int, input_data_format: str | None = None, **kwargs: Any
    ) -> list[np.ndarray] | np.ndarray:
        """Images of bytes with `num_channels` channels, those in front; one array if all have one shape."""
        fetched = self.fetch_images(images)  # type: ignore[arg-type]  # declared for names alone, and leaves images
        pixels = [_channels_first(image, input_data_format) for image in _flatten(fetched)]
        if not pixels:
            raise ValueError("`images` is empty: pass one image or more.")
        if len({image_NYX.shape for image_NYX in pixels}) == 1:
            return _convert(np.array(pixels), num_channels)
        return [_convert(image_NYX[None], num_channels)[0] for image_NYX in pixels]

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray] | np.ndarray,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        wanted = (size.height, size.width)
        found = {image_NYX.shape[1:] for image_NYX in images}
        if do_resize and found != {wanted}:
            images = [
                image_NYX if image_NYX.shape[1:] == wanted else self.resize(image_NYX, size, resample)
                for image_NYX in images
            ]
        elif len(found) > 1:
            raise ValueError(
                f"`images` have the sizes {sorted(found)} and `do_resize` is False: pass images of one size."
            )
        pixels_BNYX = np.asarray(images)
        if do_rescale or do_normalize:
            # A byte has 256 values: what becomes of each is computed once, in double precision, and looked up.
            table_NV = np.tile(np.arange(256.0), (len(image_mean), 1))
            if do_rescale:
                table_NV *= rescale_factor
            if do_normalize:
                table_NV = (table_NV - np.array(image_mean)[:, None]) / np.array(image_std)[:, None]
            row_N11 = 256 * np.arange(len(image_mean), dtype=np.uint16)[:, None, None]
            pixels_BNYX = table_NV.astype(np.float32).take(row_N11 + pixels_BNYX)
        return BatchFeature(data={"pixel_values": pixels_BNYX}, tensor_type=return_tensors)


def _flatten(images: Any) -> list[Any]:
    """Single images out of one, a list, a nested list or a batch."""
    if isinstance(images, list):
        return [image for part in images for image in _flatten(part)]
    if isinstance(images, Image.Image) or images.ndim != 4:
        return [images]
    return list(images)


def _channels_first(image: Image.Image | np.ndarray | torch.Tensor, input_data_format: str | None) -> np.ndarray:
    """Bytes of shape `(N, Y, X)` without alpha, N = 1 or 3."""
    if isinstance(image, Image.Image):
        # Modes of more than 8 bits ("I;16", "F") stay as they are: Pillow would cut their values off at 255.
        if not image.mode.startswith(("I", "F")):
            image = image.convert("L" if image.mode in GREY_MODES else "RGB")
        input_data_format = ChannelDimension.LAST
    elif isinstance(image, torch.Tensor):
        image = image.cpu()
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"`images` has an image of type {pixels.dtype}: pass bytes (`uint8`), from 0 to 255.")
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim == 3:
        if input_data_format is None and {pixels.shape[0], pixels.shape[-1]} & {1, 3, 4}:
            input_data_format = infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
        if input_data_format == ChannelDimension.LAST:
            pixels = pixels.transpose(2, 0, 1)
        if len(pixels) in (1, 3, 4):
            return pixels[:3]
    raise ValueError(
        f"`images` has an image of shape {pixels.shape}: pass images with 1, 3 or 4 channels, on the first or the "
        "last axis, or without such an axis."
    )


def _convert(pixels_BNYX: np.ndarray, num_channels: int) -> np.ndarray:
    """Grey from colour or colour from grey, rounded as Pillow does."""
    if pixels_BNYX.shape[1] == num_channels:
        return pixels_BNYX
    if num_channels == 3:
        return pixels_BNYX.repeat(3, axis=1)
    luma_BNYX = (pixels_BNYX * LUMA_N11).sum(axis=1, keepdims=True, dtype=np.uint32)
    return ((luma_BNYX + 2**15) >> 16).astype(np.uint8)
