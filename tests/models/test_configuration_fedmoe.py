import copy
import json
import logging

import pytest
from transformers import AutoConfig, BertConfig, DistilBertConfig, GPT2Config, ResNetConfig

from hf_fedmoe.models import FedMoEConfig


def bert(**kwargs) -> BertConfig:
    return BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=40, **kwargs)


def test_defaults():
    config = FedMoEConfig()
    assert (config.num_main_experts, config.num_routed_experts, config.top_l) == (1, 3, 1)
    assert (config.gate, config.gate_config, config.mix, config.top_l_weighting) == (
        "main_features",
        None,
        "probabilities",
        "softmax",
    )
    assert config.expert_config.model_type == "bert"
    assert config.num_labels == 2


def test_sub_configurations_are_copied_and_follow():
    expert = bert(num_labels=7)
    config = FedMoEConfig(expert_config=expert, gate="model", gate_config=expert, num_routed_experts=5, num_labels=4)
    assert expert.num_labels == 7
    assert config.expert_config.num_labels == config.num_labels == 4
    assert config.gate_config.num_labels == 5
    config.num_routed_experts, config.num_labels, config.pad_token_id = 2, 6, 9
    assert config.gate_config.num_labels == 2
    assert config.expert_config.num_labels == 6
    assert config.expert_config.pad_token_id == config.gate_config.pad_token_id == 9


def test_labels_come_from_the_expert_or_from_either_map():
    names = {0: "bad", 1: "fair", 2: "good"}
    from_expert = FedMoEConfig(expert_config=bert(id2label=names, label2id={v: k for k, v in names.items()}))
    from_id = FedMoEConfig(expert_config=bert(), id2label=names)
    from_label = FedMoEConfig(expert_config=bert(), label2id={v: k for k, v in names.items()})
    for config in (from_expert, from_id, from_label):
        assert config.id2label == config.expert_config.id2label == names
        assert config.label2id == config.expert_config.label2id == {"bad": 0, "fair": 1, "good": 2}


@pytest.mark.parametrize("num_labels", [2, 3])
def test_round_trip(tmp_path, num_labels):
    config = FedMoEConfig(
        expert_config=GPT2Config(n_embd=24, n_layer=3, vocab_size=40, eos_token_id=39),
        gate="model",
        gate_config=DistilBertConfig(dim=32, vocab_size=40),
        num_routed_experts=4,
        top_l=2,
        mix="logits",
        initial_alpha=0.25,
        num_labels=num_labels,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, FedMoEConfig)
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert (loaded.expert_config.n_embd, loaded.gate_config.dim, loaded.gate_config.num_labels) == (24, 32, 4)
    assert loaded.expert_config.num_labels == num_labels
    overridden = FedMoEConfig.from_pretrained(tmp_path, num_labels=5, top_l=3)
    assert (overridden.expert_config.num_labels, overridden.top_l) == (5, 3)
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_dict_sub_configurations():
    config = FedMoEConfig(expert_config={"model_type": "gpt2", "n_embd": 24}, num_labels=3)
    assert isinstance(config.expert_config, GPT2Config)
    assert (config.expert_config.n_embd, config.expert_config.num_labels) == (24, 3)


def test_padding_token():
    assert FedMoEConfig(expert_config=bert(pad_token_id=5)).pad_token_id == 5
    assert FedMoEConfig(expert_config=bert(pad_token_id=5), pad_token_id=3).expert_config.pad_token_id == 3
    both = FedMoEConfig(expert_config=bert(pad_token_id=5), gate="model", gate_config=bert(pad_token_id=2))
    assert both.gate_config.pad_token_id == both.expert_config.pad_token_id == 5
    from_gate = FedMoEConfig(
        expert_config=GPT2Config(vocab_size=40, eos_token_id=None), gate="model", gate_config=bert(pad_token_id=2)
    )
    assert from_gate.pad_token_id == from_gate.expert_config.pad_token_id == 2
    # GPT-2's own end-of-sequence token does not exist in a vocabulary of 40.
    assert FedMoEConfig(expert_config=GPT2Config(vocab_size=40)).pad_token_id is None
    assert FedMoEConfig(expert_config=ResNetConfig()).pad_token_id is None


def test_end_of_sequence_pads_a_decoder_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        config = FedMoEConfig(expert_config=GPT2Config(vocab_size=41, eos_token_id=37))
    assert config.pad_token_id == config.expert_config.pad_token_id == 37
    assert "end-of-sequence token (37)" in caplog.text
    assert FedMoEConfig(expert_config=GPT2Config(vocab_size=41, eos_token_id=[36, 37])).pad_token_id == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_routed_experts": 0}, "`num_routed_experts` is 0: pass an integer of at least 1"),
        ({"num_routed_experts": 2.0}, "`num_routed_experts` is 2.0"),
        ({"num_main_experts": -1}, "`num_main_experts` is -1"),
        ({"num_main_experts": 4}, "`num_main_experts` is 4: pass 0, 1, 2 or 3"),
        ({"top_l": 0}, "`top_l` is 0"),
        ({"top_l": 4}, "`top_l` is 4, but there are only 3 routed experts"),
        ({"gate": "linear"}, "`gate` is 'linear': pass one of 'main_features', 'model'"),
        ({"top_l_weighting": "sum"}, "`top_l_weighting` is 'sum'"),
        ({"mix": "votes"}, "`mix` is 'votes'"),
        ({"initial_alpha": 0.0}, "`initial_alpha` is 0.0"),
        ({"initial_alpha": 1}, "`initial_alpha` is 1"),
        ({"entropy_weight": -1.0}, "`entropy_weight` is -1.0"),
        ({"balance_weight": float("nan")}, "`balance_weight` is nan"),
        ({"num_labels": 1}, "`num_labels` is 1"),
        ({"problem_type": "regression"}, "`problem_type` is 'regression'"),
        ({"num_main_experts": 0}, "`num_main_experts` is 0: pass `gate='model'`"),
        ({"gate_config": BertConfig()}, "`gate_config` is a bert configuration"),
        ({"gate": "model"}, "`gate_config` is None"),
        ({"gate": "model", "gate_config": BertConfig(vocab_size=7)}, "`gate_config.vocab_size` is 7"),
        # What a mistaken or hostile `config.json` may say.
        ({"num_routed_experts": 10**9}, "`num_routed_experts` is 1000000000: pass an integer of at most 1024"),
        ({"num_routed_experts": "3"}, "`num_routed_experts` is '3'"),
        ({"num_routed_experts": True}, "`num_routed_experts` is True"),
        ({"num_main_experts": 10**9}, "`num_main_experts` is 1000000000"),
        ({"top_l": None}, "`top_l` is None"),
        ({"gate": ["model"]}, "`gate` is ['model']: pass one of"),
        ({"initial_alpha": "0.5"}, "`initial_alpha` is '0.5': pass a number"),
        ({"initial_alpha": float("nan")}, "`initial_alpha` is nan"),
        ({"entropy_weight": None}, "`entropy_weight` is None: pass a number"),
        ({"balance_weight": [1]}, "`balance_weight` is [1]: pass a number"),
        ({"num_labels": 10**9}, "`num_labels` is 1000000000: pass an integer of at most 1000000"),
        ({"id2label": ["a", "b"]}, "`id2label` is ['a', 'b']: pass a `dict`"),
        ({"id2label": {0: "a", 5: "b"}}, "`id2label` names the classes [0, 5]: pass names for 0 to 1, all of them"),
        ({"id2label": {"x": "a", "y": "b"}}, "classes are numbers, invalid literal for int() with base 10: 'x'"),
        (
            {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}},
            "`label2id` says that 'a' is class 1, but `id2label` calls that 'b'",
        ),
        ({"pad_token_id": 10**6}, "`pad_token_id` is 1000000, but the experts' tokens are 0 to 30521"),
        ({"pad_token_id": -5}, "`pad_token_id` is -5"),
        ({"peft_config": "lora"}, "`peft_config` is 'lora': pass a `LoraConfig`"),
        (
            {"peft_config": {"peft_type": "LORA", "r": 10**9}},
            "`peft_config.r` is 1000000000: pass a rank of at least 1",
        ),
        ({"peft_config": {"peft_type": "LORA", "target_modules": 3}}, "`peft_config.target_modules` is 3"),
        ({"expert_config": "bert"}, "`expert_config` is 'bert': pass the configuration of a classifier"),
        ({"expert_config": {"hidden_size": 16}}, "`expert_config` has no `model_type`"),
        (
            {"expert_config": {"model_type": "bert", "num_hidden_layers": 10**9}},
            "`expert_config.num_hidden_layers` is",
        ),
        ({"expert_config": {"model_type": "bert", "num_labels": 10**9}}, "`expert_config.num_labels` is 1000000000"),
        ({"expert_config": {"model_type": "bert", "hidden_size": -3}}, "`expert_config.hidden_size` is -3"),
        ({"expert_config": FedMoEConfig()}, "`expert_config` is that of a 'fedmoe', which consists of classifiers"),
        ({"gate": "model", "gate_config": {"model_type": "classifier_ensemble"}}, "`gate_config` is that of a 'class"),
    ],
)
def test_errors_name_field_value_and_remedy(arguments, message):
    with pytest.raises(ValueError) as error:
        FedMoEConfig(**arguments)
    assert message in str(error.value)


def test_invalid_values_set_later_are_not_saved(tmp_path):
    config = FedMoEConfig()
    config.top_l = 9
    with pytest.raises(ValueError, match="`top_l` is 9"):
        config.save_pretrained(tmp_path)


def test_mixtures_of_mixtures_are_refused_however_deep(tmp_path):
    """Before anything is built: at 200 the interpreter would run out of stack."""
    nested = {"model_type": "bert"}
    for _ in range(200):
        nested = {"model_type": "fedmoe", "expert_config": nested}
    for model_type, field in (
        ("fedmoe", "expert_config"),
        ("classifier_ensemble", "expert_config"),
        ("multi_head_classifier", "expert_config"),
        ("paired_experts", "shared_config"),
        ("adapted_classifier", "base_config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, field: nested}))
        with pytest.raises(ValueError, match=f"`{field}` is that of a 'fedmoe', which consists of classifiers itself"):
            AutoConfig.from_pretrained(tmp_path)


def test_names_without_their_other_map_are_completed():
    names = {0: "bad", 1: "good"}
    expert = bert(id2label=names, label2id={"LABEL_0": 0, "LABEL_1": 1})
    for config in (FedMoEConfig(expert_config=expert), FedMoEConfig(id2label=names, label2id=expert.label2id)):
        assert config.id2label == names and config.label2id == {"bad": 0, "good": 1}
