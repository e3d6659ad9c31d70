import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from hf_fedmoe.models import FedMoEForSequenceClassification
from tests.tiny_models import (
    PAD_TOKEN_ID,
    make_different,
    text_batch,
    tiny_bert,
    tiny_char_lstm,
    tiny_distilbert,
    tiny_gpt2,
)
from tests.without_package import logits_without_package


def test_loads_where_the_package_is_not_installed(tmp_path):
    models = {
        "gpt2": FedMoEForSequenceClassification.from_expert(tiny_gpt2(), pad_token_id=PAD_TOKEN_ID),
        "bert": FedMoEForSequenceClassification.from_expert(tiny_bert(), tiny_distilbert(3)),
        "lstm": tiny_char_lstm(),
        "mixture-of-lstms": FedMoEForSequenceClassification.from_expert(tiny_char_lstm()),
        "gate-is-lstm": FedMoEForSequenceClassification.from_expert(tiny_char_lstm(), tiny_char_lstm(3)),
    }
    for name, model in models.items():
        make_different(model).save_pretrained(tmp_path / name)
    input_ids = text_batch(4)["input_ids"]
    found = logits_without_package([tmp_path / name for name in models], input_ids, tmp_path / "cache")
    for (name, model), logits in zip(models.items(), found, strict=True):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "again")
        assert type(again) is type(model)
        # With gradients torch takes another kernel for LSTMs.
        with torch.no_grad():
            expected = model(input_ids).logits
            assert torch.equal(logits, expected), name
            assert torch.equal(again(input_ids).logits, expected), name
        sources = [{file.name for file in path.glob("*.py")} for path in (tmp_path / name, tmp_path / name / "again")]
        assert sources[0] == sources[1]
        assert ("modeling_char_lstm.py" in sources[1]) == ("lstm" in name)
        assert ("modeling_fedmoe.py" in sources[1]) == (name != "lstm")


def test_pipeline():
    words = ["[UNK]", "[PAD]", "a", "good", "bad", "film", "quite"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    model = FedMoEForSequenceClassification.from_expert(tiny_gpt2(), pad_token_id=tokenizer.pad_token_id)
    make_different(model)
    model.config.id2label = {0: "awful", 1: "poor", 2: "fair", 3: "great"}
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["a good film", "quite bad"]
    results = classify(texts, batch_size=2, top_k=None)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    probs_BC = model(inputs["input_ids"], inputs["attention_mask"]).logits.exp()
    for result, probs_C in zip(results, probs_BC, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        assert scores == pytest.approx(
            dict(zip(model.config.id2label.values(), probs_C.tolist(), strict=True)), abs=1e-6
        )
