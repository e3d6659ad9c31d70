"""Models that are stored in half precision: what is trained is float32, what is frozen stays as it is."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.utils import logging

from hf_fedmoe.models import FedMoEForImageClassification, FedMoEForSequenceClassification, as_expert
from hf_fedmoe.strategies import FedAvgReserved, FedMoE, PFedMoE
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.precision import train_in_float32
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_ensemble,
    tiny_expert,
    tiny_federation,
    tiny_gate,
    tiny_gated_experts,
    tiny_mixture,
)
from tests.tiny_images import image_batch, tiny_convnext, tiny_image_federation, tiny_processor, tiny_resnet, tiny_vit
from tests.tiny_models import PAD_TOKEN_ID, make_different, text_batch, tiny_gpt2, tiny_llama


HALF = [torch.float16, torch.bfloat16]
METHODS = {"fedmoe": FedMoE, "fedavg_reserved": FedAvgReserved}


def stored(model, folder, dtype):
    """As it comes from a checkpoint in that precision."""
    model.to(dtype).save_pretrained(folder)
    auto = (
        AutoModelForSequenceClassification if model.main_input_name == "input_ids" else AutoModelForImageClassification
    )
    loaded = auto.from_pretrained(folder)
    assert loaded.dtype == dtype
    return loaded


def trained(folder, model, method="fedavg_reserved", data=None, **kwargs):
    changes = {"rounds": 2} | kwargs.pop("args", {})
    strategy = kwargs.pop("strategy", None) or METHODS[method]()
    run = FederatedTrainer(model, tiny_args(folder, **changes), data or tiny_federation(), strategy, **kwargs)
    run.train()
    assert not any(report.refused for report in run.rounds)
    assert all(t.isfinite().all() for t in state(run.model).values() if t.is_floating_point())
    return run


def types(tensors):
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


# Whole models


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_model_trains_as_the_same_numbers_in_float32(tmp_path, method, dtype):
    states = []
    for name in ("half", "whole"):
        expert = model = stored(tiny_expert(), tmp_path / name, dtype)
        gate = "main_features" if dtype == torch.bfloat16 else stored(tiny_gate(2), tmp_path / f"{name} gate", dtype)
        if method == "fedmoe":
            model = FedMoEForSequenceClassification.from_expert(expert, gate, num_routed_experts=2)
        if name == "whole":
            model.float()
        states.append(state(trained(tmp_path / f"{name} run", model, method).model))
    assert types(states[0].values()) == {torch.float32}
    assert_equal_states(*states)


def test_whatever_has_running_statistics_or_a_mixture_of_types(tmp_path):
    run = trained(
        tmp_path / "a",
        FedMoEForImageClassification.from_expert(stored(tiny_resnet(), tmp_path / "resnet", torch.float16)),
        "fedmoe",
        tiny_image_federation(),
        processing_class=tiny_processor(),
    )
    assert types(state(run.model).values()) == {torch.float32}
    mixed = tiny_expert().bfloat16()
    mixed.bert.embeddings.float()
    assert types(state(trained(tmp_path / "b", mixed).model).values()) == {torch.float32}


def test_shares_of_an_ensemble_stay_exact(tmp_path):
    ensemble = type(tiny_ensemble()).from_classifier(tiny_expert().bfloat16(), num_models=3)
    train_in_float32(ensemble)
    assert ensemble.mixture_M.tolist() == pytest.approx([1 / 3] * 3, abs=1e-7)


def test_own_models_of_clients_are_float32(tmp_path):
    own = copy.deepcopy(tiny_expert().config)
    own.dtype = torch.float16
    run = trained(tmp_path, tiny_expert().half(), strategy=PFedMoE([own], gate_hidden_size=5))
    assert types(run.personalize(0).state_dict().values()) == {torch.float32}


def test_one_line_says_so(tmp_path, caplog):
    logger = logging.get_logger("hf_fedmoe")
    logger.propagate = True
    with caplog.at_level("WARNING"):
        model = tiny_expert().half()
        train_in_float32(model)
        train_in_float32(model)
        train_in_float32(tiny_expert())
    size = sum(parameter.numel() for parameter in model.parameters())
    [record] = caplog.records
    assert record.message.startswith("The model is stored in torch.float16 and becomes torch.float32, which takes ")
    assert f"{2 * size / 1e6:.1f} MB more" in record.message and "`bf16=True`" in record.message


def test_saved_loaded_piped_and_trained_on(tmp_path):
    model = FedMoEForSequenceClassification.from_expert(stored(tiny_expert(), tmp_path / "start", torch.float16))
    run = trained(tmp_path / "run", model, "fedmoe")
    run.save_model(tmp_path / "saved")
    for dtype in (None, torch.bfloat16):
        arguments = {} if dtype is None else {"dtype": dtype}
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", **arguments)
        assert loaded.dtype == (dtype or torch.float32)
        if dtype is None:
            assert_equal_states(state(loaded), state(run.model))
        again = trained(tmp_path / f"again {dtype}", loaded, "fedmoe")
        assert types(state(again.model).values()) == {torch.float32}


# Adapters on a base of half precision


def llama(num_labels):
    torch.manual_seed(3)
    return tiny_llama(num_labels, pad_token_id=PAD_TOKEN_ID)


def gpt2(num_labels):
    torch.manual_seed(3)
    return tiny_gpt2(num_labels, pad_token_id=PAD_TOKEN_ID, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


BASES = {
    "bert": (lambda _: tiny_expert(), LoraConfig(r=4)),
    "gpt2": (gpt2, LoraConfig(r=4, fan_in_fan_out=True)),
    "llama": (llama, LoraConfig(r=4)),
    "vit": (tiny_vit, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
    "convnext": (tiny_convnext, LoraConfig(r=4, target_modules=["pwconv1"])),
    "ia3": (lambda _: tiny_expert(), IA3Config()),
}


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("name", "method"), [(name, "fedmoe") for name in BASES] + [("bert", "fedavg_reserved")])
def test_adapters_are_float32_and_the_base_stays_as_it_is_stored(tmp_path, name, method, dtype):
    make, config = BASES[name]
    torch.manual_seed(3)
    image = name in ("vit", "convnext")
    base = stored(make(4 if image else 3), tmp_path / "base", dtype)
    kwargs = {"processing_class": tiny_processor(), "data": tiny_image_federation()} if image else {}
    kwargs["args"] = {"bf16": name == "bert" or (dtype == torch.bfloat16 and name == "vit"), "num_train_epochs": 2}
    model = base
    if method == "fedmoe":
        cls = FedMoEForImageClassification if image else FedMoEForSequenceClassification
        model = cls.from_expert(tmp_path / "base", num_routed_experts=2, peft_config=config)
    else:
        kwargs["peft_config"] = config
    before = None if method == "fedavg_reserved" else frozen(model)
    run = trained(tmp_path / "run", model, method, **kwargs)
    model, after = run.model, frozen(run.model)
    assert types(p for p in model.parameters() if p.requires_grad) == {torch.float32}
    # Heads of the base, which nobody uses, are frozen too.
    assert types(after.values()) == {dtype}
    if method == "fedavg_reserved":
        assert {p.dtype for p in as_expert(model).parameters()} == {torch.float32}
        return
    assert_equal_states(after, before)
    assert run.evaluate()["eval_loss"] < 1.5
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    first, second = state(loaded), state(model)
    assert {key: t.dtype for key, t in first.items()} == {key: t.dtype for key, t in second.items()}
    assert_equal_states(first, second)
    batch = image_batch() if image else text_batch()
    if kwargs["args"]["bf16"]:
        return  # evaluation has left autocast around the model
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_end_near_those_on_a_base_in_float32(tmp_path, method, dtype):
    """Losses of a base stored in half precision follow those in float32."""
    found = []
    for name, kind in (("half", dtype), ("whole", torch.float32)):
        base = stored(make_different(tiny_expert(), 0.05), tmp_path / name, dtype).to(kind)
        args = {"rounds": 4, "num_train_epochs": 3, "learning_rate": 5e-2}
        if method == "fedmoe":
            model = FedMoEForSequenceClassification.from_expert(
                base, num_routed_experts=2, peft_config=LoraConfig(r=4)
            )
            run = trained(tmp_path / f"{name}_run", model, method, args=args)
        else:
            run = trained(tmp_path / f"{name}_run", base, method, args=args, peft_config=LoraConfig(r=4))
        found.append([report.loss for report in run.rounds] + [run.evaluate()["eval_loss"]])
    assert found[1][-2] < found[1][0] - 0.05  # something was learned
    assert found[0] == pytest.approx(found[1], abs=0.05)  # bf16 has two to three digits


def test_a_head_reads_what_a_half_base_gives_and_scores_in_float32():
    base = tiny_expert().bfloat16()
    model = FedMoEForSequenceClassification.from_expert(base, num_routed_experts=2, peft_config=LoraConfig(r=2))
    batch = text_batch()
    with torch.no_grad():
        for expert in model.experts:
            assert expert(**batch).logits.dtype == torch.float32
        features_BH = model.gate_features(batch)
        assert features_BH.dtype == torch.float32 and model.gate.weight.dtype == torch.float32
        # Exactly what the base computes in its type.
        hidden_BH = base.bert(**batch).pooler_output
    assert hidden_BH.dtype == torch.bfloat16 and torch.equal(features_BH, hidden_BH.float())


def test_trained_copies_inside_of_the_base(tmp_path):
    config = LoraConfig(r=2, modules_to_save=["pooler", "word_embeddings"])
    run = trained(tmp_path, tiny_expert().bfloat16(), peft_config=config)
    names = {name for name, p in run.model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert any("pooler" in name for name in names) and any("word_embeddings" in name for name in names)
    assert types(p for p in run.model.parameters() if p.requires_grad) == {torch.float32}


def test_a_peft_model_of_the_users_own(tmp_path):
    config = LoraConfig(r=2, modules_to_save=["classifier"])
    own = PeftModel(tiny_expert().half(), config)
    assert {p.dtype for name, p in own.named_parameters() if "modules_to_save" in name} == {torch.float16}
    run = trained(tmp_path, own)
    assert types(p for p in run.model.parameters() if p.requires_grad) == {torch.float32}
    assert run.model.get_base_model().bert.pooler.dense.weight.dtype == torch.float16


def test_clients_at_once_on_a_half_base(tmp_path):
    runs = []
    for at_once in (1, 2):
        args = {"clients_at_once": at_once, "optim": "sgd", "learning_rate": 0.5}
        runs.append(trained(tmp_path / str(at_once), tiny_expert().bfloat16(), args=args, peft_config=LoraConfig(r=2)))
    losses = [[report.loss for report in run.rounds] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("gate", ["main_features", "adapter", "model"])
def test_merged_experts_are_of_the_bases_type(gate):
    base = tiny_expert().bfloat16()
    gate = tiny_gate(2).half() if gate == "model" else gate
    model = FedMoEForSequenceClassification.from_expert(base, gate, num_routed_experts=2, peft_config=LoraConfig(r=2))
    assert types(model.gate.parameters()) == {torch.float32}
    for seed, expert in enumerate(model.experts):
        make_different(expert, seed=seed)
    merged = model.merge_adapters()
    assert types(p for p in merged.parameters() if p is not merged.alpha_logit) == {torch.bfloat16}
    with torch.no_grad():
        logits = [m(**text_batch(), dense=True).logits for m in (merged, model)]
    torch.testing.assert_close(*logits, rtol=0, atol=0.1)


# What `from_expert` is told


def test_dtype_and_what_else_concerns_loading(tmp_path):
    tiny_expert().half().save_pretrained(tmp_path)
    build = FedMoEForSequenceClassification.from_expert
    assert build(tmp_path).dtype == torch.float16
    assert build(tmp_path, dtype="float32").dtype == torch.float32
    eager = build(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert eager.dtype == torch.bfloat16
    adapters = build(tmp_path, dtype="float32", peft_config=LoraConfig(r=2))
    assert adapters.dtype == torch.float32 and adapters.gate.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"`dtype` would say how to load .* is a BertForSequenceClassification"):
        build(tiny_expert(), dtype="float32")
    for name in ("num_expert", "torch_dtype", "device"):
        with pytest.raises(ValueError, match=f"`{name}` is no argument of a mixture"):
            build(tiny_expert(), **{name: 2})
    with pytest.raises(ValueError, match="`dtype` is no argument of"):
        FedMoEForSequenceClassification.from_experts([tiny_expert()], [tiny_expert()], dtype="float32")


def test_mixtures_that_clients_train(tmp_path):
    from hf_fedmoe.strategies import FedMix

    run = trained(tmp_path, tiny_gated_experts().half(), strategy=FedMix())
    assert types(state(run.model).values()) == {torch.float32}
    assert types(state(trained(tmp_path, tiny_mixture().bfloat16(), "fedmoe").model).values()) == {torch.float32}
