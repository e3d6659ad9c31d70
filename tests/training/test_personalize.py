"""Personal models of one's own: of clients that the run knows, and of those it does not."""

import pytest
import torch
from datasets import ClassLabel
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_fedmoe.data import hold_out_client_tests
from hf_fedmoe.models import EnsembleForSequenceClassification, MultiHeadForSequenceClassification
from hf_fedmoe.strategies import FedAvg, FedEM, FedRep, PFedMM
from hf_fedmoe.strategies.fedem import expectation
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.every_method import METHODS, trained
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_ensemble,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
    tiny_multi_head,
    tiny_rows,
)


def federation():
    return hold_out_client_tests(tiny_federation(), test_share=0.25, unseen_share=0.25)


def pointers(model) -> set[int]:
    return {tensor.data_ptr() for tensor in model.state_dict().values()}


def inputs(rows):
    return {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(("strategy", "start"), [(FedEM, tiny_ensemble), (PFedMM, tiny_multi_head)])
@pytest.mark.parametrize("num_em_steps", [1, 3])
def test_of_a_new_client_only_the_mixture_is_fitted(tmp_path, strategy, start, num_em_steps):
    data, rows = federation(), tiny_rows(10, seed=5)
    trainer = FederatedTrainer(start(), tiny_args(tmp_path), data, strategy=strategy(num_em_steps))
    trainer.train()
    own = trainer.personalize(rows)
    with torch.no_grad():
        logits_NMC = trainer.model.eval()(**inputs(rows)).model_logits
    losses_NM = -logits_NMC.log_softmax(-1)[torch.arange(10), :, torch.tensor(rows["label"])]
    pi_M = torch.full((2,), 0.5)
    for _ in range(num_em_steps):
        _, pi_M = expectation(losses_NM, pi_M)
    torch.testing.assert_close(own.mixture_M, pi_M, atol=1e-6, rtol=0)
    assert (own.mixture_M - 0.5).abs().max() > 1e-5
    expected = state(trainer.model) | {"mixture_M": own.mixture_M}
    assert_equal_states(state(own), expected)


@pytest.mark.parametrize(
    ("method", "saved_class"),
    [("fedem", EnsembleForSequenceClassification), ("pfedmm", MultiHeadForSequenceClassification)],
)
def test_saved_with_the_mixture_of_each_client(tmp_path, method, saved_class):
    data = federation()
    trainer = trained(tmp_path / "run", method, data, rounds=4)
    store, rows = trainer._federation_of_the_last_round().store, tiny_rows(5, seed=8)
    mixtures = []
    for client in (*store.manifest, data.client(3)):
        own = trainer.personalize(client)
        own.save_pretrained(tmp_path / "own")
        loaded = saved_class.from_pretrained(tmp_path / "own")
        mixtures.append(load_file(tmp_path / "own" / "model.safetensors")["mixture_M"])
        assert torch.equal(loaded.mixture_M, own.mixture_M) and torch.equal(mixtures[-1], own.mixture_M)
        if isinstance(client, int):
            assert torch.equal(own.mixture_M, store.get(client)["pi_M"])
            assert own.mixture_M.sum().item() == pytest.approx(1) and (own.mixture_M != 0.5).all()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs(rows)).logits, own(**inputs(rows)).logits)
    assert not any(torch.equal(mixtures[0], other) for other in mixtures[1:])
    assert trainer.model.mixture_M.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("method", ["fedem", "pfedmm", "fedrep", "apfl", "fedavg_plus", "fedavg"])
def test_asked_for_during_the_run_it_changes_nothing(tmp_path, method):
    data, rows = federation(), tiny_rows(10, seed=5)

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(asked.personalize(rows))
            asked.personalize(0)
            with torch.no_grad():
                for parameter in found[-1].parameters():
                    kept.append(parameter.clone())

    found, kept, runs = [], [], {}
    for name in ("plain", "asked"):
        args = tiny_args(tmp_path / name, save_strategy="steps", save_total_limit=3, keep_client_optimizer=True)
        asked = runs[name] = FederatedTrainer(METHODS[method].model(), args, data, strategy=METHODS[method].strategy())
        if name == "asked":
            asked.personalize(rows)
            asked.add_callback(Ask())
        asked.train()
    assert_equal_states(state(runs["asked"].model), state(runs["plain"].model))
    for number in (1, 2, 3):
        for file in ("model.safetensors", "federation.safetensors"):
            mine, theirs = ((tmp_path / name / f"checkpoint-{number}" / file).read_bytes() for name in runs)
            assert mine == theirs, (number, file)
    stores = [run._federation_of_the_last_round().store for run in runs.values()]
    for client in range(3):
        assert_equal_states(stores[0].get(client), stores[1].get(client))
    # What was handed out stays as it was; that of the last round is what the run gives afterwards.
    now = [parameter for model in found for parameter in model.parameters()]
    assert len(found) == 3 and all(torch.equal(mine, then) for mine, then in zip(now, kept, strict=True))
    assert_equal_states(state(found[-1]), state(runs["plain"].personalize(rows)))


def test_from_a_model_that_was_loaded(tmp_path):
    data, rows = federation(), tiny_rows(10, seed=5)
    trainer = trained(tmp_path / "run", "pfedmm", data)
    trainer.save_model(str(tmp_path / "model"))
    loaded = MultiHeadForSequenceClassification.from_pretrained(tmp_path / "model")
    other = FederatedTrainer(loaded, tiny_args(tmp_path / "other"), data, strategy=PFedMM())
    assert_equal_states(state(other.personalize(rows)), state(trainer.personalize(rows)))


def test_the_copy_of_a_model_evaluated_in_mixed_precision_runs_itself(tmp_path):
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, bf16=True, rounds=1), federation())
    copies = []

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.evaluate()
            copies.append(trainer.personalize(0))

    trainer.add_callback(Ask())
    trainer.train()
    (own,) = copies
    torch.nn.init.zeros_(own.classifier.weight)
    with torch.no_grad():
        logits_NC = own(**inputs(tiny_rows(2))).logits
    assert torch.equal(logits_NC, own.classifier.bias.expand(2, -1))


def test_a_mixture_is_copied_whole(tmp_path):
    trainer = FedMoETrainer(tiny_mixture(), tiny_args(tmp_path, rounds=1), train_dataset=federation())
    trainer.train()
    own = trainer.personalize(tiny_rows(4))
    assert type(own) is type(trainer.model) and not pointers(own) & pointers(trainer.model)
    assert_equal_states(state(own), state(trainer.model))


@pytest.mark.parametrize("strategy", [FedAvg, FedRep])
def test_an_adapter_comes_with_its_base(tmp_path, strategy):
    config = LoraConfig(r=2, target_modules=["query"])
    args = tiny_args(tmp_path / "run", rounds=1)
    trainer = FederatedTrainer(tiny_expert(), args, federation(), strategy=strategy(), peft_config=config)
    trainer.train()
    own, rows = trainer.personalize(0), tiny_rows(5, seed=8)
    assert isinstance(own, PeftModel) and not pointers(own) & pointers(trainer.model)
    used = trainer._federation_of_the_last_round().personal_model(0).eval()
    own.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(tiny_expert(), tmp_path / "own").eval()
    with torch.no_grad():
        logits_NC = used(**inputs(rows)).logits
        torch.testing.assert_close(own(**inputs(rows)).logits, logits_NC)
        torch.testing.assert_close(loaded(**inputs(rows)).logits, logits_NC)


def test_bad_clients(tmp_path):
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path), federation())
    rows = tiny_rows(4)
    for client, message in (
        (4, "`client` is 4: give a client's number, 0 to 3, or a"),
        (-1, "`client` is -1"),
        ("me", "`client` is 'me'"),
        (rows.select([]), "`client` has no rows"),
        (rows.remove_columns("label"), "label_column is 'label', but client has only"),
        (rows.remove_columns("attention_mask"), r"`client` lacks the columns \['attention_mask'\]"),
        (rows.remove_columns("label").add_column("label", [0, 1, -1, 0]), "client is -1 in row 2"),
        (rows.remove_columns("label").add_column("label", [0, 1, 3, 0]), "client is 3 in row 2, but num_labels is 3"),
        (
            rows.cast_column("label", ClassLabel(names=["c", "b", "a"])),
            "'label' of client has classes that the others have not: c, b, a",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.personalize(client)
    trainer.personalize(rows.add_column("writer", ["w"] * 4))  # which the run's clients have not
    with pytest.raises(ValueError, match="`train_dataset` is None: give the trainer the `FederatedDataset`"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path)).personalize(rows)
