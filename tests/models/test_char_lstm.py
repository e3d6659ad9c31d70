import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_fedmoe.models import CharLSTMConfig, CharLSTMForSequenceClassification, CharLSTMModel
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.weights.layout import StateLayout, copy_module
from tests.tiny_federation import state, tiny_args, tiny_federation
from tests.tiny_models import VOCAB_SIZE, make_different, text_batch, tiny_char_lstm


def test_published_size():
    with torch.device("meta"):
        model = CharLSTMForSequenceClassification(CharLSTMConfig(num_labels=100))
    assert model.num_parameters() == 825_220
    assert [tuple(model.char_lstm.embedding.weight.shape), tuple(model.classifier.weight.shape)] == [
        (100, 8),
        (100, 256),
    ]
    assert model.num_parameters() - model.classifier.weight.numel() - 100 - 800 == 798_720
    assert (model.config.pad_token_id, model.char_lstm.lstm.num_layers) == (99, 2)


@torch.no_grad()
def test_forward_by_hand():
    """The gates written out: input, forget, cell, output, as in Hochreiter and Schmidhuber with a forget gate."""
    model = make_different(tiny_char_lstm(num_hidden_layers=2, hidden_size=3)).double()
    weights = dict(model.char_lstm.lstm.named_parameters())
    batch = text_batch(5, 6, pad_token_id=None)
    labels = torch.tensor([0, 1, 2, 3, 0])
    inputs = list(model.char_lstm.embedding(batch["input_ids"]).unbind(1))
    for layer in range(2):
        state = cell = torch.zeros(5, 3, dtype=torch.float64)
        for position, x in enumerate(inputs):
            gates = x @ weights[f"weight_ih_l{layer}"].T + weights[f"bias_ih_l{layer}"]
            gates += state @ weights[f"weight_hh_l{layer}"].T + weights[f"bias_hh_l{layer}"]
            let_in, forget, new, let_out = gates.chunk(4, dim=1)
            cell = forget.sigmoid() * cell + let_in.sigmoid() * new.tanh()
            inputs[position] = state = let_out.sigmoid() * cell.tanh()
    out = model(**batch, labels=labels)
    torch.testing.assert_close(model.char_lstm(**batch).last_hidden_state, torch.stack(inputs, 1))
    torch.testing.assert_close(out.logits, state @ model.classifier.weight.T + model.classifier.bias)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    loss, logits = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(logits, out.logits) and torch.equal(loss, out.loss)


@torch.no_grad()
def test_padding_changes_nothing_wherever_it_is():
    model = make_different(tiny_char_lstm(), 0.3)
    texts = [torch.randint(VOCAB_SIZE, (length,)) for length in (7, 1, 4, 3)]
    alone = torch.cat([model(text[None]).logits for text in texts])
    assert (alone[0] - alone[1]).abs().max() > 0.01
    places = {
        "right": [range(7), range(1), range(4), range(3)],
        "left": [range(7), range(6, 7), range(3, 7), range(4, 7)],
        "both": [range(7), range(2, 3), range(1, 5), range(3, 6)],
        "between": [range(7), [5], [0, 2, 4, 6], [1, 2, 6]],
    }
    padded = {}
    for name, rows in places.items():
        # What stands where the mask is 0 may be anything.
        input_ids, mask = torch.randint(VOCAB_SIZE, (4, 7)), torch.zeros(4, 7, dtype=torch.long)
        for row, (text, place) in enumerate(zip(texts, rows, strict=True)):
            input_ids[row, list(place)], mask[row, list(place)] = text, 1
        padded[name] = model(input_ids, mask).logits
        torch.testing.assert_close(padded[name], alone, rtol=0, atol=1e-6)
        assert torch.equal(model(input_ids, mask.bool()).logits, padded[name])
        assert torch.equal(padded[name], padded["right"]), name


@torch.no_grad()
def test_all_of_a_mask_is_no_mask_and_none_is_the_start():
    model = make_different(tiny_char_lstm())
    batch = text_batch(pad_token_id=None)
    assert torch.equal(model(**batch).logits, model(batch["input_ids"]).logits)
    nothing = model(batch["input_ids"], torch.zeros_like(batch["attention_mask"])).logits
    assert torch.equal(nothing, model.classifier.bias.expand(6, -1))


def test_no_gradient_comes_from_padding():
    model = tiny_char_lstm()
    input_ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[0, 1, 1, 0]])
    model(input_ids, mask, labels=torch.tensor([2])).loss.backward()
    touched = model.char_lstm.embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert touched.tolist() == [4, 5]


def test_starts_as_torch_does():
    torch.manual_seed(0)
    model = tiny_char_lstm(embedding_size=200, hidden_size=64)
    assert model.char_lstm.embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    for tensor in (*model.char_lstm.lstm.parameters(), model.classifier.weight):
        assert 0.95 / 8 < tensor.abs().max().item() <= 1 / 8
        assert tensor.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("num_labels", [2, 4])
def test_round_trip_is_bit_equal(tmp_path, num_labels):
    model = make_different(tiny_char_lstm(num_labels))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, CharLSTMForSequenceClassification)
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict() | {
        "architectures": loaded.config.architectures,
        "dtype": "float32",
    }
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(**text_batch()).logits, model(**text_batch()).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, CharLSTMModel)
    assert torch.equal(body(**text_batch()).pooler_output, model.char_lstm(**text_batch()).pooler_output)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other.classifier.out_features == 7


@torch.no_grad()
def test_a_row_of_a_bank_is_the_model():
    """Copies that an LSTM keeps of its weights follow the parameters."""
    model, other = make_different(tiny_char_lstm()), make_different(tiny_char_lstm(), seed=1)
    layout = StateLayout.of(model)
    assert (layout.batchnorm, layout.integers, layout.num_elements) == ((), (), model.num_parameters())
    expected = other(**text_batch()).logits
    before = model(**text_batch()).logits
    bank_SP = layout.bank([model])
    copied = copy_module(model)
    layout.read(other, out=bank_SP[0])
    assert torch.equal(model(**text_batch()).logits, expected)
    assert torch.equal(copied(**text_batch()).logits, before)
    layout.write(bank_SP[0], copied)
    bank_SP.zero_()
    assert torch.equal(copied(**text_batch()).logits, expected)
    assert not model(**text_batch()).logits.any()


def test_a_copy_trains(tmp_path):
    """A federation trains a copy of a model bound to a bank: its steps must reach what the layers compute."""
    model = tiny_char_lstm(3)
    before = {name: tensor.clone() for name, tensor in state(model).items()}
    args = tiny_args(tmp_path, rounds=4, clients_per_round=4, learning_rate=0.03, num_train_epochs=3)
    trainer = FederatedTrainer(model, args, tiny_federation())
    trainer.train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0] < 1.0


def test_the_embedding_is_resized():
    model = tiny_char_lstm()
    assert model.get_input_embeddings() is model.char_lstm.embedding
    expected = model(**text_batch()).logits
    model.resize_token_embeddings(VOCAB_SIZE + 5)
    assert model.config.vocab_size == model.char_lstm.embedding.num_embeddings == VOCAB_SIZE + 5
    assert torch.equal(model(**text_batch()).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` is 0: pass an integer of at least 1"),
        ({"embedding_size": 2.5}, "`embedding_size` is 2.5"),
        ({"hidden_size": True}, "`hidden_size` is True"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` is -1"),
        ({"pad_token_id": 100}, r"`pad_token_id` is 100, but the characters are 0 to 99 \(`vocab_size`\)"),
    ],
)
def test_config_errors_name_field_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        CharLSTMConfig(**arguments)


def test_inputs_of_another_shape():
    model = tiny_char_lstm()
    for shape in ((5,), (2, 0), (2, 3, 4)):
        with pytest.raises(ValueError, match="`input_ids` has the shape") as error:
            model(torch.zeros(shape, dtype=torch.long))
        assert f"{shape}: pass (batch, characters)" in str(error.value)
    with pytest.raises(ValueError, match=r"`attention_mask` has the shape \(2, 4\), `input_ids` \(2, 5\)"):
        model(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 4))
