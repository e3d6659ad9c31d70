"""Folders of an adapter that say what labels their classifier has, and which base it needs."""

import copy

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    pipeline,
)

from hf_fedmoe.models import AdaptedConfig, AdaptedForSequenceClassification, FedMoEForSequenceClassification
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.adapters import add_adapter
from tests.tiny_federation import NUM_LABELS, tiny_args, tiny_federation
from tests.tiny_images import image_batch, tiny_processor, tiny_vit
from tests.tiny_models import PAD_TOKEN_ID, make_different, text_batch, tiny_bert, tiny_gpt2
from tests.tiny_tokenizer import tiny_tokenizer
from tests.without_package import logits_without_package


# PEFT turns GPT-2's weights round by itself, and says so for each layer.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

NAMES = {0: "bad", 1: "fair", 2: "good"}
IDS = {name: index for index, name in NAMES.items()}
FAMILIES = {
    "bert": (tiny_bert, AutoModelForSequenceClassification, text_batch, "text-classification"),
    # Without a padding token of its own.
    "gpt2": (tiny_gpt2, AutoModelForSequenceClassification, text_batch, "text-classification"),
    "vit": (tiny_vit, AutoModelForImageClassification, image_batch, "image-classification"),
}


def named_base(family: str, folder, num_labels: int) -> PreTrainedModel:
    """A base that is on disk with `num_labels` labels, loaded with three that have names."""
    make, auto_class, _, _ = FAMILIES[family]
    if not folder.exists():
        make_different(make(num_labels)).save_pretrained(folder)
    base = auto_class.from_pretrained(
        folder, num_labels=NUM_LABELS, id2label=NAMES, label2id=IDS, ignore_mismatched_sizes=True
    )
    if family == "gpt2":
        base.config.pad_token_id = PAD_TOKEN_ID
    return base


def adapted(base: PreTrainedModel) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"] if base.config.model_type == "vit" else None)
    return make_adapter_different(add_adapter(base, config))


@torch.no_grad()
def make_adapter_different(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model, family: str) -> torch.Tensor:
    return model(**FAMILIES[family][2]()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_labels", [2, 3])
def test_names_and_size_of_the_head_are_kept(tmp_path, family, num_labels):
    model = adapted(named_base(family, tmp_path / "base", num_labels))
    model.save_pretrained(tmp_path / "saved")
    auto_class = FAMILIES[family][1]
    loaded = auto_class.from_pretrained(tmp_path / "saved")
    assert (loaded.config.id2label, loaded.config.label2id) == (NAMES, IDS)
    assert loaded.config.num_labels == NUM_LABELS and type(loaded) is type(model.get_base_model())
    assert getattr(loaded.config, "pad_token_id", None) == getattr(model.config, "pad_token_id", None)
    assert not loaded.training and torch.equal(logits(loaded, family), logits(model, family))
    # Another name for a class is a matter of the caller's.
    other = auto_class.from_pretrained(tmp_path / "saved", id2label={0: "a", 1: "b", 2: "c"})
    assert other.config.id2label[2] == "c" and torch.equal(logits(other, family), logits(model, family))
    # As `transformers` calls it for an adapter on the Hub that is given with its configuration: by the base's name.
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    given = {"config": config, "adapter_kwargs": {"_adapter_model_path": str(tmp_path / "saved")}}
    named = auto_class._model_mapping[type(config)].from_pretrained(str(tmp_path / "base"), **given)
    assert named.config.id2label == NAMES and torch.equal(logits(named, family), logits(model, family))
    # Plain PEFT sees a plain adapter.
    base = named_base(family, tmp_path / "base", num_labels)
    plain = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    assert torch.equal(logits(plain, family), logits(model, family))
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 4 * size + 4096
    assert not list(tmp_path.glob("saved/model*.safetensors"))


def test_where_the_base_says_the_same_the_folder_is_peft_alone(tmp_path):
    named_base("bert", tmp_path / "start", 2).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapted(base)
    base.config.problem_type = "single_label_classification"  # a step of training writes this
    model.save_pretrained(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors", ".md"}
    assert not (tmp_path / "saved" / "config.json").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.id2label == NAMES and torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    automatic = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(automatic, "bert"), logits(model, "bert"))
    # What an earlier model has left there must not speak for this one.
    (tmp_path / "saved" / "config.json").write_text("{}")
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_without_a_name_is_saved_too(tmp_path, family):
    base = FAMILIES[family][0](NUM_LABELS)
    base.config.id2label, base.config.label2id = NAMES, IDS
    if family == "gpt2":
        base.config.pad_token_id = PAD_TOKEN_ID
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    auto_class = FAMILIES[family][1]
    loaded = auto_class.from_pretrained(tmp_path / "moved")
    assert loaded.config.id2label == NAMES and torch.equal(logits(loaded, family), logits(model, family))
    saved = auto_class.from_pretrained(tmp_path / "moved" / "base").state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_adapters_that_are_merged_keep_their_names(tmp_path):
    model = adapted(named_base("bert", tmp_path / "base", 2))
    expected = logits(model, "bert")
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert loaded.config.id2label == NAMES
    torch.testing.assert_close(logits(loaded, "bert"), expected, atol=1e-6, rtol=0)


def test_a_run_of_adapters_ends_with_its_names_in_a_pipeline(tmp_path):
    data = tiny_federation()
    for own in (True, False):  # an adapter that the trainer makes, and one that the caller has made
        base = named_base("bert", tmp_path / f"base-{own}", 2)
        config = LoraConfig(r=2, task_type=None if own else "SEQ_CLS")
        model = base if own else get_peft_model(base, config)
        args = tiny_args(tmp_path / f"run-{own}", rounds=1, save_strategy="steps")
        trainer = FederatedTrainer(
            model, args, data, processing_class=tiny_tokenizer(), peft_config=config if own else None
        )
        trainer.train()
        trainer.save_model(str(tmp_path / f"saved-{own}"))
        tokens = data.client(0)[0]["input_ids"]
        batch = {"input_ids": torch.tensor([tokens])}
        with torch.no_grad():
            label = NAMES[trainer.model.eval()(**batch).logits.argmax().item()]
        for folder in (tmp_path / f"saved-{own}", tmp_path / f"run-{own}" / "checkpoint-1"):
            classify = pipeline("text-classification", model=str(folder))
            [found] = classify(" ".join(f"w{token}" for token in tokens))
            assert found["label"] == label and found["score"] > 1 / NUM_LABELS


def test_an_adapter_for_images_ends_with_its_names_in_a_pipeline(tmp_path):
    model = adapted(named_base("vit", tmp_path / "base", 2))
    model.save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    from PIL import Image

    image = Image.fromarray((torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    [found, *_] = pipeline("image-classification", model=str(tmp_path / "saved"))(image)
    with torch.no_grad():
        pixels = tiny_processor()(image, return_tensors="pt")
        assert found["label"] == NAMES[model(**pixels).logits.argmax().item()]


def test_exported_experts_keep_their_names(tmp_path):
    tiny_bert(2).save_pretrained(tmp_path / "base")
    mixture = FedMoEForSequenceClassification.from_expert(
        tmp_path / "base", num_routed_experts=2, peft_config=LoraConfig(r=2), id2label=NAMES, label2id=IDS
    )
    mixture.save_adapters(tmp_path / "adapters")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapters" / "routed_1")
    assert loaded.config.id2label == NAMES
    expected = mixture(**text_batch(), output_expert_logits=True).expert_logits[:, 2]
    assert torch.equal(logits(loaded, "bert"), expected)


def test_where_the_package_is_not_installed(tmp_path):
    model = adapted(named_base("bert", tmp_path / "base", 2))
    model.save_pretrained(tmp_path / "saved")
    input_ids = text_batch()["input_ids"]
    [found] = logits_without_package([tmp_path / "saved"], input_ids, tmp_path / "cache", kind="transformers.")
    with torch.no_grad():
        assert torch.equal(found, model(input_ids).logits)


def test_configurations_that_say_too_little(tmp_path):
    config = AdaptedConfig(base_config=tiny_bert(NUM_LABELS, id2label=NAMES, label2id=IDS).config)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.id2label, loaded.base_config.hidden_size, loaded.pad_token_id) == (NAMES, 16, PAD_TOKEN_ID)
    with pytest.raises(TypeError, match="AdaptedForSequenceClassification is never built: load one"):
        AdaptedForSequenceClassification(config)
