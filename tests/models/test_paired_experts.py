import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_fedmoe.models import (
    PairedExpertsConfig,
    PairedExpertsForImageClassification,
    PairedExpertsForSequenceClassification,
    classification_head,
)
from hf_fedmoe.models.modeling_paired_experts import LenientBatchNorm, SwitchNorm
from tests.tiny_images import (
    image_batch,
    make_statistics_different,
    tiny_cnn,
    tiny_mobilenet,
    tiny_resnet,
    tiny_stock_resnet,
    tiny_vit,
)
from tests.tiny_models import (
    make_different,
    text_batch,
    tiny_bert,
    tiny_char_lstm,
    tiny_distilbert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
)
from tests.without_package import logits_without_package


PAIRS = {
    "bert_gpt2": (tiny_bert, tiny_gpt2, {}),
    "gpt2_roberta": (lambda: tiny_gpt2(pad_token_id=1), tiny_roberta, {}),
    "distilbert_char_lstm": (tiny_distilbert, lambda: tiny_char_lstm(hidden_size=10), {}),
    "char_lstm_llama": (tiny_char_lstm, tiny_llama, {}),
    "cnn_resnet": (tiny_cnn, tiny_resnet, {}),
    "cnn_cnn": (tiny_cnn, tiny_cnn, {}),
    "vit_mobilenet": (tiny_vit, tiny_mobilenet, {}),
    "resnet_cnn": (tiny_stock_resnet, tiny_cnn, {"gate_input_size": 192}),
}


def pair_of(name):
    """A pair with weights and statistics unlike those of a start, and inputs."""
    torch.manual_seed(0)
    make_shared, make_own, settings = PAIRS[name]
    shared, own = make_shared(), make_own()
    images = shared.main_input_name == "pixel_values"
    kind = PairedExpertsForImageClassification if images else PairedExpertsForSequenceClassification
    config = PairedExpertsConfig(
        shared_config=shared.config, own_config=own.config, gate_hidden_size=7, **{"gate_input_size": None} | settings
    )
    model = make_statistics_different(make_different(kind(config).eval(), scale=0.5))
    return model, (image_batch(6) if images else text_batch())


def features(extractor, head, make, batch):
    """Returns what the last layer of the whole classifier of such an extractor reads."""
    classifier = make()
    classifier.config.pad_token_id = 1
    classifier.load_state_dict(extractor.state_dict(), strict=False)
    read = []
    last = classifier.get_submodule(classification_head(classifier))
    last.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    if head is not None:
        last.load_state_dict(head.state_dict())
    logits_BC = classifier(**batch).logits
    features_BH = read[0]
    if features_BH.dim() == 3:
        last_B = (torch.arange(features_BH.shape[1]) * batch["attention_mask"]).argmax(-1)
        features_BH = features_BH[torch.arange(len(last_B)), last_B]
    torch.testing.assert_close(last(features_BH), logits_BC, atol=1e-4, rtol=1e-4)
    return features_BH


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_forward_by_hand(name):
    model, batch = pair_of(name)
    make_shared, make_own, _ = PAIRS[name]
    shared_BH = features(model.shared, None, make_shared, batch)
    own_BH = features(model.own, model.header, make_own, batch)
    assert isinstance(model.projection, nn.Identity) == (shared_BH.shape == own_BH.shape)
    if "pixel_values" in batch:
        read_BD = batch["pixel_values"].flatten(1)
    else:
        words = model.shared.get_input_embeddings()
        read_BD = torch.stack(
            [
                words(tokens[mask == 1]).mean(0)
                for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        )
    norm, first, norm_1, _, second, norm_2, _ = model.gate
    hidden_BH = (first(norm(read_BD)) - norm_1.running_mean) / (norm_1.running_var + 1e-5).sqrt()
    hidden_BH = (hidden_BH * norm_1.weight + norm_1.bias).sigmoid()
    scores_B2 = (second(hidden_BH) - norm_2.running_mean) / (norm_2.running_var + 1e-5).sqrt()
    probs_B2 = (scores_B2 * norm_2.weight + norm_2.bias).softmax(-1)
    mixed_BH = probs_B2[:, :1] * model.projection(shared_BH) + probs_B2[:, 1:] * own_BH
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    out = model(**batch, labels=labels)
    torch.testing.assert_close(out.gate_probs, probs_B2)
    torch.testing.assert_close(out.logits, model.header(mixed_BH), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    assert out.gate_probs.std(0).min() > 1e-3  # the gate reads its input


def switched(x_BD, norm, mean_D, var_D):
    """Switchable normalisation one element at a time."""
    out_BD = torch.empty_like(x_BD)
    mean_shares, var_shares = norm.mean_logits.exp(), norm.var_logits.exp()
    for i, row_D in enumerate(x_BD):
        mean_row = sum(row_D) / len(row_D)
        var_row = sum((row_D - mean_row) ** 2) / len(row_D)
        for d, value in enumerate(row_D):
            mean = (mean_shares[0] * mean_row + mean_shares[1] * mean_D[d]) / sum(mean_shares)
            var = (var_shares[0] * var_row + var_shares[1] * var_D[d]) / sum(var_shares)
            out_BD[i, d] = (value - mean) / (var + 1e-5) ** 0.5 * norm.weight[d] + norm.bias[d]
    return out_BD


@torch.no_grad()
def test_switch_norm_by_hand():
    torch.manual_seed(0)
    norm, x_BD = SwitchNorm(4).double(), torch.randn(3, 4, dtype=torch.float64) * 2 + 1
    for parameter in norm.parameters():
        parameter.normal_()
    mean_D = sum(x_BD) / 3
    var_D = sum((x_BD - mean_D) ** 2) / 3
    torch.testing.assert_close(norm(x_BD), switched(x_BD, norm, mean_D, var_D))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean_D)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var_D * 3 / 2)
    running = norm.running_mean.clone(), norm.running_var.clone()
    # One example alone has no statistics of a batch, and leaves none.
    torch.testing.assert_close(norm(x_BD[:1]), switched(x_BD[:1], norm, *running))
    norm.eval()
    torch.testing.assert_close(norm(x_BD), switched(x_BD, norm, *running))
    assert torch.equal(norm.running_mean, running[0]) and torch.equal(norm.running_var, running[1])


@torch.no_grad()
def test_switch_norm_has_layer_and_batch_normalisation_as_limits():
    norm, x_BD = SwitchNorm(4), torch.randn(3, 4)
    for logits in (norm.mean_logits, norm.var_logits):
        logits.copy_(torch.tensor([1000.0, 0.0]))
    torch.testing.assert_close(norm(x_BD), nn.LayerNorm(4)(x_BD))
    for logits in (norm.mean_logits, norm.var_logits):
        logits.copy_(torch.tensor([0.0, 1000.0]))
    torch.testing.assert_close(norm(x_BD), nn.BatchNorm1d(4)(x_BD))


def test_one_example_alone_is_normalised_as_in_evaluation():
    plain, lenient, x_BD = nn.BatchNorm1d(4), LenientBatchNorm(4), torch.randn(5, 4)
    torch.testing.assert_close(lenient(x_BD), plain(x_BD))
    before = {name: tensor.clone() for name, tensor in lenient.state_dict().items()}
    torch.testing.assert_close(lenient(x_BD[:1]), plain.eval()(x_BD[:1]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lenient.state_dict().items())


def test_one_loss_trains_every_part_but_not_the_embeddings_through_the_gate():
    model, batch = pair_of("bert_gpt2")
    loss = model.train()(**batch, labels=torch.tensor([0, 1, 2, 3, 0, 1])).loss
    loss.backward()
    for part in (model.shared, model.own, model.header, model.gate):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
    model.zero_grad()
    model(**batch).gate_probs[0, 0].backward()
    assert all(p.grad is None for part in (model.shared, model.own, model.header) for p in part.parameters())


@pytest.mark.parametrize("name", ["bert_gpt2", "cnn_resnet", "resnet_cnn"])
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model, batch = pair_of(name)
    model.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if "pixel_values" in batch else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_loads_where_the_package_is_not_installed(tmp_path):
    model, batch = pair_of("bert_gpt2")
    model.save_pretrained(tmp_path / "model")
    [logits] = logits_without_package([tmp_path / "model"], batch["input_ids"], tmp_path / "cache")
    assert torch.equal(logits, model(batch["input_ids"]).logits)


def test_the_start():
    config = PairedExpertsConfig(shared_config=tiny_cnn().config, own_config=tiny_cnn(hidden_size=9).config)
    model = PairedExpertsForImageClassification(config)
    norm = model.gate[0]
    assert config.gate_input_size == len(norm.weight) == 192 and config.gate_hidden_size == 64
    for tensor, value in ((norm.weight, 1), (norm.running_var, 1), (norm.bias, 0), (norm.mean_logits, 0)):
        assert (tensor == value).all()
    bound = 9**-0.5  # the header starts as in its own classifier
    assert 0.8 * bound < model.header.weight.abs().max() <= bound
    assert model.projection.weight.shape == (9, 6)


def test_labels_and_padding():
    bert = tiny_bert(3).config
    bert.id2label, bert.label2id = {0: "bad", 1: "fair", 2: "good"}, {"bad": 0, "fair": 1, "good": 2}
    gpt2 = tiny_gpt2(3).config
    config = PairedExpertsConfig(shared_config=bert, own_config=gpt2)
    assert config.id2label[2] == "good" and config.num_labels == 3
    assert config.pad_token_id == config.own_config.pad_token_id == 1 and gpt2.pad_token_id is None


@pytest.mark.parametrize(
    ("shared", "own", "settings", "message"),
    [
        (tiny_bert, lambda: tiny_bert(3), {}, r"`own_config` has 3 labels \(`num_labels`\), `shared_config` 4: make"),
        (tiny_bert, lambda: tiny_bert(vocab_size=9), {}, "`vocab_size` is 9 in `own_config`, less than the 40"),
        (tiny_bert, lambda: tiny_gpt2(pad_token_id=0), {}, "`pad_token_id` is 0 in `own_config` and 1 in"),
        (
            tiny_cnn,
            lambda: tiny_cnn(num_channels=1),
            {},
            "`num_channels` is 1 in `own_config` and 3 in",
        ),
        (tiny_cnn, tiny_cnn, {"gate_hidden_size": 0}, "`gate_hidden_size` is 0: pass an integer of at least 1"),
    ],
)
def test_pairs_that_do_not_go_together(shared, own, settings, message):
    with pytest.raises(ValueError, match=message):
        PairedExpertsConfig(shared_config=shared().config, own_config=own().config, **settings)


def test_models_that_cannot_be_built():
    images, texts = tiny_stock_resnet().config, tiny_bert().config
    with pytest.raises(ValueError, match="`gate_input_size` is None, and `shared_config` has no `image_size`"):
        PairedExpertsForImageClassification(PairedExpertsConfig(shared_config=images, own_config=images))
    with pytest.raises(ValueError, match="`own_config` is a ResNetConfig, which AutoModelForSequenceClassification"):
        PairedExpertsForSequenceClassification(PairedExpertsConfig(shared_config=texts, own_config=images))
    config = PairedExpertsConfig(shared_config=images, own_config=images, gate_input_size=100)
    with pytest.raises(ValueError, match=r"`gate_input_size` is 100, but .* with gate_input_size=192"):
        PairedExpertsForImageClassification(config)(**image_batch())


def test_texts_without_token_ids_are_refused():
    shared, own = tiny_bert(), tiny_gpt2()
    model = PairedExpertsForSequenceClassification(
        PairedExpertsConfig(shared_config=shared.config, own_config=own.config)
    )
    with pytest.raises(ValueError, match="`input_ids` is missing from the inputs"):
        model(attention_mask=torch.ones(2, 3))
