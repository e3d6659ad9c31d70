import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from hf_fedmoe.data import ImageCollator, decode_images
from hf_fedmoe.models import FedMoEForImageClassification, SmallImageProcessor
from tests.tiny_images import tiny_cnn
from tests.tiny_models import make_different
from tests.without_package import results_without_package


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def processor(num_channels: int = 1, size: int = 8, **kwargs) -> SmallImageProcessor:
    return SmallImageProcessor(num_channels=num_channels, size={"height": size, "width": size}, **kwargs)


def as_paper(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255 - 0.5) / 0.5).astype(np.float32)


def values(found) -> np.ndarray:
    return np.asarray(found["pixel_values"])


# ---------------------------------------------------------------- pixels


def test_all_bytes_are_normalised_exactly():
    pixels_YX = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image in (pixels_YX, Image.fromarray(pixels_YX), torch.from_numpy(pixels_YX)):
        found = processor(size=16)(image, return_tensors="pt")["pixel_values"]
        assert found.dtype == torch.float32 and found.is_contiguous()
        np.testing.assert_array_equal(found.numpy(), as_paper(pixels_YX)[None, None])
    assert values(processor(size=16)(pixels_YX)).min() == -1 and values(processor(size=16)(pixels_YX)).max() == 1


def test_colour_becomes_grey_as_in_pillow_in_every_form():
    colour_YXN = random_pixels(64, 64, 3)
    alpha = random_pixels(64, 64, 1, seed=1)
    rgba_YXN = np.concatenate([colour_YXN, alpha], axis=2)
    expected = as_paper(np.asarray(Image.fromarray(colour_YXN).convert("L")))[None, None]
    for image in (
        colour_YXN,
        rgba_YXN,
        colour_YXN.transpose(2, 0, 1),
        torch.from_numpy(rgba_YXN).permute(2, 0, 1),
        Image.fromarray(colour_YXN),
        Image.fromarray(rgba_YXN),
    ):
        np.testing.assert_array_equal(values(processor(size=64)(image)), expected)


def test_grey_is_repeated():
    grey_YX = random_pixels(8, 8)
    expected = as_paper(np.stack([grey_YX] * 3))[None]
    for image in (grey_YX, grey_YX[None], grey_YX[..., None], Image.fromarray(grey_YX)):
        np.testing.assert_array_equal(values(processor(3)(image)), expected)
    colour_YXN = random_pixels(8, 8, 3)
    np.testing.assert_array_equal(values(processor(3)(colour_YXN))[0], as_paper(colour_YXN).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_modes_are_read_as_a_pipeline_reads_them(mode, num_channels):
    image = Image.fromarray(random_pixels(8, 8, 3)).convert(mode)
    found = values(processor(num_channels)(image))
    np.testing.assert_array_equal(found, values(processor(num_channels)(image.convert("RGB"))))
    assert found.std() > 0.1


@pytest.mark.parametrize("num_channels", [1, 3])
def test_batches_equal_single_images(num_channels):
    """Images of one shape, which takes one step, and of mixed shapes and types."""
    small, large = random_pixels(5, 8, 8), random_pixels(12, 10, 3)
    mixed = [small[0], large, Image.fromarray(large), torch.from_numpy(small[1]), small[2][None]]
    make = processor(num_channels)
    for images in (list(small), [random_pixels(8, 8, 3, seed=n) for n in range(3)], mixed):
        found = values(make(images, return_tensors="np"))
        assert found.shape == (len(images), num_channels, 8, 8)
        for image, expected in zip(images, found, strict=True):
            np.testing.assert_array_equal(values(make(image))[0], expected)
    batch_BYXN = random_pixels(4, 8, 8, 3)
    np.testing.assert_array_equal(values(make(batch_BYXN)), values(make(list(batch_BYXN))))


def test_only_another_size_is_resized():
    image = Image.fromarray(random_pixels(12, 10))
    expected = as_paper(np.asarray(image.resize((6, 7), Image.Resampling.BILINEAR)))
    make = SmallImageProcessor(size={"height": 7, "width": 6})
    np.testing.assert_array_equal(values(make(image))[0, 0], expected)
    np.testing.assert_array_equal(values(make(image, do_resize=False))[0, 0], as_paper(np.asarray(image)))


def test_mean_and_deviation_of_each_channel():
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    image_NYX = random_pixels(3, 8, 8)
    make = processor(3, image_mean=mean, image_std=std)
    expected = (image_NYX / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_array_equal(values(make(image_NYX))[0], expected.astype(np.float32))
    np.testing.assert_array_equal(
        values(make(image_NYX, do_normalize=False))[0], (image_NYX * (1 / 255)).astype(np.float32)
    )
    raw = values(make(image_NYX, do_normalize=False, do_rescale=False))[0]
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, image_NYX)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_decoding_and_collating_give_the_same_images(num_channels):
    images = [Image.fromarray(random_pixels(12, 12, 3, seed=n)) for n in range(4)]
    make = processor(num_channels)
    rows = decode_images({"image": images}, make)["pixel_values"]
    batch = ImageCollator(make)([{"pixel_values": row} for row in rows])
    torch.testing.assert_close(batch["pixel_values"], make(images, return_tensors="pt")["pixel_values"])


def test_an_axis_of_channels_can_be_named():
    image = random_pixels(3, 8, 3)
    make = SmallImageProcessor(num_channels=3, size={"height": 3, "width": 8})
    found = values(make(image, input_data_format="channels_last"))[0]
    np.testing.assert_array_equal(found, as_paper(image).transpose(2, 0, 1))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_channels": 2}, "`num_channels` is 2: pass 1 for grey images or 3"),
        ({"num_channels": 3, "image_mean": [0.5]}, r"`image_mean` is \[0.5\], but `num_channels` is 3: pass 3 values"),
        ({"image_std": [0.5, 0.5]}, r"`image_std` is \[0.5, 0.5\], but `num_channels` is 1"),
        ({"size": {"shortest_edge": 8}}, "`size` is .*shortest_edge.*: pass {'height'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmallImageProcessor(**arguments)
    with pytest.raises(ValueError, match=message):
        SmallImageProcessor()(random_pixels(8, 8), **arguments)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_pixels(8, 8, 2), r"an image of shape \(8, 8, 2\): pass images with 1, 3 or 4 channels"),
        (random_pixels(5, 8, 8), r"an image of shape \(5, 8, 8\): pass images with 1, 3 or 4 channels"),
        ([random_pixels(8, 8), random_pixels(8)], r"an image of shape \(8,\): pass images"),
        (np.zeros((8, 8), dtype=np.float32), "an image of type float32: pass bytes"),
        (Image.new("I;16", (8, 8), 300), "an image of type uint16: pass bytes"),
        ([], "`images` is empty"),
    ],
)
def test_images_that_are_none(images, message):
    with pytest.raises(ValueError, match=message):
        processor()(images)


def test_images_of_several_sizes_need_resizing():
    with pytest.raises(ValueError, match=r"sizes \[\(8, 8\), \(9, 8\)\] and `do_resize` is False: pass images of one"):
        processor(do_resize=False)([random_pixels(8, 8), random_pixels(9, 8)])


# ---------------------------------------------------------------- saving, loading, pipelines


def test_save_and_load(tmp_path):
    make = processor(3, size=12, image_mean=[0.1, 0.2, 0.3], resample=Image.Resampling.BICUBIC)
    make.save_pretrained(tmp_path)
    image = random_pixels(20, 20, 3)
    for trust in (None, True):  # an installed package runs no code of a checkpoint
        loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded) is SmallImageProcessor
        assert loaded.to_dict() == make.to_dict() | {"image_processor_type": "SmallImageProcessor"}
        np.testing.assert_array_equal(values(loaded(image)), values(make(image)))
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["num_channels"], saved["size"]) == (3, {"height": 12, "width": 12})
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_small_image.SmallImageProcessor"}
    assert SmallImageProcessor.from_pretrained(tmp_path, size={"height": 4, "width": 4})(image)[
        "pixel_values"
    ].shape == (1, 3, 4, 4)


CLASSIFY = """
import json, sys
from transformers import pipeline

folder, *files = sys.argv[1:]
classify = pipeline("image-classification", model=folder, device="cpu", trust_remote_code=True)
assert type(classify.image_processor).__module__.startswith("transformers_modules."), type(classify.image_processor)
print("RESULT", json.dumps(classify(files, top_k=4)))
classify.image_processor.save_pretrained(folder + "/again")
"""


def test_a_mixture_for_grey_images_classifies_files_and_pil_images(tmp_path, capsys):
    """Pipelines make a colour image of whatever they are given: the processor makes it grey again."""
    model = make_different(FedMoEForImageClassification.from_expert(tiny_cnn(num_channels=1)))
    for part in (model, processor(1, size=8)):
        part.save_pretrained(tmp_path / "model")
    grey_YX = random_pixels(8, 8)
    colour_YXN = random_pixels(8, 8, 3, seed=1)
    luma_YX = (colour_YXN * [19595, 38470, 7471]).sum(-1) + 2**15 >> 16
    with torch.no_grad():
        pixels_B1YX = torch.from_numpy(np.stack([as_paper(grey_YX), as_paper(luma_YX)]))[:, None]
        expected = [
            dict(zip(model.config.id2label.values(), probs_C, strict=True))
            for probs_C in model(pixels_B1YX).logits.exp().tolist()
        ]
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)
    files = [str(tmp_path / name) for name in ("grey.png", "colour.png")]
    grey, colour = Image.fromarray(grey_YX), Image.fromarray(colour_YXN)
    grey.save(files[0])
    colour.save(files[1])

    def check(results: list[list[dict]]) -> None:
        for result, scores in zip(results, expected, strict=True):
            assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(scores, abs=1e-6)

    classify = pipeline("image-classification", model=str(tmp_path / "model"), device="cpu")
    assert "custom code" not in capsys.readouterr().out  # nobody is asked whether to run any
    for images in (files, [grey, colour], [grey.convert("RGB"), colour], [grey_YX, colour_YXN]):
        check(classify(images, top_k=4))

    [scores] = results_without_package(CLASSIFY, [str(tmp_path / "model"), *files], tmp_path / "cache")
    check(scores)
    again = AutoImageProcessor.from_pretrained(tmp_path / "model" / "again")
    np.testing.assert_array_equal(values(again(grey)), as_paper(grey_YX)[None, None])
    assert (tmp_path / "model" / "again" / "image_processing_small_image.py").is_file()
