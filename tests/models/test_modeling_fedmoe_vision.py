import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from hf_fedmoe.models import FedMoEConfig, FedMoEForImageClassification, FedMoEForSequenceClassification
from tests.mixture_by_hand import mixture_by_hand
from tests.tiny_images import IMAGE_FAMILIES, image_batch, make_statistics_different, tiny_cnn, tiny_resnet
from tests.tiny_models import PAD_TOKEN_ID, make_different, tiny_gpt2
from tests.without_package import results_without_package


GATES = ("main_features", "model")


def build(family: str = "small_cnn", gate: str = "main_features", **config) -> FedMoEForImageClassification:
    """A tiny mixture whose experts differ; its gate, if a model, is a SmallCNN."""
    torch.manual_seed(0)
    if gate == "model":
        gate = tiny_cnn(config.get("num_routed_experts", 3))
    model = FedMoEForImageClassification.from_expert(IMAGE_FAMILIES[family](), gate, **config)
    return make_statistics_different(make_different(model, 0.3))


def auto_map(path) -> dict:
    return json.loads((path / "config.json").read_text())["auto_map"]


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("gate", GATES)
def test_sparse_equals_per_example_loop(family, gate):
    model = build(family, gate, num_routed_experts=4, top_l=2).double()
    images = image_batch()["pixel_values"].double()
    with torch.no_grad():
        out = model(images)
        assert len(out.selected_experts.unique()) > 1
        for row in range(8):
            one = {"pixel_values": images[row : row + 1]}
            expected, chosen = mixture_by_hand(model, one, top_l=2)
            torch.testing.assert_close(out.logits[row].exp(), expected, rtol=0, atol=1e-9)
            assert out.selected_experts[row].tolist() == chosen


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_features_are_the_input_of_the_head(family):
    model = build(family)
    logits_BSC, features_BH = model.expert_outputs(image_batch())
    head = [module for module in model.main_experts[0].modules() if isinstance(module, torch.nn.Linear)][-1]
    assert features_BH.shape == (8, head.in_features)
    torch.testing.assert_close(head(features_BH), logits_BSC[:, 0])
    assert torch.equal(model.gate_features(image_batch()), features_BH)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("gate", GATES)
def test_training_reaches_gate_alpha_and_all_experts(family, gate):
    model = build(family, gate).train()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    out = model(**image_batch(), labels=labels)
    assert out.selected_experts is None
    out.loss.backward()
    assert model.alpha_logit.grad.abs().item() > 1e-6
    for module in [model.gate, *model.experts]:
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert max(parameter.grad.abs().max().item() for parameter in module.parameters()) > 1e-5


def test_gate_alone_can_be_trained():
    model = build("small_image_resnet", "model").requires_grad_(False)
    model.gate.requires_grad_(True)
    model(**image_batch(), labels=torch.zeros(8, dtype=torch.long), dense=True).loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"gate"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), r"shape \(2, 1, 8, 8\), but the experts' `num_channels` = 3 asks for .* convert"),
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\), but the experts' `num_channels` = 3 asks for"),
        (torch.zeros(2, 3, 9, 9), r"shape \(2, 3, 9, 9\), but `num_channels` = 3 and `image_size` = 8 .* resize"),
        (None, "`pixel_values` is missing from the inputs"),
    ],
)
def test_images_of_another_shape(images, message):
    with pytest.raises(ValueError, match=message):
        build()(images)


@pytest.mark.parametrize(("field", "value"), [("num_channels", 1), ("image_size", 10)])
def test_gate_for_other_images(field, value):
    with pytest.raises(ValueError, match=rf"`gate_config.{field}` is {value}, but `expert_config.{field}` is"):
        FedMoEForImageClassification.from_expert(tiny_cnn(), tiny_cnn(3, **{field: value}))


def test_text_experts_are_refused():
    with pytest.raises(ValueError, match="GPT2Config, which AutoModelForImageClassification does not know"):
        FedMoEForImageClassification(FedMoEConfig(expert_config=tiny_gpt2().config))


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize(
    ("family", "gate"), [*((family, "main_features") for family in IMAGE_FAMILIES), ("small_cnn", "model")]
)
def test_save_and_load_are_bit_equal(tmp_path, family, gate):
    model = build(family, gate)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, FedMoEForImageClassification)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # To what a convolution on a CPU rounds depends on where its weights happen to lie in memory.
    tolerances = {"mobilenet_v2": dict(rtol=1e-4, atol=1e-4), "small_cnn": dict(rtol=1e-5, atol=1e-6)}
    tolerance = tolerances.get(family, dict(rtol=0, atol=0))
    for dense in (True, False):
        after, before = (m(**image_batch(), dense=dense).logits for m in (loaded, model))
        torch.testing.assert_close(after, before, **tolerance)


def test_experts_of_one_family_fresh_and_loaded_go_together(tmp_path):
    for name, make in IMAGE_FAMILIES.items():
        fresh = make()
        fresh.save_pretrained(tmp_path / name)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        model = FedMoEForImageClassification.from_experts([copy.deepcopy(fresh)], [loaded, fresh])
        assert model(**image_batch()).logits.shape == (8, 4)


def test_each_auto_class_finds_its_own_model(tmp_path):
    """One configuration class serves two Auto classes in one process."""
    text = FedMoEForSequenceClassification.from_expert(tiny_gpt2(), pad_token_id=PAD_TOKEN_ID)
    images = build("small_image_resnet")
    for _ in range(2):  # what one save notes must not reach the next
        images.save_pretrained(tmp_path / "images")
        text.save_pretrained(tmp_path / "text")
    assert auto_map(tmp_path / "images") == {
        "AutoConfig": "configuration_fedmoe.FedMoEConfig",
        "AutoModelForImageClassification": "modeling_fedmoe_vision.FedMoEForImageClassification",
    }
    assert auto_map(tmp_path / "text") == {
        "AutoConfig": "configuration_fedmoe.FedMoEConfig",
        "AutoModelForSequenceClassification": "modeling_fedmoe.FedMoEForSequenceClassification",
    }
    assert not (tmp_path / "text" / "modeling_fedmoe_vision.py").exists()
    with pytest.raises(ValueError, match="which AutoModelForSequenceClassification does not know"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "images")
    with pytest.raises(ValueError, match="which AutoModelForImageClassification does not know"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "text")


LOAD = """
import json, sys
import torch
from transformers import AutoModelForImageClassification

shape = json.loads(sys.argv[1])
images = torch.linspace(-1, 1, shape[0] * shape[1] * shape[2] * shape[3]).reshape(shape)
for path in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        print("RESULT", json.dumps(model(images).logits.tolist()))
    model.save_pretrained(path + "/again")
"""


def test_loads_where_the_package_is_not_installed(tmp_path):
    """Experts and gates of this package's own types travel with the mixture, also saved from such a process."""
    stock = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=4)
    stock = FedMoEForImageClassification.from_expert(ResNetForImageClassification(stock), tiny_cnn(3))
    models = {
        "cnn": tiny_cnn(),
        "resnet": make_statistics_different(tiny_resnet()),
        "mixture-of-cnns": build("small_cnn"),
        "mixture-of-resnets": build("small_image_resnet", "model"),
        "mixture-of-stock-resnets": make_different(stock),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    shape = (4, 3, 8, 8)
    images = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(shape)
    arguments = [json.dumps(shape), *(str(tmp_path / name) for name in models)]
    found = results_without_package(LOAD, arguments, tmp_path / "cache")
    for (name, model), logits in zip(models.items(), found, strict=True):
        with torch.no_grad():
            expected = model(images).logits
        assert torch.equal(torch.tensor(logits), expected), name
        again = AutoModelForImageClassification.from_pretrained(tmp_path / name / "again")
        assert torch.equal(again(images).logits, expected), name
        sources = [{file.name for file in path.glob("*.py")} for path in (tmp_path / name, tmp_path / name / "again")]
        assert sources[0] == sources[1]
        assert auto_map(tmp_path / name) == auto_map(tmp_path / name / "again")


def test_an_installed_package_runs_no_code_of_a_checkpoint(tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["expert_config"]["model_type"] = "unheard-of"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_small_cnn.py").write_text("raise SystemExit('this ran')")
    for load in (AutoModelForImageClassification.from_pretrained, FedMoEConfig.from_pretrained):
        with pytest.raises((ValueError, KeyError), match="unheard-of"):
            load(tmp_path, trust_remote_code=True)


# ---------------------------------------------------------------- in transformers


def test_pipeline_from_a_folder(tmp_path):
    model = build("small_image_resnet")
    model.config.id2label = {0: "cat", 1: "dog", 2: "frog", 3: "ship"}
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ViTImageProcessor"  # either backend reads it
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    results = classify([Image.fromarray(image) for image in pixels], top_k=4)
    with torch.no_grad():
        probs_BC = model(**processor(list(pixels), return_tensors="pt")).logits.exp()
    for result, probs_C in zip(results, probs_BC, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        expected = dict(zip(model.config.id2label.values(), probs_C.tolist(), strict=True))
        assert scores == pytest.approx(expected, abs=1e-6)


def test_pipeline_on_grey_images():
    """Pipelines turn files and PIL images into colour images; arrays with an axis of one channel stay grey."""
    model = make_different(FedMoEForImageClassification.from_expert(tiny_cnn(num_channels=1)))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 1), dtype=np.uint8)
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.exp().max().item()
    assert classify(image)[0]["score"] == pytest.approx(expected, abs=1e-6)


def test_plain_trainer(tmp_path):
    rows = [{"pixel_values": image, "labels": row % 4} for row, image in enumerate(image_batch()["pixel_values"])]
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    model = build("small_image_resnet")
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    norm = "resnet.embedder.embedder.normalization.running_mean"
    assert {"alpha_logit", "gate.weight", f"routed_experts.2.{norm}", f"main_experts.0.{norm}"} <= changed
    assert trainer.evaluate()["eval_loss"] > 0
