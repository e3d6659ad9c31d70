import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, TrainerCallback

from hf_fedmoe.federation import LocalTrainer
from hf_fedmoe.strategies import FedAvg, FedAvgReserved
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
)


def fedmoe(output_dir, data=None, **changes):
    return FedMoETrainer(tiny_mixture(), tiny_args(output_dir, **changes), train_dataset=data or tiny_federation())


def fedavg(output_dir, data=None, **changes):
    return FederatedTrainer(tiny_expert(), tiny_args(output_dir, **changes), data or tiny_federation())


def test_both_methods_learn_a_task_that_can_be_learned(tmp_path):
    data = tiny_federation(num_clients=4, client_size=60, reserved_size=60)
    for trainer in (fedavg(tmp_path, data, rounds=12), fedmoe(tmp_path, data, rounds=12)):
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        after = trainer.evaluate()
        assert before < 0.6 < 0.75 < after["eval_accuracy"], type(trainer).__name__
        assert after["eval_macro_f1"] > 0.7


def test_a_step_is_a_round(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, state.epoch, state.max_steps))

    trainer = fedavg(tmp_path, rounds=3, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(Watch())
    output = trainer.train()
    assert seen == [(1, 1.0, 3), (2, 2.0, 3), (3, 3.0, 3)]
    assert output.global_step == 3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [
        2,
        3,
    ]  # and after the last round
    assert output.training_loss == pytest.approx(np.mean([entry["loss"] for entry in logged]))


def test_each_round_reports_communication_gate_and_time(tmp_path):
    trainer = fedmoe(tmp_path, rounds=2)
    trainer.train()
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    parameters = sum(parameter.numel() for parameter in tiny_expert().parameters())
    assert entry["bytes_up"] == entry["bytes_down"] == 2 * parameters * 4
    assert 0 < entry["alpha"] < 1 and 0 < entry["gate_entropy"] <= math.log(2) + 1e-6
    assert entry["expert_0_share"] + entry["expert_1_share"] == pytest.approx(1)
    assert {"seconds_clients", "seconds_server", "seconds_synchronise"} <= entry.keys()
    assert entry["gate_grad_norm"] > 0


def test_participants_are_drawn_by_their_own_seed(tmp_path):
    def drawn(**changes):
        trainer = fedavg(tmp_path, tiny_federation(num_clients=6), rounds=4, **changes)
        trainer.train()
        return [report.clients for report in trainer.rounds]

    assert drawn(client_draw_seed=5) == drawn(client_draw_seed=5, learning_rate=1e-3) != drawn(client_draw_seed=6)


def test_frozen_parameters_of_the_expert_stay_frozen(tmp_path):
    expert = tiny_expert()
    expert.bert.requires_grad_(False)
    before = state(expert)
    trainer = FederatedTrainer(expert, tiny_args(tmp_path, rounds=1), tiny_federation())
    trainer.train()
    changed = {name for name, tensor in state(trainer.model).items() if not torch.allclose(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_columns_that_only_the_client_model_names_reach_it(tmp_path):
    trainer = fedmoe(tmp_path, rounds=1)
    trainer.train()
    assert {"input_ids", "attention_mask", "token_type_ids", "label"} <= set(trainer._signature_columns)


def test_dropout_follows_from_the_seed(tmp_path):
    states = []
    for seed in (11, 11, 12):
        expert = tiny_expert()
        for module in expert.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        args = tiny_args(tmp_path, rounds=1, seed=seed, client_draw_seed=0)
        trainer = FederatedTrainer(expert, args, tiny_federation())
        trainer.train()
        states.append(state(trainer.model))
    assert_equal_states(states[0], states[1])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def test_afterwards_the_model_is_an_ordinary_one(tmp_path):
    trainer = fedmoe(tmp_path, rounds=1)
    trainer.train()
    storages = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    assert len(storages) == len(list(trainer.model.parameters()))
    trainer.model.save_pretrained(tmp_path / "own")
    trainer.save_model(str(tmp_path / "trainer"))
    for folder in ("own", "trainer"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert_equal_states(state(loaded), state(trainer.model))
    assert not list((tmp_path / "trainer").glob("*.bin"))


def test_checkpoints_are_safetensors_and_json_only_and_load_as_models(tmp_path):
    trainer = fedmoe(tmp_path, save_strategy="steps", preset="paper", keep_client_optimizer=True)
    trainer.train()
    checkpoints = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-3"]  # save_total_limit = 2
    endings = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert endings <= {".safetensors", ".json", ".py"}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert_equal_states(state(loaded), state(trainer.model))
    # Every client file that a checkpoint names is there, and no other.
    named = set()
    for folder in checkpoints:
        named |= set(json.loads((tmp_path / folder / "federation.json").read_text())["clients"].values())
    assert {path.name for path in (tmp_path / "_clients").iterdir()} == named
    with safe_open(tmp_path / "_clients" / sorted(named)[0], "pt") as file:
        assert "row_P" in file.keys() and any(key.startswith("optimizer.") for key in file.keys())  # noqa: SIM118


def test_best_model_is_loaded_at_the_end(tmp_path):
    trainer = fedavg(
        tmp_path,
        rounds=4,
        learning_rate=3e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_global_step == int(np.argmin(losses)) + 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))


def test_early_stopping_stops_rounds(tmp_path):
    trainer = fedavg(
        tmp_path,
        rounds=9,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 3


def test_predict_gives_logits_of_the_mixture(tmp_path):
    data, trainer = tiny_federation(), fedmoe(tmp_path, rounds=1)
    trainer.train()
    output = trainer.predict(data.validation)
    assert output.predictions.shape == (20, 3)
    np.testing.assert_allclose(np.exp(output.predictions).sum(1), 1, rtol=1e-5)
    assert output.metrics["test_accuracy"] == (output.predictions.argmax(1) == output.label_ids).mean()


def test_a_failing_client_and_a_poisoned_upload_are_left_out(tmp_path, monkeypatch):
    data = tiny_federation(num_clients=3)
    honest = fedavg(
        tmp_path,
        type(data)(data.pool, [data.client_indices[1]], validation=data.split_indices["validation"]),
        rounds=1,
        clients_per_round=1,
    )
    train = LocalTrainer.train
    calls = []

    def broken(self, *arguments):
        calls.append(1)
        payload = train(self, *arguments)
        if len(calls) == 1:
            raise OSError("battery empty")
        if len(calls) == 3:
            payload.row_P[0] = float("nan")
        return payload

    trainer = fedavg(tmp_path, data, rounds=1, clients_per_round=3)
    monkeypatch.setattr(LocalTrainer, "train", broken)
    trainer.train()
    report = trainer.rounds[0]
    assert report.refused.keys() == {0, 2}
    assert "battery empty" in report.refused[0] and "not finite" in report.refused[2]
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    assert [entry["refused_clients"] for entry in trainer.state.log_history if "refused_clients" in entry] == [2]
    assert report.bytes_up == sum(p.numel() for p in honest.model.parameters()) * 4


def test_a_round_without_any_sound_upload_stops_with_the_reasons(tmp_path, monkeypatch):
    def broken(self, *arguments):
        raise OSError("battery empty")

    monkeypatch.setattr(LocalTrainer, "train", broken)
    reasons = r"No client of round 1 sent a sound model. client \d, client \d: OSError: battery"
    with pytest.raises(RuntimeError, match=reasons):
        fedavg(tmp_path).train()


def test_uploads_of_a_round_are_written_over_those_of_the_last(tmp_path):
    seen = []

    class Watched(FedAvg):
        def update(self, server, uploads, *args):
            seen.append((uploads.rows_mP, uploads.rows_mP.clone()))  # nothing else gets this memory while it is held
            return super().update(server, uploads, *args)

    args = tiny_args(tmp_path, rounds=3)
    FederatedTrainer(tiny_expert(), args, tiny_federation(), strategy=Watched()).train()
    memory, values = zip(*seen, strict=True)
    assert len({rows_mP.data_ptr() for rows_mP in memory}) == 1
    assert torch.equal(memory[0], values[2]) and not torch.equal(values[1], values[2])


def test_client_optimizer_state_is_kept_on_request(tmp_path):
    kept = fedavg(tmp_path / "kept", tiny_federation(num_clients=2), rounds=2, keep_client_optimizer=True)
    fresh = fedavg(tmp_path / "fresh", tiny_federation(num_clients=2), rounds=2)
    kept.train(), fresh.train()
    assert not torch.equal(state(kept.model)["classifier.weight"], state(fresh.model)["classifier.weight"])


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    plain, checkpointed = fedmoe(tmp_path, rounds=1), fedmoe(tmp_path, rounds=1, activation_checkpointing=True)
    plain.train(), checkpointed.train()
    assert_equal_states(state(plain.model), state(checkpointed.model), atol=1e-6, rtol=0)


def test_compiled_training_gives_the_same_weights(tmp_path):
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    states = []
    # This backend traces as every other does, and runs the operations as they are.
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = fedavg(tmp_path, rounds=1, **changes)
        trainer.train()
        states.append(state(trainer.personalize(0)))
        compiled = counters["unique_graphs"]
        assert bool(compiled) == bool(changes)
        trainer.evaluate()
        assert counters["unique_graphs"] == compiled  # the server's model stays as it is
    assert_equal_states(*states)


def test_schedule_over_the_run_falls_from_round_to_round(tmp_path):
    rates = []

    class Watch(FedAvg):
        def loss(self, model, batch, received):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            return super().loss(model, batch, received)

    trainer = FederatedTrainer(
        tiny_expert(),
        tiny_args(tmp_path, rounds=4, clients_per_round=1, lr_scheduler_scope="run"),
        tiny_federation(client_size=8),
        strategy=Watch(),
    )
    trainer.train()
    # The first is that of the trial.
    assert rates[1:] == pytest.approx([1e-2, 1e-2, 0.75e-2, 0.75e-2, 0.5e-2, 0.5e-2, 0.25e-2, 0.25e-2])


def test_control_spends_its_steps_on_the_reserved_set(tmp_path):
    trainer = FederatedTrainer(
        tiny_expert(), tiny_args(tmp_path, rounds=2), tiny_federation(), strategy=FedAvgReserved(learning_rate=1e-2)
    )
    trainer.train()
    assert [entry["reserved_loss"] > 0 for entry in trainer.state.log_history if "reserved_loss" in entry] == [
        True
    ] * 2


def test_tensorboard_gets_the_rounds(tmp_path):
    trainer = fedmoe(tmp_path, rounds=2, report_to="tensorboard")
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/alpha")] == [1, 2]


def test_bf16_trains_and_keeps_float32_weights(tmp_path):
    trainer = fedmoe(tmp_path, rounds=1, bf16=True)
    trainer.evaluate()  # wraps forward for mixed precision; clients must not inherit that
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.evaluate()["eval_loss"] < 1.5


@pytest.mark.parametrize(
    ("compression", "share", "atol"), [("bf16", 0.5, 2e-3), ("int8", 0.3, 2e-2), ("top_k", 0.021, 1.0)]
)
def test_compressed_uploads_are_counted_as_they_travel(tmp_path, compression, share, atol):
    plain = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, rounds=1), tiny_federation())
    plain.train()
    args = tiny_args(tmp_path, rounds=1, upload_compression=compression)
    compressed = FederatedTrainer(tiny_expert(), args, tiny_federation())
    compressed.train()
    (before,), (after,) = plain.rounds, compressed.rounds
    assert after.bytes_down == before.bytes_down and 0 < after.bytes_up <= share * before.bytes_up
    distance = max(
        (a - b).abs().max().item()
        for a, b in zip(state(plain.model).values(), state(compressed.model).values(), strict=True)
    )
    assert 0 < distance < atol


def test_compression_is_checked_before_training(tmp_path):
    with pytest.raises(ValueError, match="`upload_compression` is 'zip'"):
        tiny_args(tmp_path, upload_compression="zip")
