"""Values that no `config.json` may have, of any model; for mixtures see test_configuration_fedmoe.py."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import BertConfig

from hf_fedmoe.models import (
    AdaptedConfig,
    CharLSTMConfig,
    EnsembleConfig,
    LinearConfig,
    MultiHeadConfig,
    PairedExpertsConfig,
    SmallCNNConfig,
    SmallImageResNetConfig,
)


MANY = 10**9
COUNTS = [
    (EnsembleConfig, "num_models", "num_models", 1024),
    (MultiHeadConfig, "num_heads", "num_heads", 1024),
    (CharLSTMConfig, "vocab_size", "vocab_size", 2**24),
    (CharLSTMConfig, "embedding_size", "embedding_size", 2**24),
    (CharLSTMConfig, "hidden_size", "hidden_size", 2**24),
    (CharLSTMConfig, "num_hidden_layers", "num_hidden_layers", 1024),
    (LinearConfig, "num_features", "num_features", 2**24),
    (PairedExpertsConfig, "gate_hidden_size", "gate_hidden_size", 2**24),
    (SmallCNNConfig, "image_size", "image_size", 2**24),
    (SmallCNNConfig, "kernel_size", "kernel_size", 2**24),
    (SmallImageResNetConfig, "embedding_size", "embedding_size", 2**24),
]


@pytest.mark.parametrize(("kind", "argument", "field", "highest"), COUNTS)
def test_counts(kind, argument, field, highest):
    for value in (MANY, highest + 1):
        with pytest.raises(
            ValueError, match=f"`{field}` is {value}: pass an integer (of at most|from 1 to) {highest}"
        ):
            kind(**{argument: value})
    for value in (0, -1, True, 2.5, "3", None, [1], float("nan")):
        # Types of fields that come with transformers' own configurations are checked there.
        with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=f"`?'?{field}`?'? "):
            kind(**{argument: value})


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (SmallCNNConfig, {"channels": 5}, "`channels` is 5: pass positive integers, one for each layer"),
        (SmallCNNConfig, {"channels": []}, r"`channels` is \(\): pass positive integers"),
        (SmallCNNConfig, {"channels": [3, MANY]}, r"`channels` is \(3, 1000000000\): .* of at most 16777216"),
        (SmallCNNConfig, {"hidden_size": None}, "`hidden_size` is None: pass positive integers"),
        (SmallCNNConfig, {"hidden_size": "2048"}, "`hidden_size` is '2048': pass positive integers"),
        (SmallCNNConfig, {"padding": MANY}, "`padding` is 1000000000: pass an integer of at most"),
        (
            SmallImageResNetConfig,
            {"depths": [2, MANY]},
            r"`depths` is \[2, 1000000000\]: pass integers from 1 to 1024",
        ),
        (SmallImageResNetConfig, {"depths": [2, 0]}, r"`depths` is \[2, 0\]"),
        (SmallImageResNetConfig, {"hidden_sizes": []}, r"`hidden_sizes` is \[\]"),
        (SmallImageResNetConfig, {"hidden_sizes": [4, -1]}, r"`hidden_sizes` is \[4, -1\]"),
        (SmallImageResNetConfig, {"depths": [1]}, r"`depths` is \[1\] and `hidden_sizes` \(64, 128, 256, 512\)"),
        (SmallImageResNetConfig, {"layer_type": "wide"}, "`layer_type` is 'wide': pass one of 'basic', 'bottleneck'"),
        (SmallImageResNetConfig, {"hidden_act": "nope"}, "`hidden_act` is 'nope': pass one of"),
        (CharLSTMConfig, {"pad_token_id": "3"}, "`pad_token_id` is '3'"),
        (EnsembleConfig, {"expert_config": 3}, "`expert_config` is 3: pass the configuration of a classifier"),
        (EnsembleConfig, {"expert_config": EnsembleConfig()}, "`expert_config` is that of a 'classifier_ensemble'"),
        (PairedExpertsConfig, {"own_config": "bert"}, "`own_config` is 'bert': pass the configuration"),
        (AdaptedConfig, {"base_config": EnsembleConfig()}, "`base_config` is that of a 'classifier_ensemble'"),
        (AdaptedConfig, {"num_labels": MANY}, "`num_labels` is 1000000000: pass an integer of at most 1000000"),
        (AdaptedConfig, {"base_config": BertConfig(), "id2label": {1: "a"}}, r"names the classes \[1\]"),
    ],
)
def test_the_rest(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
