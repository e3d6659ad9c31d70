"""Mixtures whose experts are PEFT adapters of one frozen base."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, VeraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from hf_fedmoe.models import FedMoEConfig, FedMoEForImageClassification, FedMoEForSequenceClassification
from tests.tiny_adapters import (
    BASES,
    CASES,
    KINDS,
    LABELS,
    adapter_config,
    build,
    examples,
    names_of_base,
    saved_base,
    state_of,
)
from tests.tiny_images import tiny_stock_resnet
from tests.tiny_models import (
    make_different,
    tiny_bert,
    tiny_distilbert,
)


# PEFT turns GPT-2's weights round by itself, and says so for each layer.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_starts_as_the_base(family, kind):
    torch.manual_seed(0)
    base = make_different(BASES[family]())
    batch = examples(family)
    with torch.no_grad():
        expected = base(**batch).logits
        model = build(family, kind, base, different=False, num_main_experts=2)
        logits_BSC = model(**batch, output_expert_logits=True).expert_logits
        assert logits_BSC.shape == (8, 5, 4)
        for place, logits_BC in enumerate(logits_BSC.unbind(1)):
            assert torch.equal(logits_BC, expected)
            assert torch.equal(model.experts[place](**batch).logits, expected)
        assert torch.equal(model(**batch).logits.argmax(-1), expected.argmax(-1))
    first, *others = [state_of(expert) for expert in model.experts]
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("family", "kind", "gate"), CASES)
def test_one_copy_of_the_base_and_adapters_alone_are_trained(family, kind, gate):
    base = BASES[family]()
    elements = sum(parameter.numel() for parameter in base.parameters())
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    model = build(family, kind, base, gate=gate)
    one = sum(parameter.numel() for parameter in model.experts[0].parameters())
    assert 0 < one < elements / 4
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert pointers <= storages  # not a copy of it
    gate_elements = sum(parameter.numel() for parameter in model.gate.parameters())
    adapters = len(model.adapter_names)
    assert adapters == (5 if gate == "adapter" else 4)
    assert sum(p.numel() for p in model.parameters()) == elements + adapters * one + gate_elements + 1
    assert len(storages) == len(list(model.parameters()))

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters()} - names_of_base(model)
    own = [parameter for expert in model.experts for parameter in expert.parameters()]
    own += [*model.gate.parameters(), model.alpha_logit]
    if gate == "adapter":
        gate_own = model.gate_parameters()
        assert len(gate_own) == len(set(gate_own))
        assert all(parameter.requires_grad for parameter in gate_own)
        assert not {id(p) for p in gate_own} & {id(p) for e in model.experts for p in e.parameters()}
    else:
        assert {id(p) for p in own} == {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in model.gate_parameters()} == {id(p) for p in model.gate.parameters()}


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_l", [1, 2])
def test_dispatch_equals_a_loop_and_the_dense_computation_in_any_order(family, kind, top_l, monkeypatch):
    model = build(family, kind).double()
    batch = examples(family)
    if family == "vit":
        batch = {name: value.double() for name, value in batch.items()}
    runs = []
    monkeypatch.setattr(model, "_run", lambda *args, f=model._run, **kw: runs.append(len(runs)) or f(*args, **kw))
    with torch.no_grad():
        out = model(**batch, top_l=top_l)
        used = out.selected_experts.unique()
        assert len(used) > 1
        assert len(runs) == (2 if kind == "lora" else 1 + len(used))
        full = model(**batch, top_l=top_l, output_expert_logits=True)
        torch.testing.assert_close(out.logits, full.logits, rtol=0, atol=1e-10)
        assert torch.equal(out.selected_experts, full.selected_experts)
        # By hand: Eq. 10 from the experts' own logits.
        experts = model.experts
        for row, chosen_L in enumerate(out.selected_experts.tolist()):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            weights_L = out.gate_probs[row, chosen_L].softmax(-1)
            mixed = 0.5 * experts[0](**one).logits[0].softmax(-1)
            for weight, k in zip(weights_L, chosen_L, strict=True):
                mixed = mixed + 0.5 * weight * experts[1 + k](**one).logits[0].softmax(-1)
            torch.testing.assert_close(out.logits[row].exp(), mixed, rtol=0, atol=1e-10)
        for seed in range(3):
            order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
            shuffled = model(**{name: value[order] for name, value in batch.items()}, top_l=top_l)
            torch.testing.assert_close(shuffled.logits, out.logits[order], rtol=0, atol=1e-10)
        everything = model(**batch, top_l=3)
        assert (everything.logits - full.logits).abs().max() > 1e-4
        model.config.top_l_weighting = "renormalize"
        dense = model(**batch, dense=True).logits
        torch.testing.assert_close(model(**batch, top_l=3).logits, dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_features_come_from_the_head_of_the_first_main_expert_or_of_the_gate(kind):
    batch = examples()
    for gate in ("main_features", "adapter"):
        model = build(kind=kind, gate=gate)
        with torch.no_grad():
            if gate == "adapter":
                assert model.gate_features(batch) is None
                before = model(**batch).gate_probs
                make_different(model.experts[0], 0.5)
                assert torch.equal(model(**batch).gate_probs, before)  # reads no expert
                adapter_of_gate = [p for p in model.gate_parameters() if p not in set(model.gate.parameters())]
                adapter_of_gate[-1].add_(1.0)
                assert not torch.equal(model(**batch).gate_probs, before)
            else:
                features_BH = model.gate_features(batch)
                head = model.experts[0].adapter.base_model.model.classifier
                logits_BC = features_BH @ head.modules_to_save.weight.T + head.modules_to_save.bias
                torch.testing.assert_close(logits_BC, model.experts[0](**batch).logits, rtol=0, atol=1e-5)
                torch.testing.assert_close(model(**batch).gate_probs, model.gate(features_BH).softmax(-1))


def test_gate_that_is_a_model():
    model = build(gate=tiny_distilbert(3))
    with torch.no_grad():
        out, full = model(**examples()), model(**examples(), output_expert_logits=True)
    torch.testing.assert_close(out.logits, full.logits, rtol=0, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.gate.parameters())


def test_bfloat16(tmp_path):
    model = build(base=saved_base("bert", tmp_path))
    model.save_pretrained(tmp_path / "mixture")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mixture", dtype=torch.bfloat16)
    for half in (copy.deepcopy(model).bfloat16(), loaded):
        assert half.dtype == half.base.dtype == torch.bfloat16
        for arguments in ({"top_l": 2}, {"dense": True}):
            with torch.no_grad():
                logits, expected = half(**examples(), **arguments).logits, model(**examples(), **arguments).logits
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected, rtol=0, atol=0.15)
    assert loaded.alpha_logit.dtype == torch.float32


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base(tmp_path, bits):
    tiny_bert(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    model = build(base=tmp_path / "base")
    model.save_pretrained(tmp_path / "mixture")
    # The head is trained, and stays as it is.
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["classifier"])
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "mixture", quantization_config=quantization, device_map={"": "cpu"}
    )
    loaded.train()(**examples(), labels=LABELS).loss.backward()
    assert all(parameter.grad is not None for expert in loaded.experts for parameter in expert.parameters())
    loaded.eval()
    with torch.no_grad():
        logits, full = (loaded(**examples(), top_l=2, output_expert_logits=o).logits for o in (False, True))
        dense, expected = (m(**examples(), dense=True).logits for m in (loaded, model))
    torch.testing.assert_close(logits, full, rtol=0, atol=5e-2)
    torch.testing.assert_close(dense, expected, rtol=0, atol=0.3)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(("family", "kind", "gate"), CASES)
def test_a_step_changes_every_adapter_and_no_bit_of_the_base(family, kind, gate):
    model = build(family, kind, gate=gate).train()
    before = state_of(model)
    frozen = names_of_base(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**examples(family), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert not parameter.requires_grad
            assert parameter.grad is None, name
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    for expert in model.experts:
        for name, parameter in expert.named_parameters():
            assert parameter.grad.abs().max() > 0, (expert.name, name)
    assert not torch.equal(before["gate.weight"], after["gate.weight"])
    assert not torch.equal(before["alpha_logit"], after["alpha_logit"])
    for parameter in model.gate_parameters():
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_copy_of_an_expert_shares_the_frozen_tensors_and_owns_its_adapter(family, kind):
    model, batch = build(family, kind), examples(family)
    before = state_of(model)
    expert = model.experts[2]
    with torch.no_grad():
        expected = expert(**batch).logits
        copied = expert.copy()
        assert torch.equal(copied(**batch).logits, expected)
    assert list(copied.peft_model.peft_config) == ["routed_1"]
    shared = {p.data_ptr() for p in model.base.parameters()} & {p.data_ptr() for p in copied.peft_model.parameters()}
    own = {p.data_ptr() for p in copied.parameters()}
    assert len(shared) == len(list(copied.peft_model.parameters())) - len(own)
    assert not shared & own
    assert copied.state_dict().keys() == expert.state_dict().keys()
    assert all(p.requires_grad == (p.data_ptr() in own) for p in copied.peft_model.parameters())

    optimizer = torch.optim.SGD(copied.train().parameters(), lr=0.5)
    for _ in range(2):
        copied(**batch, labels=LABELS).loss.backward()
        optimizer.step()
    for name, tensor in copied.state_dict().items():
        assert not torch.equal(tensor, expert.state_dict()[name]), name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for e in model.experts for p in e.parameters())
    assert torch.equal(expert.eval()(**batch).logits, expected)
    with torch.no_grad():
        expert.load_state_dict(copied.state_dict())
        assert torch.equal(expert(**batch).logits, copied.eval()(**batch).logits)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(use_dora=True), r"`peft_config.use_dora` is True: .* exact average\. Leave it out"),
        (dict(peft_type="LORA", r=0), r"`peft_config.r` is 0: pass a rank of at least 1"),
        (LoraConfig(rank_pattern={"query": 0}), r"`peft_config.rank_pattern\['query'\]` is 0: pass a rank"),
        (LoraConfig(bias="lora_only"), r"`peft_config.bias` is 'lora_only': .* Pass `bias='none'`"),
        (LoraConfig(init_lora_weights="pissa"), r"init_lora_weights` is 'pissa', which changes the base: pass one of"),
        (VeraConfig(), r"`peft_config.peft_type` is 'VERA': .* types LORA, IA3"),
        (PrefixTuningConfig(num_virtual_tokens=2), r"`peft_config.peft_type` is 'PREFIX_TUNING'"),
        ({"r": 4}, r"`peft_config.peft_type` is None: .* pass a `LoraConfig` or an `IA3Config`"),
        (LoraConfig(target_modules=["nowhere"]), r"`peft_config.target_modules` has \['nowhere'\]"),
    ],
)
def test_configurations_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), peft_config=config)


def test_bases_that_are_refused():
    with pytest.raises(ValueError, match=r"keeps running statistics, .* take a base without BatchNorm"):
        FedMoEForImageClassification.from_expert(
            tiny_stock_resnet(), peft_config=LoraConfig(target_modules=["convolution"])
        )
    with pytest.raises(ValueError, match="`gate` is 'adapter', but `peft_config` is None"):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), gate="adapter")
    with pytest.raises(ValueError, match=r"`peft_config` cannot turn whole models into adapters: .* `from_expert`"):
        FedMoEForSequenceClassification.from_experts([tiny_bert()], [tiny_bert()], peft_config=adapter_config())


def test_whole_experts_have_no_adapters(tmp_path):
    model = FedMoEForSequenceClassification.from_expert(tiny_bert())
    with pytest.raises(ValueError, match=r"`peft_config` is None: .* save them with `save_pretrained`"):
        model.save_adapters(tmp_path)
    with pytest.raises(ValueError, match="`peft_config` is None: the experts are whole models already"):
        model.merge_adapters()
    with pytest.raises(ValueError, match="Adapters belong to their base as it is: resize its embeddings, then build"):
        build(different=False).resize_token_embeddings(50)


def saved_adapters(tmp_path: Path, name: str, **config) -> Path:
    """Two experts' folders are in it, `main_0` and `routed_0`."""
    base = config.pop("base", tmp_path / "base")
    build(base=base, num_routed_experts=1, peft_config=adapter_config(**config)).save_adapters(tmp_path / name)
    return tmp_path / name


def test_adapters_that_do_not_go_together(tmp_path):
    saved_base("bert", tmp_path)
    tiny_bert().save_pretrained(tmp_path / "other")
    first = saved_adapters(tmp_path, "first")
    for name, config, field in [
        ("rank", {"r": 2}, "r"),
        ("targets", {"target_modules": ["query"]}, "target_modules"),
        ("elsewhere", {"base": tmp_path / "other"}, "base_model_name_or_path"),
        ("kind", {"kind": "ia3"}, "alora_invocation_tokens|alpha_pattern|feedforward_modules"),
    ]:
        other = saved_adapters(tmp_path, name, **config)
        with pytest.raises(ValueError, match=rf"The adapters differ in `({field})`: .*first.*{name}"):
            FedMoEForSequenceClassification.from_adapters([first / "main_0"], [other / "routed_0"])
    with pytest.raises(ValueError, match="`routed` is empty"):
        FedMoEForSequenceClassification.from_adapters([first / "main_0"], [])


def test_adapters_that_do_not_fit_the_base(tmp_path):
    saved_base("bert", tmp_path)
    first = saved_adapters(tmp_path, "first")
    folders = [first / "main_0"], [first / "routed_0"]
    for base in (tiny_bert(num_labels=3), tiny_bert(hidden_size=8), tiny_bert(num_hidden_layers=1)):
        with pytest.raises(ValueError, match=r"main_0' has .* the base takes .*: pass the base that"):
            FedMoEForSequenceClassification.from_adapters(*folders, base=base)
    nameless = tmp_path / "nameless"
    build(num_routed_experts=1).save_adapters(nameless)
    config = json.loads((nameless / "main_0" / "adapter_config.json").read_text())
    for name in ("main_0", "routed_0"):
        (nameless / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="`base` is None, and the adapters name none"):
        FedMoEForSequenceClassification.from_adapters([nameless / "main_0"], [nameless / "routed_0"])


def test_base_that_changed_since(tmp_path):
    build(base=saved_base("bert", tmp_path)).save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match="`output_loading_info` does not go with adapters"):
        FedMoEForSequenceClassification.from_pretrained(tmp_path / "mixture", output_loading_info=True)
    config = json.loads((tmp_path / "mixture" / "config.json").read_text())
    config["expert_config"]["num_hidden_layers"] = 3
    (tmp_path / "mixture" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"checkpoint and the base .* do not fit: missing .*layer.2.* changed since"):
        FedMoEForSequenceClassification.from_pretrained(tmp_path / "mixture")


def test_fresh_weights_from_a_configuration():
    config = FedMoEConfig(expert_config=tiny_bert().config, peft_config=adapter_config())
    model = FedMoEForSequenceClassification(config).eval()
    logits_BSC = model(**examples(), output_expert_logits=True).expert_logits
    assert all(torch.equal(logits_BSC[:, 0], logits_BSC[:, place]) for place in range(4))
    assert logits_BSC.std() > 1e-4
