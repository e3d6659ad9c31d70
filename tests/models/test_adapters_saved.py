"""Mixtures of adapters on disk: with their base, by its name, merged, and as plain PEFT adapters."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from hf_fedmoe.models import FedMoEForSequenceClassification
from tests.tiny_adapters import (
    BASES,
    CASES,
    REVIEWS,
    adapter_config,
    build,
    examples,
    mixture_class,
    names_of_base,
    saved_base,
    state_of,
)
from tests.tiny_models import (
    make_different,
)
from tests.without_package import logits_without_package


# PEFT turns GPT-2's weights round by itself, and says so for each layer.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


# ---------------------------------------------------------------- saving and loading


def assert_same_mixture(
    loaded: PreTrainedModel, model: PreTrainedModel, family: str, tolerance: float | None = None
) -> None:
    assert type(loaded) is type(model)
    batch = examples(family)
    if tolerance is None:
        # What the products of a ViT's few patches round to depends on where its weights happen to lie in memory.
        tolerance = 1e-6 if family == "vit" else 0.0
    with torch.no_grad():
        for arguments in ({"top_l": 1}, {"top_l": 2}, {"dense": True}):
            logits, expected = loaded(**batch, **arguments).logits, model(**batch, **arguments).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("family", "kind", "gate"), CASES)
def test_save_and_load_with_the_base(tmp_path, family, kind, gate):
    model = build(family, kind, gate=gate)
    model.save_pretrained(tmp_path)
    auto_class = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded.config.peft_config.get("base_model_name_or_path") is None
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert_same_mixture(loaded, model, family)


@pytest.mark.parametrize(("family", "kind", "gate"), CASES)
def test_save_and_load_with_the_base_by_reference(tmp_path, family, kind, gate):
    base = saved_base(family, tmp_path)
    model = build(family, kind, base, gate=gate)
    model.save_pretrained(tmp_path / "mixture")
    assert json.loads((tmp_path / "mixture" / "config.json").read_text())["peft_config"][
        "base_model_name_or_path"
    ] == str(base)
    saved = load_file(tmp_path / "mixture" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys() - names_of_base(model)
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "mixture" / "model.safetensors").stat().st_size < 4 * elements + 20_000

    auto_class = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = auto_class.from_pretrained(tmp_path / "mixture")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not loaded.training
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == saved.keys()
    assert_same_mixture(loaded, model, family)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_mixture(auto_class.from_pretrained(tmp_path / "again", top_l=2), model, family)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == saved.keys()


@pytest.mark.parametrize(("family", "kind", "gate"), [*CASES, ("bert", "lora", "model")])
def test_merged(tmp_path, family, kind, gate):
    config = {"top_l": 2, "initial_alpha": 0.3, "num_main_experts": 2, "mix": "logits"}
    gate = BASES[family](3) if gate == "model" else gate
    model = build(family, kind, gate=gate, **config)
    before = state_of(model)
    merged = model.merge_adapters()
    assert merged.config.peft_config is None
    assert (merged.config.top_l, merged.config.mix, len(merged.main_experts)) == (2, "logits", 2)
    assert merged.alpha.item() == model.alpha.item()
    assert all(isinstance(expert, type(BASES[family]())) for expert in merged.experts)
    assert_same_mixture(merged, model, family, 2e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    merged.save_pretrained(tmp_path)
    assert "base." not in " ".join(load_file(tmp_path / "model.safetensors"))
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in merged.state_dict().items())
    assert_same_mixture(loaded, merged, family, 1e-6)


@pytest.mark.parametrize(("family", "kind"), [("bert", "ia3"), ("gpt2", "lora"), ("roberta", "lora"), ("vit", "lora")])
def test_exported_adapters_load_with_peft_and_come_back(tmp_path, family, kind):
    base, batch = saved_base(family, tmp_path), examples(family)
    model = build(family, kind, base)
    requires_grad = [p.requires_grad for p in model.parameters()]
    model.save_adapters(tmp_path / "adapters")
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    folders = {path.name for path in (tmp_path / "adapters").iterdir() if path.is_dir()}
    assert folders == {"main_0", "routed_0", "routed_1", "routed_2"}
    auto_class = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    with torch.no_grad():
        logits_BSC = model(**batch, output_expert_logits=True).expert_logits
        for place, name in enumerate(["main_0", "routed_0", "routed_1", "routed_2"]):
            plain = PeftModel.from_pretrained(auto_class.from_pretrained(base), tmp_path / "adapters", subfolder=name)
            assert torch.equal(plain.eval()(**batch).logits, logits_BSC[:, place])
        main = [tmp_path / "adapters" / "main_0"]
        routed = [tmp_path / "adapters" / f"routed_{k}" for k in range(3)]
        for given in (base, None, auto_class.from_pretrained(base)):
            again = mixture_class(family).from_adapters(main, routed[::-1], base=given, top_l=2)
            found_BSC = again(**batch, output_expert_logits=True).expert_logits
            assert torch.equal(found_BSC, logits_BSC[:, [0, 3, 2, 1]])
            assert again.config.top_l == 2
            assert all(p.requires_grad for expert in again.experts for p in expert.parameters())
            name = again.config.peft_config["base_model_name_or_path"]
            assert name == (None if isinstance(given, PreTrainedModel) else str(base))


def test_adapters_that_peft_trained_alone(tmp_path):
    base, folders = saved_base("bert", tmp_path), []
    logits = []
    for seed in range(3):
        trained = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(base), adapter_config(task_type="SEQ_CLS")
        )
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            logits.append(trained.eval()(**examples()).logits)
        folders.append(tmp_path / f"client-{seed}")
        trained.save_pretrained(folders[-1])
    model = FedMoEForSequenceClassification.from_adapters(folders[:1], folders[1:])
    found_BSC = model(**examples(), output_expert_logits=True).expert_logits
    torch.testing.assert_close(found_BSC, torch.stack(logits, 1), rtol=0, atol=1e-6)


def test_pipeline_on_a_checkpoint_with_its_base_by_reference(tmp_path):
    id2label = {0: "poor", 1: "fair", 2: "great"}
    model = build("gpt2", base=REVIEWS, different=False, id2label=id2label, top_l=2)
    for seed, expert in enumerate(model.experts):
        make_different(expert, 0.1, seed)
    tokenizer = AutoTokenizer.from_pretrained(REVIEWS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (
        (tmp_path / "model.safetensors").stat().st_size
        < 200_000
        < REVIEWS.joinpath("model.safetensors").stat().st_size
    )
    texts = ["I love this dress, it fits well", "Too small, and the fabric is cheap. I sent it back", "fine"]
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    with torch.no_grad():
        probs_BC = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.exp()
    for result, probs_C in zip(classify(texts, batch_size=3, top_k=None), probs_BC, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        assert scores == pytest.approx(dict(zip(id2label.values(), probs_C.tolist(), strict=True)), abs=1e-6)


def test_by_reference_where_the_package_is_not_installed(tmp_path):
    model = build(base=saved_base("bert", tmp_path), top_l=2, gate="adapter")
    model.save_pretrained(tmp_path / "mixture")
    input_ids = examples()["input_ids"]
    [logits] = logits_without_package([tmp_path / "mixture"], input_ids, tmp_path / "cache")
    expected = model(input_ids).logits
    assert torch.equal(logits, expected)
    again = FedMoEForSequenceClassification.from_pretrained(tmp_path / "mixture" / "again")
    assert torch.equal(again(input_ids).logits, expected)
    assert (tmp_path / "mixture" / "again" / "adapters_fedmoe.py").exists()
    assert (tmp_path / "mixture" / "again" / "model.safetensors").stat().st_size < 40_000


def test_deep_copy_is_independent():
    model = build()
    copied = copy.deepcopy(model)
    expected = model(**examples()).logits
    make_different(model, seed=5)
    assert torch.equal(copied(**examples()).logits, expected)
