"""Mixtures built from one expert, from several, and from a configuration."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2LMHeadModel

from hf_fedmoe.models import FedMoEConfig, FedMoEForSequenceClassification
from tests.tiny_models import make_different, text_batch, tiny_bert, tiny_distilbert, tiny_gpt2


@pytest.mark.parametrize("gate", ["main_features", "model"])
def test_from_expert_copies_bit_equal(gate):
    expert = make_different(tiny_bert())
    gate_model = tiny_distilbert(5)
    model = FedMoEForSequenceClassification.from_expert(
        expert,
        gate_model if gate == "model" else gate,
        num_routed_experts=5,
        num_main_experts=2,
        initial_alpha=0.2,
        id2label=dict(enumerate("abcd")),
    )
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.label2id == model.experts[0].config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert model.alpha.item() == pytest.approx(0.2)
    assert len(model.experts) == 7
    for copied in model.experts:
        for name, value in expert.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value)
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))
    if gate == "model":
        assert all(torch.equal(model.gate.state_dict()[n], v) for n, v in gate_model.state_dict().items())
    else:
        assert isinstance(model.gate, torch.nn.Linear)
        assert model.gate.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert not model.gate.bias.any()


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_prototypes_are_scores_of_classes_of_experts(tmp_path, make):
    """The gate is a copy of the expert but for its head; an expert's score is the logsumexp of its prototypes'."""
    expert = make_different(make(num_labels=3))
    model = FedMoEForSequenceClassification.from_expert(expert, gate="prototypes", num_routed_experts=2)
    assert (model.config.gate, model.config.gate_prototypes, model.config.gate_config.num_labels) == ("model", 3, 6)
    copied, head = dict(model.gate.named_parameters()), {"classifier.weight", "classifier.bias", "score.weight"}
    for name, value in expert.named_parameters():
        assert name in head or torch.equal(copied[name], value)
    assert not model.gate_bias_N.any() and any(model.gate_bias_N is each for each in model.gate_parameters())
    model.gate_bias_N.data.copy_(torch.arange(6.0) / 3)
    with torch.no_grad():
        scores_BN = model.gate(**text_batch()).logits + model.gate_bias_N
        found = model(**text_batch(), dense=True)
    torch.testing.assert_close(found.gate_probs, scores_BN.view(-1, 2, 3).logsumexp(-1).softmax(-1))
    model.save_pretrained(tmp_path)
    loaded = FedMoEForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**text_batch(), dense=True).logits, found.logits)
    assert torch.equal(loaded.gate_bias_N, model.gate_bias_N)


def test_prototypes_of_features(tmp_path):
    model = FedMoEForSequenceClassification.from_expert(tiny_bert(), gate_prototypes=4)
    assert model.gate.out_features == 12 and model.gate_bias_N.shape == (12,)
    assert model(**text_batch()).gate_probs.shape == (6, 3)
    with pytest.raises(ValueError, match="`gate_prototypes` is 0"):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), gate_prototypes=0)
    with pytest.raises(ValueError, match=r"3 routed experts with 2 prototypes each: load .*=6"):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), tiny_distilbert(3), gate_prototypes=2)


def test_from_expert_by_name(tmp_path):
    tiny_bert(num_labels=3).save_pretrained(tmp_path / "expert")
    tiny_distilbert(num_labels=2).save_pretrained(tmp_path / "gate")
    model = FedMoEForSequenceClassification.from_expert(
        str(tmp_path / "expert"), str(tmp_path / "gate"), num_routed_experts=2, num_labels=3
    )
    assert (model.config.num_labels, model.config.gate_config.num_labels) == (3, 2)
    assert model(**text_batch()).logits.shape == (6, 3)
    tiny_bert().bert.save_pretrained(tmp_path / "headless")
    model = FedMoEForSequenceClassification.from_expert(tmp_path / "headless", label2id={"x": 0, "y": 1, "z": 2})
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert model(**text_batch()).logits.shape == (6, 3)


def test_a_mixture_is_loaded_and_saved_with_all_that_transformers_takes(tmp_path):
    model = make_different(FedMoEForSequenceClassification.from_expert(tiny_bert()))
    model.save_pretrained(tmp_path / "mixture", True)  # `is_main_process`
    changed = FedMoEConfig.from_pretrained(tmp_path / "mixture", top_l=2)
    changed.save_pretrained(tmp_path / "configuration")
    loaded = FedMoEForSequenceClassification.from_pretrained(
        tmp_path / "mixture", config=tmp_path / "configuration", mix="logits"
    )
    assert (loaded.config.top_l, loaded.config.mix) == (2, "logits")
    bare = FedMoEForSequenceClassification.from_pretrained(None, config=changed, state_dict=model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(bare.state_dict()[name], value)
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is None: pass a folder"):
        FedMoEForSequenceClassification.from_pretrained(None)


def test_random_weights_are_equal_in_all_experts():
    model = FedMoEForSequenceClassification(FedMoEConfig(expert_config=tiny_bert().config, initial_alpha=0.9))
    assert model.alpha.item() == pytest.approx(0.9)
    first = model.experts[0].state_dict()
    for expert in model.experts[1:]:
        assert all(torch.equal(first[name], value) for name, value in expert.state_dict().items())


def test_from_experts_keeps_each_expert():
    experts = [make_different(tiny_gpt2(), seed=seed) for seed in range(3)]
    experts[1].config.problem_type = "single_label_classification"  # what a first training step writes
    model = FedMoEForSequenceClassification.from_experts(experts[:1], experts[1:])
    for copied, expert in zip(model.experts, experts, strict=True):
        for name, value in expert.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value)
    assert model.config.num_routed_experts == 2


@pytest.mark.parametrize(
    ("main", "routed", "message"),
    [
        (tiny_bert, lambda: tiny_bert(hidden_size=32), r"differ in `hidden_size`: 16 in `main\[0\]`, 32 in `routed"),
        (tiny_bert, tiny_distilbert, r"`main\[0\]` is a BertForSequ.* `routed\[0\]` is a DistilBertForSequence"),
        (tiny_bert, lambda: tiny_bert(num_labels=3), "differ in `id2label`"),
        (tiny_bert, lambda: tiny_bert().bfloat16(), r"`routed\[0\]` has .*bfloat16.* as `bert.embeddings"),
        (tiny_bert, lambda: tiny_bert().bert, r"`routed\[0\]` is a BertModel, which is not what AutoModel"),
    ],
)
def test_from_experts_refuses_unequal_experts(main, routed, message):
    with pytest.raises(ValueError, match=message):
        FedMoEForSequenceClassification.from_experts([main()], [routed()])


def test_from_experts_refuses_a_changed_module():
    changed = tiny_bert()
    changed.bert.pooler.dense = torch.nn.Linear(16, 16, bias=False)
    with pytest.raises(ValueError, match=r"`routed\[0\]` has nothing as `bert.pooler.dense.bias`"):
        FedMoEForSequenceClassification.from_experts([tiny_bert()], [changed])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 3}, "`num_labels` is 3, but the expert's head has 4 outputs"),
        ({"num_labels": 4, "id2label": {0: "a", 1: "b"}}, "disagree on the number of classes"),
        ({"gate": tiny_distilbert(2)}, "`gate` has 2 labels, but there are 3 routed experts"),
        ({"gate": tiny_distilbert(3, vocab_size=50)}, "`gate_config.vocab_size` is 50"),
        ({"num_routed_experts": 0}, "`num_routed_experts` is 0: pass an integer of"),
        ({"num_main_experts": 0}, "`num_main_experts` is 0"),
        ({"expert": GPT2LMHeadModel(tiny_gpt2().config)}, "GPT2LMHeadModel, which is not what AutoModelForSequence"),
    ],
)
def test_from_expert_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        FedMoEForSequenceClassification.from_expert(**{"expert": tiny_bert()} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topl": 2}, "`topl` is no argument of a mixture: did you mean `top_l`"),
        ({"num_main_expert": 2}, "did you mean `num_main_experts`"),
        ({"zzz": 2}, "`zzz` is no argument of a mixture: leave it out"),
    ],
)
def test_unknown_arguments_are_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), **arguments)
    with pytest.raises(ValueError, match=message):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), peft_config=LoraConfig(), **arguments)
    with pytest.raises(ValueError, match=message):
        FedMoEForSequenceClassification.from_experts([tiny_bert()], [tiny_bert()], **arguments)
    mixture = FedMoEForSequenceClassification.from_expert(tiny_bert(), peft_config=LoraConfig(r=2))
    mixture.save_adapters(tmp_path)
    folders = [tmp_path / name for name in ("main_0", "routed_0")]
    with pytest.raises(ValueError, match=message):
        FedMoEForSequenceClassification.from_adapters(folders[:1], folders[1:], base=tiny_bert(), **arguments)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)])
@pytest.mark.parametrize("count", [2, 4, 1000])
def test_a_count_that_the_weights_do_not_have_is_refused_before_anything_is_built(tmp_path, count, peft_config):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = tmp_path / "base" if peft_config else tiny_bert()
    model = FedMoEForSequenceClassification.from_expert(base, num_routed_experts=3, peft_config=peft_config)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    model.save_pretrained(tmp_path / "whole")
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        config = json.loads((folder / "config.json").read_text()) | {"num_routed_experts": count}
        (folder / "config.json").write_text(json.dumps(config))
        message = f"`num_routed_experts` is {count}, but the weights in .* are those of 3 routed experts"
        with pytest.raises(ValueError, match=message):
            FedMoEForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)])
def test_from_expert_by_name_with_another_number_of_classes(tmp_path, peft_config):
    tiny_bert(num_labels=2).save_pretrained(tmp_path)
    names = {0: "bad", 1: "fair", 2: "good"}
    model = FedMoEForSequenceClassification.from_expert(tmp_path, id2label=names, peft_config=peft_config)
    assert model.config.id2label == names and model(**text_batch()).logits.shape == (6, 3)


@pytest.mark.parametrize(("count", "message"), [(-1, "is -1: pass an integer of at le"), (1.5, r"is 1\.5: pass an")])
def test_a_number_of_experts_that_is_none(count, message):
    with pytest.raises(ValueError, match=f"`num_routed_experts` {message}"):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), num_routed_experts=count)


def test_a_mistyped_gate_is_not_looked_for_on_the_hub():
    with pytest.raises(ValueError, match="`gate` is 'prototypess': is it 'prototypes'"):
        FedMoEForSequenceClassification.from_expert(tiny_bert(), gate="prototypess", num_routed_experts=2)
