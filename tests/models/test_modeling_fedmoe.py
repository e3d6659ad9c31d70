import copy

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_fedmoe.models import (
    FedMoEConfig,
    FedMoEForSequenceClassification,
    gating_entropy,
    load_imbalance,
)
from tests.mixture_by_hand import mixture_by_hand
from tests.tiny_models import (
    CODE_OF_A_MIXTURE,
    EOS_TOKEN_ID,
    PAD_TOKEN_ID,
    TEXT_FAMILIES,
    VOCAB_SIZE,
    make_different,
    text_batch,
    tiny_bert,
    tiny_distilbert,
    tiny_gpt2,
    tiny_llama,
)


GATES = ("main_features", "model")


def build(family: str = "bert", gate: str = "main_features", different: bool = True, **config):
    """A tiny mixture whose experts differ; its gate, if a model, is a DistilBERT."""
    torch.manual_seed(0)
    if gate == "model":
        gate = tiny_distilbert(config.get("num_routed_experts", 3))
    config = {"pad_token_id": PAD_TOKEN_ID} | config
    model = FedMoEForSequenceClassification.from_expert(TEXT_FAMILIES[family](), gate, **config)
    return make_different(model) if different else model


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("gate", GATES)
def test_families_sparse_equals_per_example_loop_in_any_order(family, gate):
    model = build(family, gate, num_routed_experts=4, top_l=2).double()
    batch = text_batch(8)
    with torch.no_grad():
        out = model(**batch)
        assert len(out.selected_experts.unique()) > 1
        for row in range(8):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            expected, chosen = mixture_by_hand(model, one, top_l=2)
            torch.testing.assert_close(out.logits[row].exp(), expected, rtol=0, atol=1e-7)
            assert out.selected_experts[row].tolist() == chosen
        order = torch.randperm(8)
        shuffled = model(**{name: value[order] for name, value in batch.items()})
    torch.testing.assert_close(shuffled.logits, out.logits[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_features_are_the_input_of_the_head(family):
    model = build(family, num_main_experts=2)
    batch = text_batch()
    logits_BSC, features_BH = model.expert_outputs(batch)
    head = [module for module in model.main_experts[0].modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.testing.assert_close(head(features_BH), logits_BSC[:, 0])
    assert torch.equal(model.gate_features(batch), features_BH)
    torch.testing.assert_close(model.gate_logits(features_BH, batch), model.gate(features_BH))
    assert head.kept_input is None
    for expert, logits_BC in zip(model.experts, logits_BSC.unbind(1), strict=True):
        torch.testing.assert_close(expert(**batch).logits, logits_BC)


@pytest.mark.parametrize("num_main_experts", [0, 1, 2, 3])
def test_all_of_all_renormalized_equals_dense(num_main_experts):
    model = build(gate="model", num_main_experts=num_main_experts, top_l_weighting="renormalize")
    batch = text_batch()
    with torch.no_grad():
        dense, sparse = model(**batch, dense=True), model(**batch, top_l=3)
        full = model(**batch, top_l=3, output_expert_logits=True)
    torch.testing.assert_close(sparse.logits, dense.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(full.logits, sparse.logits, rtol=0, atol=1e-6)
    assert full.expert_logits.shape == (6, num_main_experts + 3, 4)
    assert (dense.selected_experts, dense.expert_logits, sparse.expert_logits) == (None, None, None)
    assert torch.equal(full.selected_experts, sparse.selected_experts)


def test_dense_is_the_default_in_training_only():
    model = build()
    batch = text_batch()
    assert model(**batch).selected_experts.shape == (6, 1)
    assert model.train()(**batch).selected_experts is None
    assert model(**batch, dense=False).selected_experts.shape == (6, 1)


def test_each_expert_sees_only_its_examples():
    model = build()
    seen = []
    for k, expert in enumerate(model.experts):
        expert.register_forward_pre_hook(
            lambda _, args, kwargs, k=k: seen.append((k, len(kwargs["input_ids"]))), with_kwargs=True
        )
    with torch.no_grad():
        chosen = model(**text_batch()).selected_experts.flatten()
    expected = [(0, 6)] + [(1 + k, int((chosen == k).sum())) for k in range(3) if (chosen == k).any()]
    assert seen == expected


def test_only_named_inputs_reach_a_sub_model():
    model = build("bert", "model")  # the DistilBERT gate knows no token_type_ids, and nobody knows `domain`
    batch = text_batch() | {"token_type_ids": torch.ones(6, 8, dtype=torch.long), "domain": torch.zeros(6)}
    with torch.no_grad():
        out = model(**batch)
        assert not torch.equal(out.logits, model(**text_batch()).logits)
    assert out.logits.shape == (6, 4)


def test_gpt2_without_padding_token_equals_unpadded_singles():
    model = make_different(FedMoEForSequenceClassification.from_expert(tiny_gpt2()))
    pad_token_id = model.config.pad_token_id
    assert pad_token_id == tiny_gpt2().config.eos_token_id
    batch = text_batch(pad_token_id=pad_token_id)
    with torch.no_grad():
        out = model(**batch)
        for row, mask in enumerate(batch["attention_mask"]):
            one = model(input_ids=batch["input_ids"][row : row + 1, : mask.sum()])
            torch.testing.assert_close(one.logits[0], out.logits[row], rtol=0, atol=1e-5)
            torch.testing.assert_close(one.gate_probs[0], out.gate_probs[row], rtol=0, atol=1e-5)


def test_inputs_embeds():
    model = build()
    batch = text_batch()
    with torch.no_grad():
        expected = model(**batch).gate_probs
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embeds, **batch).gate_probs, expected)


def test_loss():
    model = build(entropy_weight=0.5, balance_weight=2.0)
    batch, labels = text_batch(), torch.tensor([0, 1, 2, 3, 0, 1])
    out = model(**batch, labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, plain)
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    out = model(**batch, labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits, labels)
    expected = plain + 0.5 * gating_entropy(out.gate_probs) + 2.0 * load_imbalance(out.gate_probs)
    torch.testing.assert_close(out.loss, expected)
    as_tuple = model(**batch, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], out.loss)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_dense_training_reaches_gate_alpha_and_all_experts(gate, mix):
    model = build(gate=gate, mix=mix).train()
    model(**text_batch(), labels=torch.tensor([0, 1, 2, 3, 0, 1])).loss.backward()
    assert model.alpha_logit.grad.abs().item() > 1e-6
    for module in [model.gate, *model.experts]:
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert max(parameter.grad.abs().max().item() for parameter in module.parameters()) > 1e-4


def test_half_precision(tmp_path):
    model = build("gpt2", initial_alpha=0.3)
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        half = FedMoEForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
        assert (half.dtype, half.alpha_logit.dtype) == (dtype, torch.float32)
        assert {p.dtype for e in [*half.experts, half.gate] for p in e.parameters()} == {dtype}
        assert half.alpha_logit.item() == model.alpha_logit.item()
        with torch.no_grad():
            out = half(**text_batch(), dense=True)
            assert out.logits.dtype == torch.float32
            torch.testing.assert_close(out.logits, model(**text_batch(), dense=True).logits, rtol=0, atol=0.1)
            assert half(**text_batch()).logits.dtype == torch.float32
        half.save_pretrained(tmp_path / str(dtype))
        again = FedMoEForSequenceClassification.from_pretrained(tmp_path / str(dtype))
        assert (again.dtype, again.alpha_logit.dtype) == (dtype, torch.float32)
        assert torch.equal(again(**text_batch(), dense=True).logits, out.logits)
    copied = FedMoEForSequenceClassification.from_expert(tiny_bert().bfloat16())
    assert (copied.dtype, copied.alpha_logit.dtype) == (torch.bfloat16, torch.float32)


def test_autocast():
    model = build()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**text_batch())
    assert out.logits.dtype == out.gate_probs.dtype == torch.float32
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(6), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        model = build(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        model(**text_batch(), labels=torch.tensor([0, 1, 2, 3, 0, 1])).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


def test_compile():
    """The `eager` backend traces, guards and breaks graphs as any other, without the minute that code takes."""
    model = build("gpt2", num_routed_experts=2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for seed, dense in enumerate([True, True, False, False]):
            batch = text_batch(seed=seed)
            expected = model(**batch, dense=dense).logits
            torch.testing.assert_close(compiled(**batch, dense=dense).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compile_to_machine_code():
    model = build("bert")
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        for dense in (True, False):
            expected = model(**text_batch(), dense=dense).logits
            torch.testing.assert_close(compiled(**text_batch(), dense=dense).logits, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("gate", GATES)
def test_save_and_load_are_bit_equal(tmp_path, family, gate):
    model = build(family, gate)
    model.save_pretrained(tmp_path)
    own_code = {f"configuration_{family}.py", f"modeling_{family}.py"} if family == "char_lstm" else set()
    own = own_code | CODE_OF_A_MIXTURE | {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == own
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, FedMoEForSequenceClassification)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for dense in (True, False):
        assert torch.equal(loaded(**text_batch(), dense=dense).logits, model(**text_batch(), dense=dense).logits)


def test_sharded_save_is_bit_equal(tmp_path):
    model = build("gpt2")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = FedMoEForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**text_batch()).logits, model(**text_batch()).logits)


@pytest.mark.parametrize("shard", ["50GB", "10KB"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_experts_that_are_views_of_one_bank_are_saved(tmp_path, family, shard):
    model = build(family)
    expected = model(**text_batch(), dense=True).logits
    rows = [torch.cat([p.detach().flatten() for p in expert.parameters()]) for expert in model.experts]
    bank_SP = torch.stack(rows)
    for row_P, expert in zip(bank_SP, model.experts, strict=True):
        start = 0
        for parameter in expert.parameters():
            parameter.data = row_P[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 1.3 * 4 * sum(p.numel() for p in model.parameters()) + 40_000
    loaded = FedMoEForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**text_batch(), dense=True).logits, expected)
    assert model.experts[1].get_input_embeddings().weight.untyped_storage().data_ptr() == bank_SP.data_ptr()


def test_device_map(tmp_path):
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    assert "GPT2Block" in model._no_split_modules
    expected = model(**text_batch()).logits
    places = {"main_experts": "cpu", "gate": "cpu", "alpha_logit": "cpu", "routed_experts.0": "cpu"}
    places |= {"routed_experts.1": "disk", "routed_experts.2": "disk"}
    for device_map in ("auto", {"": "cpu"}, places):
        loaded = FedMoEForSequenceClassification.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert torch.equal(loaded(**text_batch()).logits, expected)


def test_experts_with_tied_weights(tmp_path):
    sizes = {"d_model": 16, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 16, "num_labels": 4}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    expert = BartForSequenceClassification(BartConfig(**sizes, eos_token_id=EOS_TOKEN_ID, forced_eos_token_id=None))
    model = make_different(FedMoEForSequenceClassification.from_expert(expert))
    input_ids = text_batch(pad_token_id=None)["input_ids"]
    input_ids[:, -1] = EOS_TOKEN_ID
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = FedMoEForSequenceClassification.from_pretrained(tmp_path)
    assert len(loaded.all_tied_weights_keys) == 2 * 4
    assert torch.equal(loaded(input_ids).logits, expected)
    for built in (model, loaded):
        for expert in built.experts:
            assert expert.model.encoder.embed_tokens.weight is expert.model.shared.weight


def test_input_embeddings_are_resized_in_every_expert(tmp_path):
    model = build("bert", "model")
    model.resize_token_embeddings(VOCAB_SIZE + 5)
    assert model.config.expert_config.vocab_size == model.config.gate_config.vocab_size == VOCAB_SIZE + 5
    sizes = [module.get_input_embeddings().num_embeddings for module in [*model.experts, model.gate]]
    assert sizes == [VOCAB_SIZE + 5] * 5
    model.save_pretrained(tmp_path)
    loaded = FedMoEForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**text_batch()).logits, model(**text_batch()).logits)


def test_deep_copy_is_independent():
    model = build()
    copied = copy.deepcopy(model)
    expected = model(**text_batch()).logits
    make_different(model, seed=5)
    assert torch.equal(copied(**text_batch()).logits, expected)
    expert = model.main_experts[0]
    expert(**text_batch())  # leaves nothing behind that could not be copied
    assert torch.equal(copy.deepcopy(expert)(**text_batch()).logits, expert(**text_batch()).logits)


# ---------------------------------------------------------------- errors


def test_other_errors():
    with pytest.raises(TypeError, match="`main\\[0\\]` is a Linear: pass a checkpoint"):
        FedMoEForSequenceClassification.from_expert(torch.nn.Linear(2, 2))
    model = build()
    with pytest.raises(ValueError, match=r"`top_l` is 1\.0: pass 1 to 3"):
        model(**text_batch(), top_l=1.0)
    with pytest.raises(ValueError, match="`top_l` is 4: pass 1 to 3"):
        model(**text_batch(), top_l=4)
    with pytest.raises(ValueError, match="`input_ids` is missing"):
        model(attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="ResNetConfig, which AutoModelForSequenceClassification does not know"):
        FedMoEForSequenceClassification(FedMoEConfig(expert_config={"model_type": "resnet"}))


def test_missing_padding_token_names_the_remedy():
    model = FedMoEForSequenceClassification.from_expert(tiny_llama(pad_token_id=None, eos_token_id=None))
    one = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert model(**one).logits.shape == (1, 4)
    with pytest.raises(ValueError, match=r"set `model\.config\.pad_token_id`"):
        model(**text_batch(pad_token_id=None))
    model.config.pad_token_id = PAD_TOKEN_ID
    assert model(**text_batch()).logits.shape == (6, 4)


# ---------------------------------------------------------------- in transformers


def test_plain_trainer(tmp_path):
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": row % 4}
        for row, (ids, mask) in enumerate(zip(*text_batch(8).values(), strict=True))
    ]
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    model = build("gpt2")
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)
    assert not trainer.model_accepts_loss_kwargs
    assert trainer.train().training_loss < 10
    changed = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    assert {"alpha_logit", "gate.weight", "routed_experts.2.score.weight"} <= changed
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen == [(8, 4)]
