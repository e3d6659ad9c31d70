"""The bar and the lines that a person sees of a run."""

import time

import pytest
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_fedmoe.strategies import FedAvg
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from hf_fedmoe.training.progress import RoundLines, RoundPrinter, RoundProgress, Watch, last_line, round_line
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation, tiny_mixture, tiny_rows


ROUND = {
    "loss": 1.2341,
    "bytes_up": 12_345_678,
    "seconds_clients": 4.0,
    "seconds_server": 0.12,
    "alpha": 0.5,
    "epoch": 3,
}
SCORES = {"loss": 0.9, "accuracy": 0.6123, "macro_f1": 0.4567, "runtime": 0.5, "samples_per_second": 3.0}


def evaluated(prefix="eval"):
    return {f"{prefix}_{name}": value for name, value in SCORES.items()} | {"epoch": 3.0}


@pytest.mark.parametrize(
    ("logs", "refused", "chosen", "line"),
    [
        ([ROUND], [], [], "round  3/10  loss 1.234  12.3 MB up  4.1 s"),
        (
            [ROUND, evaluated()],
            ["client 1", "client 7"],
            ["accuracy"],
            "round  3/10  loss 1.234  accuracy 61.2 %  12.3 MB up  4.1 s  refused: client 1, client 7",
        ),
        ([evaluated()], [], ["accuracy", "macro_f1"], "round  3/10  accuracy 61.2 %  macro_f1 0.457"),
        ([evaluated()], [], ["unheard_of"], "round  3/10  eval loss 0.900"),
        (
            [evaluated("eval_north"), evaluated("eval_south")],
            [],
            ["accuracy"],
            "round  3/10  north accuracy 61.2 %  south accuracy 61.2 %",
        ),
        ([ROUND | {"bytes_up": 72_696}, {"temperature": 3, "epoch": 3.0}], [], [], None),
    ],
)
def test_a_round_in_a_line(logs, refused, chosen, line):
    line = line or "round  3/10  loss 1.234  72.7 kB up  4.1 s  temperature 3"
    assert round_line(3, 10, logs, refused, chosen) == line


def test_the_end_of_a_run_in_a_line():
    logs = {"train_runtime": 20.15, "train_samples_per_second": 44.67, "train_loss": 1.269}
    assert last_line(10, logs) == "10 rounds  20.1 s  44.67 examples/s  loss 1.269"
    done = logs | {"train_samples_per_second": 0.0, "train_loss": 0.0}
    assert last_line(10, done) == "10 rounds  20.1 s  no round was left to train"


class Thermometer(TrainerCallback):
    """A callback of a user's own, which logs."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


class SecondFails(FedAvg):
    def train_client(self, local, task):
        if task.client == 2:
            raise OSError("battery empty")
        return super().train_client(local, task)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_run_tells_a_line_for_each_round(disable_tqdm, tmp_path, capsys):
    args = tiny_args(
        tmp_path,
        clients_per_round=4,
        disable_tqdm=disable_tqdm,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        logging_steps=1,
    )
    user = Thermometer()
    trainer = FederatedTrainer(tiny_expert(), args, tiny_federation(), SecondFails(), callbacks=[user])
    assert user in trainer.callback_handler.callbacks
    trainer.train()
    told = capsys.readouterr()
    lines = [line for line in told.out.splitlines() if line.strip()]
    accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    losses = [report.loss for report in trainer.rounds]
    kilobytes = trainer.rounds[0].bytes_up / 1e3
    expected = [f"round {step}/3  loss {loss:.3f}" for step, loss in enumerate(losses, start=1)]
    for step, accuracy in zip((2, 3), accuracies, strict=True):
        expected[step - 1] += f"  accuracy {100 * accuracy:.1f} %"
    assert len(lines) == 4
    for line, beginning in zip(lines[:3], expected, strict=True):
        assert line.startswith(f"{beginning}  {kilobytes:.1f} kB up  ") and line.endswith(" s  refused: client 2")
    assert lines[3].startswith("3 rounds  ")
    # Callbacks and trackers get everything.
    assert {"bytes_down", "seconds_synchronise", "refused_clients"} <= user.seen[0].keys()
    assert "eval_macro_f1" in user.seen[2] and "train_runtime" in user.seen[-1]
    assert ("Rounds" in told.err) == (not disable_tqdm)
    trainer.evaluate(tiny_rows(20, seed=3), metric_key_prefix="test")
    told = capsys.readouterr().out.strip()
    assert told.startswith("test  loss ") if disable_tqdm else told == ""


def test_evaluations_of_several_sets_and_before_the_first_round_have_lines_too(tmp_path, capsys):
    data = tiny_federation()
    args = tiny_args(
        tmp_path, rounds=2, logging_strategy="no", eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    sets = {"north": data.validation, "south": tiny_rows(10, seed=5)}
    FederatedTrainer(tiny_expert(), args, data, eval_dataset=sets).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["round 0/2", "round 1/2", "round 2/2", "2 rounds"]
    assert all(line.count(" accuracy ") == 2 and "north" in line and "south" in line for line in lines[:3])


@pytest.mark.parametrize(
    ("disable_tqdm", "removed", "own"),
    [(True, PrinterCallback, RoundPrinter), (False, ProgressCallback, RoundProgress)],
)
def test_lines_are_removed_as_those_of_transformers_are(disable_tqdm, removed, own, tmp_path, capsys):
    args = tiny_args(tmp_path, rounds=1, disable_tqdm=disable_tqdm)
    trainer = FederatedTrainer(tiny_expert(), args, tiny_federation())
    assert [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, RoundLines)] == [own]
    trainer.remove_callback(removed)
    trainer.train()
    assert capsys.readouterr().out == ""


def test_experts_that_are_fine_tuned_at_the_end_are_seen_and_count(tmp_path, capsys, monkeypatch):
    """A bar and a line for each, and their seconds are in those of the run."""
    monkeypatch.setattr(Watch, "seconds", 0.0)
    args = tiny_args(tmp_path, rounds=1, disable_tqdm=False, final_expert_epochs=2)
    trainer = FedMoETrainer(tiny_mixture(), args, train_dataset=tiny_federation())
    finish, seconds = trainer.strategy.finish, []

    def slow(*arguments):
        started = time.time()
        time.sleep(0.5)
        finish(*arguments)
        seconds.append(time.time() - started)

    trainer.strategy.finish = slow
    started = time.time()
    output = trainer.train()
    whole = time.time() - started
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].startswith("round 1/1")
    assert [line.split("  ")[0] for line in lines[1:-1]] == [f"Fine-tuning expert {s}/3" for s in (1, 2, 3)]
    assert "Fine-tuning expert 2/3" in told.err and "Training the gate" in told.err
    rounds = sum(trainer.rounds[0].seconds.values())
    assert seconds[0] + rounds <= output.metrics["train_runtime"] <= whole
    speed = trainer.rounds[0].num_examples / output.metrics["train_runtime"]
    assert output.metrics["train_samples_per_second"] == pytest.approx(speed, rel=1e-3)


def test_the_last_step_is_that_of_the_best_model(tmp_path):
    """And is taken once, before callbacks hear of the end."""

    class AddsOne(FedAvg):
        def finish(self, server, step):
            server.bank_SP += 1

    class Last(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.weight = model.classifier.weight.detach().clone()

    steps = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", metric_for_best_model="eval_loss")
    # The largest loss: not that of the last round, whose model is in memory.
    args = tiny_args(tmp_path, load_best_model_at_end=True, greater_is_better=True, **steps)
    last = Last()
    trainer = FederatedTrainer(tiny_expert(), args, tiny_federation(), AddsOne(), callbacks=[last])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_global_step == losses.index(max(losses)) + 1 < 3
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(trainer.model.classifier.weight, best.classifier.weight + 1)
    assert torch.equal(last.weight, trainer.model.classifier.weight)
