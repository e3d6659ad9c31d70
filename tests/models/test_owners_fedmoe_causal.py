"""Owners who come and go, their adapters in PEFT's form, and mixtures on disk."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, pipeline

from hf_fedmoe.models import FedMoECausalConfig, FedMoEForCausalLM, TextStatistics, base_sha256
from tests.tiny_decoders import (
    ALPHA,
    DECODERS,
    OWNERS,
    RANK,
    adapter_for,
    prompts,
    statistics_for,
    tiny_decoder,
    tiny_mixture,
)
from tests.tiny_models import make_different
from tests.tiny_tokenizer import tiny_tokenizer
from tests.without_package import results_without_package


# PEFT turns GPT-2's weights round by itself, and says so for each layer.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")

TARGETS = {"gpt2": ["c_fc", "mlp.c_proj"]}


def peft_model(family: str, seed: int = 0, **config) -> PeftModel:
    fields = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS.get(family, _GATED)} | config
    model = get_peft_model(tiny_decoder(family), LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


_GATED = ["gate_proj", "up_proj", "down_proj"]


def assert_same(found: FedMoEForCausalLM, expected: FedMoEForCausalLM) -> None:
    """Bitwise."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and found.config.to_dict() == expected.config.to_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with torch.no_grad():
        for arguments in (prompts(), {"input_ids": prompts(pad=False)["input_ids"][:1]}):
            assert torch.equal(found.route(**arguments), expected.route(**arguments))
            assert torch.equal(found(**arguments).logits, expected(**arguments).logits)


@pytest.mark.parametrize(("family", "top_l"), [("gpt2", None), ("llama", 1)])
def test_a_mixture_without_an_owner_is_one_that_never_had_it(family, top_l):
    model = tiny_mixture(family, top_l=top_l)
    before = copy.deepcopy(model)
    for gone in OWNERS:
        left = tuple(name for name in OWNERS if name != gone)
        expected = tiny_mixture(family, left, top_l=top_l)
        assert_same(model.without(gone), expected)
        assert_same(model.only(reversed(left)), expected)
    assert_same(model.without("court", "press"), tiny_mixture(family, ("code",), top_l=top_l))
    assert_same(model.only([]), tiny_mixture(family, (), top_l=top_l))
    assert_same(model.without("press").without("court"), model.only(["code"]))
    # Nothing has happened to the mixture itself, and the weights of the base are there once.
    assert_same(model, before)
    shared = dict(model.without("court").named_parameters())
    for name, parameter in model.named_parameters():
        if ".owners." not in name:
            assert shared[name].data_ptr() == parameter.data_ptr() and shared[name] is not parameter
            assert not shared[name].requires_grad
    assert all(shared[name].requires_grad for name in shared if ".owners." in name)


def test_copies_over_one_base_are_apart_in_all_else():
    model = tiny_mixture()
    fewer, batch = model.without("code"), prompts()
    expected = model(**batch).logits
    with torch.no_grad():
        for layer in fewer.expert_layers().values():
            layer.owners.lora_B.zero_()
    fewer.set_statistics("court", statistics_for(model, "elsewhere"))
    fewer.config.top_l = 1
    assert torch.equal(model(**batch).logits, expected)
    fewer.to(torch.float64)
    assert torch.equal(model(**batch).logits, expected) and model.dtype == torch.float32


@pytest.mark.parametrize("family", DECODERS)
def test_experts_are_adapters_of_peft(tmp_path, family):
    batch = prompts(pad=False)
    model = tiny_mixture(family)
    theirs = {f"peft {seed}": peft_model(family, seed) for seed in (1, 2)}
    theirs["peft 1"].save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    mixture = model.add_owner(tmp_path / "adapter", name="peft 1", licence="CC0").add_owner(
        theirs["peft 2"], name="peft 2"
    )
    assert mixture.config.owners[3:] == [{"name": "peft 1", "licence": "CC0"}, {"name": "peft 2"}]
    for name, adapted in theirs.items():
        expected = adapted(**batch).logits
        for found in (mixture(**batch, expert=name).logits, mixture.merge(name)(**batch).logits):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # And back.
    mixture.save_adapter("peft 1", tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == set(adapter_for(model, "x"))
    again = PeftModel.from_pretrained(tiny_decoder(family), tmp_path / "again")
    assert torch.equal(again(**batch).logits, theirs["peft 1"](**batch).logits)


def test_a_merged_model_is_an_ordinary_one(tmp_path):
    model = tiny_mixture("gpt2")
    merged = model.merge("press")
    assert type(merged) is type(model.base) and all(parameter.requires_grad for parameter in merged.parameters())
    assert not any("owners" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**prompts()).logits, merged(**prompts()).logits)
    assert base_sha256(model.merge("base")) == model.config.base_sha256 == base_sha256(model.base)
    assert base_sha256(merged) != base_sha256(model.base)
    make_different(merged)
    assert_same(model, tiny_mixture("gpt2"))


@pytest.mark.parametrize("family", DECODERS)
def test_save_and_load(tmp_path, family):
    model = tiny_mixture(family, top_l=2, owners=("court", "code"))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is FedMoEForCausalLM and not loaded.training
    loaded.config.dtype = model.config.dtype
    assert loaded.generation_config.max_new_tokens == 7
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    batch = prompts()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(loaded.generate(**batch), model.generate(**batch))
    assert torch.equal(loaded.without("court")(**batch).logits, model.without("court")(**batch).logits)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is FedMoECausalConfig and config.expert_names == ["base", "court", "code"]
    assert config.get_text_config().vocab_size == 40 and not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_save_and_load_by_the_name_of_the_base(tmp_path, family):
    tiny_decoder(family).save_pretrained(tmp_path / "base")
    model = tiny_mixture(family, base=str(tmp_path / "base"))
    whole = tiny_mixture(family)
    batch = prompts()
    assert torch.equal(model(**batch).logits, whole(**batch).logits)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "mixture")
    names = load_file(tmp_path / "mixture" / "model.safetensors").keys()
    assert {name for name in names if ".owners." not in name} == {"router_ED", "sums_EP"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(loaded.generate(**batch), model.generate(**batch)) and not loaded.training
    assert torch.equal(loaded.only(["code"])(**batch).logits, model.only(["code"])(**batch).logits)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    # As in transformers, a configuration may be given by its folder.
    loaded = FedMoEForCausalLM.from_pretrained(tmp_path / "mixture", config=tmp_path / "mixture")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded.only(["code"]).save_pretrained(tmp_path / "fewer")
    fewer = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer", dtype=torch.bfloat16)
    assert fewer.dtype == torch.bfloat16 and fewer.router_ED.dtype == torch.float32
    expected = model.only(["code"])(**batch).logits
    torch.testing.assert_close(fewer(**batch).logits.float(), expected, rtol=0.1, atol=0.1)
    # A file that brings weights of its own for the base, or lacks some of the experts.
    path = tmp_path / "mixture" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in model.state_dict() if "layers.0" in name or "h.0" in name)
    save_file(tensors | {name: model.state_dict()[name] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit: missing \[\], not expected \['{name}'\]. Take both from one"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    save_file({"router_ED": tensors["router_ED"]}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit: missing \['base.*lora_A', .*, not expected \[\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    save_file(tensors, path, metadata={"format": "pt"})
    # Another base by the same name.
    make_different(tiny_decoder(family), 1e-4).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base` belongs to a base with `base_sha256` .*: take the base that it was"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("by_name", [False, True])
def test_a_base_in_4_bits(tmp_path, by_name):
    tiny_decoder(intermediate_size=64, hidden_size=64).save_pretrained(tmp_path / "base")
    whole = tiny_mixture(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    batch = prompts()
    quantization = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        "device_map": {"": "cpu"},
    }
    if by_name:
        tiny_mixture(base=str(tmp_path / "base")).save_pretrained(tmp_path / "mixture")
        model = FedMoEForCausalLM.from_pretrained(tmp_path / "mixture", **quantization)
    else:
        model = tiny_mixture(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base", **quantization))
    with torch.no_grad():
        expected = whole(**batch).logits
        assert torch.nn.functional.cosine_similarity(model(**batch).logits, expected, dim=-1).mean() > 0.85
        assert torch.equal(model.route(**batch), whole.route(**batch))
        assert model.generate(**batch, max_new_tokens=3).shape == (3, 13)
        fewer = model.without("press")
        assert torch.equal(fewer(**batch, expert="court").logits, model(**batch, expert="court").logits)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 12 and all(parameter.grad.abs().sum() > 0 for parameter in trained)
    with pytest.raises(ValueError, match=r"gate_proj` is quantised, in torch.uint8: load the base without that"):
        model.merge("court")


LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

batch = torch.tensor(json.loads(sys.argv[1]))
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        print("RESULT", json.dumps(model(batch).logits.tolist()))
    print("RESULT", json.dumps(model.generate(batch, max_new_tokens=5, do_sample=False).tolist()))
    model.without("press").save_pretrained(path + "/again")
"""


@torch.no_grad()
def test_loads_where_the_package_is_not_installed(tmp_path):
    tiny_decoder("gpt2").save_pretrained(tmp_path / "base")
    models = {"whole": tiny_mixture(), "named": tiny_mixture("gpt2", base=str(tmp_path / "base"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    input_ids = prompts(pad=False)["input_ids"]
    arguments = [json.dumps(input_ids.tolist()), *(str(tmp_path / name) for name in models)]
    found = iter(results_without_package(LOAD, arguments, tmp_path / "cache"))
    for name, model in models.items():
        assert torch.equal(torch.tensor(next(found)), model(input_ids).logits)
        text = model.generate(input_ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(torch.tensor(next(found)), text)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name / "again")
        assert torch.equal(again(input_ids).logits, model.without("press")(input_ids).logits)
        assert {file.name for file in (tmp_path / name / "again").glob("*.py")} == {
            *("adapters_fedmoe.py", "adapters_fedmoe_causal.py", "building_fedmoe_causal.py"),
            *("configuration_checks.py", "configuration_fedmoe_causal.py", "lora_fedmoe_causal.py"),
            *("modeling_fedmoe_causal.py", "precision_fedmoe.py", "router_fedmoe_causal.py"),
        }


def test_pipeline(tmp_path):
    model, tokenizer = tiny_mixture(), tiny_tokenizer()
    tokenizer.padding_side = "left"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = ["w5 w9 w12 w3 ", "w20 w21 "]
    found = write(texts, batch_size=2, max_new_tokens=5, do_sample=False)
    for text, [result] in zip(texts, found, strict=True):
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(input_ids, max_new_tokens=5, do_sample=False)[0]
        assert result["generated_text"].split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def test_adapters_and_statistics_that_do_not_fit(tmp_path):
    model = tiny_mixture()
    tensors, key = adapter_for(model, "new"), "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"`owners\[3\]` is named 'press', which is taken: give it another name"):
        model.add_owner(tensors, name="press")
    with pytest.raises(ValueError, match=r"`owners\[3\]` is named 'base', which is what the base is called"):
        model.add_owner(tensors, name="base")
    for wrong, found in ((tensors[key][:2], r"\(2, 32\)"), (None, "nothing")):
        changed = tensors | {key: wrong} if wrong is not None else {k: v for k, v in tensors.items() if k != key}
        match = rf"`adapter` has {found} as `{key}`, where the mixture takes \(4, 32\): train it"
        with pytest.raises(ValueError, match=match):
            model.add_owner(changed, name="new")
    with pytest.raises(ValueError, match="as `extra`, where the mixture takes nothing"):
        model.add_owner(tensors | {"extra": torch.ones(1)}, name="new")
    with pytest.raises(ValueError, match="`adapter` is not finite at"):
        model.add_owner(tensors | {key: tensors[key] * float("nan")}, name="new")
    with pytest.raises(ValueError, match="`adapter` is a LlamaForCausalLM: pass a folder"):
        model.add_owner(tiny_decoder(), name="new")
    for config, match in (
        ({"r": 2}, "`adapter.r` is 2 and its scale 3.0, where the mixture has `lora_rank` 4 and the scale 1.5"),
        ({"lora_alpha": 8}, "its scale 2.0, where the mixture .* train it with `r=4` and `lora_alpha=6`"),
        ({"rank_pattern": {"up_proj": 2}}, "`adapter.rank_pattern` is .* Leave it out"),
        ({"modules_to_save": ["lm_head"]}, "`adapter.modules_to_save` is .* no layers of their own"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj"]}, r"takes \(4, 48\)|takes nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            model.add_owner(peft_model("llama", **config), name="new")
    kind = IA3Config(target_modules=_GATED, feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"`adapter.peft_type` is 'IA3': experts are LoRA adapters"):
        model.add_owner(get_peft_model(tiny_decoder(), kind), name="new")
    # Pickles are not read.
    peft_model("llama").save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"adapter_model.safetensors"):
        model.add_owner(tmp_path / "adapter", name="new")

    gram_DD = statistics_for(model, "new").gram_DD
    with pytest.raises(ValueError, match="`statistics` belongs to a base with `base_sha256` 'ab'"):
        model.add_owner(tensors, TextStatistics(gram_DD, "ab"), name="new")
    with pytest.raises(ValueError, match="`statistics` are of embeddings 31 wide, but the base's are 32 wide"):
        model.set_statistics("press", TextStatistics(gram_DD[1:, 1:].contiguous()))
    TextStatistics(gram_DD, model.config.base_sha256).save(tmp_path / "sums.safetensors")
    added = model.add_owner(tensors, tmp_path / "sums.safetensors", name="new")
    assert torch.equal(added.statistics_of("new").gram_DD, gram_DD)
    for method in (model.without, model.statistics_of, model.merge):
        with pytest.raises(ValueError, match=r"`expert` is 'cort': did you mean 'court'\? The experts are \['base', "):
            method("cort")
    with pytest.raises(ValueError, match="`base` is the base, which is nobody's: pass the name of an owner"):
        model.without("base")
    with pytest.raises(ValueError, match="`names` is 'court': pass a list of names"):
        model.only("court")


def test_the_hash_of_a_base_is_of_its_values():
    base = tiny_decoder()
    expected = base_sha256(base)
    assert expected == base_sha256(tiny_decoder()) == base_sha256(copy.deepcopy(base).to(torch.bfloat16))
    assert expected != base_sha256(tiny_decoder(seed=1)) and len(expected) == 64
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[3, 3] += 0.01
    assert base_sha256(base) != expected
