"""Decoding, collating and augmenting images."""

import io
import weakref
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    DetrImageProcessorPil,
    EfficientNetImageProcessorPil,
    ImageGPTImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    MobileViTImageProcessorPil,
    SamImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.image_utils import load_image

from hf_fedmoe.data import (
    AUGMENTATIONS,
    FederatedDataset,
    ImageCollator,
    cutout,
    decode_images,
    random_crop,
    random_flip,
    random_resized_crop,
)
from hf_fedmoe.experiments import ImageExperiment
from hf_fedmoe.models import SmallImageProcessor


def random_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def examples(pixels: np.ndarray, processor, name: str = "label") -> list[dict]:
    decoded = decode_images({"image": [Image.fromarray(image) for image in pixels]}, processor)["pixel_values"]
    return [{"pixel_values": image, name: index % 3} for index, image in enumerate(decoded)]


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("kind", [SmallImageProcessor, ViTImageProcessorPil])
def test_a_batch_is_what_the_processor_makes_of_the_images(kind, num_channels):
    own = {"num_channels": num_channels} if kind is SmallImageProcessor else {}
    mean, std = [0.4, 0.5, 0.6][:num_channels], [0.2] * num_channels
    processor = kind(size={"height": 6, "width": 5}, image_mean=mean, image_std=std, **own)
    pixels = list(random_images(7, 6, 5, num_channels))
    decoded = decode_images({"image": pixels}, processor)["pixel_values"]
    rows = [{"pixel_values": image, "label": index % 3} for index, image in enumerate(decoded)]
    batch = ImageCollator(processor)(rows)
    expected = processor(pixels, return_tensors="pt")["pixel_values"]
    assert batch["pixel_values"].shape == (7, num_channels, 6, 5)
    assert batch["pixel_values"].stride() == (num_channels * 30, 1, num_channels * 5, num_channels)  # channels last
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-6)
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]


SQUARE, SHORT = {"height": 8, "width": 8}, {"shortest_edge": 10}
PROCESSORS = {
    "small, grey": lambda **rest: SmallImageProcessor(num_channels=1, size=SQUARE, **rest),
    "small, colour": lambda **rest: SmallImageProcessor(num_channels=3, size=SQUARE, **rest),
    "ViT": lambda **rest: ViTImageProcessorPil(size=SQUARE, **rest),
    "Siglip": lambda **rest: SiglipImageProcessorPil(size=SQUARE, **rest),
    # Cuts and turns its channels round; cuts more than there is, so that a border is padding.
    "MobileViT": lambda **rest: MobileViTImageProcessorPil(size=SHORT, crop_size=SQUARE, **rest),
    "MobileViT, padded": lambda **rest: MobileViTImageProcessorPil(
        size={"shortest_edge": 6}, crop_size={"height": 14, "width": 14}, **rest
    ),
    "EfficientNet": lambda **rest: EfficientNetImageProcessorPil(size=SQUARE, **rest),
    "EfficientNet, offset": lambda **rest: EfficientNetImageProcessorPil(
        **{"size": SQUARE, "rescale_offset": True, "rescale_factor": 1 / 127.5} | rest
    ),
    "ConvNext": lambda **rest: ConvNextImageProcessorPil(size={"shortest_edge": 8}, crop_pct=0.875, **rest),
    "MobileNetV2": lambda **rest: MobileNetV2ImageProcessorPil(size=SHORT, crop_size=SQUARE, **rest),
    "Bit": lambda **rest: BitImageProcessorPil(size=SHORT, crop_size=SQUARE, **rest),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize(
    "rest", [{}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0.01}], ids=str
)
def test_training_sees_what_a_pipeline_sees(name, rest):
    processor = PROCESSORS[name](**rest)
    photograph = Image.fromarray(random_images(1, 23, 17, 3)[0])
    collate = ImageCollator(processor)
    modes = ("RGB", "L", "1", "LA", "RGBA", "P", "CMYK")
    images = [photograph.convert(mode) for mode in modes] + [photograph.resize(size) for size in ((1, 1), (3, 1))]
    decoded = decode_images({"image": images}, processor)["pixel_values"]
    found = collate([{"pixel_values": image} for image in decoded])["pixel_values"]
    expected = torch.cat([processor(load_image(image), return_tensors="pt")["pixel_values"] for image in images])
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda: SamImageProcessorPil(size={"longest_edge": 8}, pad_size=SQUARE), "SamImageProcessorPil, does more"),
        (
            lambda: DetrImageProcessorPil(size={"shortest_edge": 8, "longest_edge": 20}),
            "makes images of shape",
        ),
        (lambda: SmallImageProcessor(do_resize=False), r"shape \(1, 64, 64\) from some and \(1, 48, 80\)"),
        (lambda: ImageGPTImageProcessorPil(clusters=[[0, 0, 0], [1, 1, 1]]), "ImageGPTImageProcessorPil, makes no"),
        (lambda: ViTImageProcessorPil(image_mean=[0.5, 0.5]), "ViTImageProcessorPil, cannot read .* of 2 channels"),
    ],
)
def test_processors_that_a_collator_cannot_stand_for(processor, message):
    with pytest.raises(ValueError, match=message):
        ImageCollator(processor())


def test_rows_that_were_never_decoded():
    with pytest.raises(ValueError, match=r"of an example is missing, .* map the data with `decode_images`"):
        ImageCollator(SmallImageProcessor(size={"height": 8, "width": 8}))([{"label": 0}])


def as_file(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PHOTOGRAPH = Image.fromarray(random_images(1, 9, 7, 3)[0])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "there is none"),
        (Image.fromarray(np.full((4, 4), 60_000, np.uint16)), "mode is 'I;16'"),
        (np.zeros((4, 4, 3)), "float"),
        (np.zeros((0, 4, 3), np.uint8), "no pixel"),
        ([[[300, 0, 0]]], "300 out of bounds"),
        (b"abc", "bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["small, colour", "ViT"])
def test_an_odd_image_is_named_by_its_row(kind, image, message):
    rows = {"image": [PHOTOGRAPH, image, PHOTOGRAPH], "label": [4, 5, 6]}
    with pytest.raises(ValueError, match=rf"(?s)row 1 of .*3 rows, `label` '5'\) cannot be decoded: .*{message}"):
        decode_images(rows, PROCESSORS[kind]())


def image_rows(files: list[dict]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": files, "label": range(len(files))}, features=features)


def test_a_damaged_file_is_named():
    sound = as_file(PHOTOGRAPH)
    rows = image_rows([{"bytes": sound, "path": None}, {"bytes": sound[:60], "path": "scans/cut.png"}])
    decode = partial(decode_images, image_processor=PROCESSORS["ViT"]())
    with pytest.raises(ValueError, match=r"^The image 'scans/cut.png', row 1 of .*`label` '1'\), cannot be decoded"):
        rows.map(decode, batched=True)
    whole, cut = ({"bytes": content, "path": None} for content in (sound, sound[:60]))
    more = image_rows([cut | {"path": "scans/cut.png"}, whole, cut, cut | {"path": "b.png"}])
    with pytest.raises(ValueError, match=r"'scans/cut.png', row 0 of .* with 2 more images .*: row 2, b.png\.$"):
        more.map(decode, batched=True)
    with pytest.raises(ValueError, match="give `map` the argument `batched=True`"):
        rows.select([0]).map(decode)


def test_damaged_files_of_other_batches_are_named():
    """A folder that was copied in part has many, of which each run named those of one batch."""
    sound = as_file(PHOTOGRAPH)
    files = [{"bytes": sound, "path": f"{row}.png"} for row in range(600)]
    for row in (3, 9, 300, 301, 599):
        files[row] = {"bytes": sound[:60], "path": f"{row}-cut.png"}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def rows(chosen):
        return datasets.Dataset.from_dict({"image": chosen, "label": [0, 1] * (len(chosen) // 2)}, features=features)

    experiment = ImageExperiment(dataset=["own"], model=["small_cnn"])
    data = FederatedDataset.from_clients({"south": rows(files[:400])}, test=rows(files[400:]))
    with pytest.raises(
        ValueError,
        match=r"'3-cut.png', .* with 1 more .*: 9-cut.png\. And with 3 .* 300-cut.png, 301-cut.png, 599-cut",
    ):
        experiment.prepare(data, SmallImageProcessor(size=4))
    # A name that ends as one of the first batch does is another.
    files[303] = {"bytes": sound[:60], "path": "cut.png"}
    files[3] = {"bytes": sound[:60], "path": "3cut.png"}
    data = FederatedDataset.from_clients({"south": rows(files[:400])})
    with pytest.raises(ValueError, match=r"'3cut.png', .* And with 3 .* 300-cut.png, 301-cut.png, cut.png"):
        experiment.prepare(data, SmallImageProcessor(size=4))
    # Of one batch alone all is said already.
    few = FederatedDataset.from_clients({"south": rows(files[:20])})
    with pytest.raises(ValueError, match=r"'3cut.png', .* with 1 more image of this batch: 9-cut.png\.$"):
        experiment.prepare(few, SmallImageProcessor(size=4))
    # A row without an image has no name.
    files[301] = None
    data = FederatedDataset.from_clients({"south": rows(files[:400])})
    with pytest.raises(ValueError, match=r"And with 3 .* 300-cut.png, row 301 of the pool, cut"):
        experiment.prepare(data, SmallImageProcessor(size=4))


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    """Also when `map` hands all of them over at once: photographs fill a machine's memory."""
    decoded, most = [], []
    decode_example = datasets.Image.decode_example

    def watched(*args, **kwargs):
        image = decode_example(*args, **kwargs)
        decoded.append(weakref.ref(image))
        most.append(sum(reference() is not None for reference in decoded))
        return image

    monkeypatch.setattr(datasets.Image, "decode_example", watched)
    large = Image.fromarray(random_images(1, 300, 300, 3)[0])
    rows = image_rows([{"bytes": as_file(large), "path": None}] * 20)
    processor = PROCESSORS["ViT"]()
    found = rows.map(partial(decode_images, image_processor=processor), batched=True, batch_size=None)
    assert len(most) == 20 and max(most) <= 2
    expected = decode_images({"image": [large]}, processor)["pixel_values"][0]
    assert found.with_format(None).remove_columns("image")["pixel_values"][:] == [expected] * 20


def test_labels_may_have_either_name_or_none():
    processor = SmallImageProcessor(size=4)
    rows = examples(random_images(2, 4, 4), processor, name="labels")
    assert ImageCollator(processor)(rows)["labels"].tolist() == [0, 1]
    assert ImageCollator(processor)([{"pixel_values": row["pixel_values"]} for row in rows]).keys() == {"pixel_values"}


def test_images_are_decoded_once_for_a_whole_federation():
    pixels = random_images(6, 4, 4)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    pool = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "label": [0, 1] * 3}, features=features
    )
    processor = SmallImageProcessor(size=4)
    data = FederatedDataset(pool, [[0, 3], [1]], reserved=[4, 5]).map(
        partial(decode_images, image_processor=processor), batched=True, remove_columns=["image"]
    )
    assert data.client(0)[1] == {"label": 1, "pixel_values": pixels[3].tobytes()}
    assert data.pool.features["pixel_values"] == datasets.Value("binary")


def test_examples_that_are_not_decoded_or_of_another_size():
    processor = SmallImageProcessor(size=4)
    collate = ImageCollator(processor)
    with pytest.raises(ValueError, match=r"is a Image, but.*map the data with `decode_images`"):
        collate([{"pixel_values": Image.new("L", (4, 4)), "label": 0}])
    with pytest.raises(ValueError, match=r"is 25 bytes, but.*\(1, 4, 4\), 16 bytes"):
        collate([{"pixel_values": bytes(25), "label": 0}])
    with pytest.raises(ValueError, match=r"no column `image` among \['img'\]: rename it"):
        decode_images({"img": []}, processor)


def test_random_crop_shifts_and_fills_with_black():
    image_YX = torch.arange(1, 17, dtype=torch.uint8).view(4, 4)
    padded = torch.zeros(8, 8, dtype=torch.uint8)
    padded[2:6, 2:6] = image_YX
    windows = [padded[y : y + 4, x : x + 4] for y in range(5) for x in range(5)]
    torch.manual_seed(0)
    cropped = random_crop(image_YX.expand(500, 2, 4, 4), padding=2)
    found = [[torch.equal(image[0], window) for window in windows].index(True) for image in cropped]
    assert torch.equal(cropped[:, 0], cropped[:, 1])  # channels move together
    assert set(found) == set(range(25))


def test_random_flip_mirrors_about_half():
    image_YX = torch.arange(6, dtype=torch.uint8).view(2, 3)
    torch.manual_seed(0)
    flipped = random_flip(image_YX.expand(400, 1, 2, 3))
    mirrored = [torch.equal(image[0], image_YX.flip(1)) for image in flipped]
    assert all(m or torch.equal(image[0], image_YX) for m, image in zip(mirrored, flipped, strict=True))
    assert 160 < sum(mirrored) < 240


def test_cutout_covers_a_square_that_may_reach_over_the_border():
    torch.manual_seed(0)
    covered = cutout(torch.zeros(300, 3, 8, 8, dtype=torch.uint8), size=4, fill=9)
    assert torch.equal(covered[:, 0], covered[:, 2]) and set(covered.unique().tolist()) == {0, 9}
    rows = (covered[:, 0] == 9).any(2).sum(1)
    columns = (covered[:, 0] == 9).any(1).sum(1)
    assert torch.equal((covered[:, 0] == 9).sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == columns.max() == 4 and rows.min() >= 2 and columns.min() >= 2


def test_random_resized_crop_keeps_the_whole_at_scale_one_and_enlarges_a_part_of_it():
    ramp_YX = (torch.arange(8) * 20).to(torch.uint8).expand(8, 8)
    images = ramp_YX.expand(50, 1, 8, 8)
    torch.manual_seed(0)
    assert torch.equal(random_resized_crop(images, scale=(1.0, 1.0)), images)
    cropped = random_resized_crop(images, scale=(0.25, 0.25))[:, 0].float()
    # Half the width, enlarged: the ramp rises half as fast, somewhere between its ends.
    slopes = (cropped[:, :, 6] - cropped[:, :, 1]) / 5
    torch.testing.assert_close(slopes, torch.full_like(slopes, 10.0), rtol=0, atol=0.5)
    assert cropped.min() >= 0 and cropped.max() <= 140 and cropped[:, 0, 0].std() > 5


def test_cutout_leaves_half_of_a_small_image():
    covered = cutout(torch.zeros(300, 1, 8, 6, dtype=torch.uint8), fill=9)[:, 0] == 9
    assert covered.any(2).sum(1).max() == 4 and covered.any(1).sum(1).max() == 3


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_follows_from_the_seed(name):
    processor = SmallImageProcessor(num_channels=3, size=32)
    rows = examples(random_images(8, 32, 32, 3), processor)
    collate, plain = ImageCollator(processor, AUGMENTATIONS[name]), ImageCollator(processor)(rows)["pixel_values"]
    batches = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        batches.append(collate(rows)["pixel_values"])
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2]) == (name == "none")
    assert torch.equal(batches[0], plain) == (name == "none")
