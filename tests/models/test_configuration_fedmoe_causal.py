"""The configuration of a mixture of owners: what it keeps, and what it refuses."""

import json

import pytest
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, Gemma3Config, GPT2Config, LlamaConfig

from hf_fedmoe.models import FedMoECausalConfig, FedMoEForCausalLM
from tests.tiny_decoders import DECODERS, tiny_decoder
from tests.tiny_models import EOS_TOKEN_ID, PAD_TOKEN_ID, tiny_bert


def test_round_trip(tmp_path):
    base = LlamaConfig(vocab_size=50, num_hidden_layers=3, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    owners = ["press", {"name": "court", "licence": "CC0", "tokens": 100, "members": ["a", "b"]}]
    fields = {"router_names": ["court"], "lora_rank": 8, "lora_alpha": 4.5, "target_modules": ["up_proj"], "top_l": 2}
    config = FedMoECausalConfig(base_config=base, owners=owners, ridge=0.1, router_temperature=2, **fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FedMoECausalConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.owners == [{"name": "press"}, owners[1]] and loaded.expert_names == ["base", "press", "court"]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (3, [4, 5], 6)
    assert loaded.get_text_config(decoder=True).num_hidden_layers == 3
    assert {name: vars(loaded)[name] for name in fields} == fields and loaded.ridge == 0.1
    # Copies, and nothing that generation would take for its own.
    base.vocab_size = 7
    assert config.base_config.vocab_size == 50 and "temperature" not in config.to_dict()


def test_defaults():
    config = FedMoECausalConfig()
    assert config.base_config.model_type == "gpt2" and config.owners == [] and config.top_l is None
    assert (config.lora_rank, config.lora_alpha, config.ridge, config.router_temperature) == (32, 64, 0.01, 0.1)
    assert FedMoECausalConfig(base_config=GPT2Config(eos_token_id=9)).eos_token_id == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_config": 3}, "`base_config` is 3: pass the configuration of a causal language model"),
        ({"base_config": BertConfig().to_dict() | {"model_type": "vit"}}, "`base_config.model_type` is 'vit', which"),
        ({"base_config": {"model_type": "fedmoe_causal"}}, "`base_config.model_type` is 'fedmoe_causal', which"),
        ({"base_config": {"vocab_size": 3}}, "`base_config.model_type` is None, which .* for example a `GPT2Config`"),
        (
            {"base_config": {"model_type": "llama", "num_hidden_layers": 5000}},
            "`base_config.num_hidden_layers` is 5000: pass at most 1024 layers",
        ),
        ({"base_config": Gemma3Config()}, "`base_config` is a Gemma3Config, whose model reads more than text"),
        ({"public_bias": float("inf")}, "`public_bias` is inf"),
        ({"owners": "court"}, "`owners` is 'court': pass a list of names"),
        ({"owners": [{"licence": "CC0"}]}, r"`owners\[0\]` is {'licence': 'CC0'}: pass a name, or a `dict` with"),
        ({"owners": ["court", 3]}, r"`owners\[1\]` is 3: pass a name"),
        ({"owners": ["court", "court"]}, r"`owners\[1\]` is named 'court', which is taken"),
        ({"owners": ["base"]}, r"`owners\[0\]` is named 'base', which is what the base is called"),
        ({"owners": [f"o{k}" for k in range(1025)]}, "`owners` has 1025 entries: pass at most 1024"),
        ({"router_names": ["court"]}, r"`router_names` has \['court'\]: pass names of `owners`, or 'base'"),
        ({"router_names": "base"}, "`router_names` is 'base': pass a list of names"),
        ({"lora_rank": 0}, "`lora_rank` is 0: pass an integer of at least 1"),
        ({"lora_rank": 2**20}, "`lora_rank` is 1048576: pass an integer of at most 65536"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0: pass a finite number above 0"),
        ({"ridge": -1.0}, "`ridge` is -1.0: pass a finite number above 0"),
        ({"router_temperature": float("nan")}, "`router_temperature` is nan: pass a finite number above 0"),
        ({"router": "likelihood"}, "`router` is 'likelihood': pass one of 'ridge'"),
        ({"top_l": 0}, "`top_l` is 0: pass an integer of at least 1"),
        ({"target_modules": []}, r"`target_modules` is \[\]: name linear layers"),
        ({"target_modules": "up_proj"}, "`target_modules` is 'up_proj': pass a list of names"),
    ],
)
def test_bad_values_are_refused_with_a_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        FedMoECausalConfig(**fields)


def test_a_file_that_asks_for_too_much_is_refused(tmp_path):
    nested = {"model_type": "fedmoe_causal", "base_config": {"model_type": "fedmoe_causal"}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    with pytest.raises(ValueError, match=r"`base_config.model_type` is 'fedmoe_causal', which"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", DECODERS)
def test_feed_forward_layers_are_found(family):
    model = FedMoEForCausalLM.from_base(tiny_decoder(family))
    ends = ["c_fc", "c_proj"] if family == "gpt2" else ["gate_proj", "up_proj", "down_proj"]
    assert [name.split(".")[-2:] for name in model.target_names] == [["mlp", end] for end in ends] * 2
    named = "attn.c_attn" if family == "gpt2" else "q_proj"
    model = FedMoEForCausalLM.from_base(tiny_decoder(family), target_modules=[named], lora_rank=2)
    assert len(model.target_names) == 2 and all(name.endswith(f".{named}") for name in model.target_names)


def test_bases_that_cannot_be_one():
    with pytest.raises(
        ValueError, match=r"`target_modules` is \['lm_head'\], .* no linear layers \['lm_head'\] below"
    ):
        FedMoEForCausalLM.from_base(tiny_decoder(), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="`base` is a BertForSequenceClassification: pass the name of a causal"):
        FedMoEForCausalLM.from_base(tiny_bert())
    assert BertForSequenceClassification is type(tiny_bert())
    with pytest.raises(ValueError, match="`lora_rnk` is no argument of a mixture of owners: pass some of"):
        FedMoEForCausalLM.from_base(tiny_decoder(), lora_rnk=3)
    with pytest.raises(ValueError, match="`revision` would say how to load a base that is given by name"):
        FedMoEForCausalLM.from_base(tiny_decoder(), revision="main")
    base = tiny_decoder()
    model = FedMoEForCausalLM.from_base(base)
    with pytest.raises(ValueError, match="`base` is in a mixture already: call its `add_owner`"):
        FedMoEForCausalLM.from_base(base)
    assert (model.generation_config.eos_token_id, model.config.pad_token_id) == (EOS_TOKEN_ID, PAD_TOKEN_ID)
