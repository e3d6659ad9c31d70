"""Forecasts of rehearsals, by a clock that goes on by a second with each local step and by seven with each probe."""

import gc
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_fedmoe.experiments import ImageExperiment, make_trainer, parse_settings, rehearsal
from hf_fedmoe.experiments.process_memory import peak_bytes
from hf_fedmoe.experiments.rehearsal import Forecast, rehearse, steps_of_clients, times
from hf_fedmoe.federation import LocalTrainer, Participants
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import assert_equal_states, state


SETTINGS = {
    "dataset": ["digits"],
    "model": ["small_cnn"],
    "model_config": {"channels": [2], "kernel_size": 3, "padding": 1, "hidden_size": 8},
    "image_size": 8,
    "partition": "dirichlet",
    "dirichlet_alpha": 1.0,
    "num_clients": 6,
    "clients_per_round": 2,
    "reserved_size": 60,
    "validation_size": 50,
    "max_test_examples": 100,
    "rounds": 5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


def made(tmp_path, **changes):
    experiment, args = parse_settings(ImageExperiment, {**SETTINGS, "output_dir": str(tmp_path / "run"), **changes})
    processor = experiment.load_processor()
    return experiment, args, experiment.load_data(processor, args.seed)[1], processor


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    step = LocalTrainer.step

    def counted(local, batches, loss):
        now.seconds += 1
        return step(local, batches, loss)

    def probed(self, reply, row_P):
        now.seconds += 7
        probe(self, reply, row_P)

    probe = Participants.probe
    monkeypatch.setattr(LocalTrainer, "step", counted)
    monkeypatch.setattr(Participants, "probe", probed)
    for module in ("round", "client_clock"):
        monkeypatch.setattr(f"hf_fedmoe.federation.{module}.time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.mark.parametrize("method", ["fedavg", "fedmoe", "fedavg_plus", "apfl"])
def test_clients_take_as_long_as_their_steps(method, tmp_path, clock):
    experiment, args, data, processor = made(tmp_path)
    steps = [3 * -(-size // 4) for size in data.client_sizes.tolist()]
    assert steps_of_clients(method, args, data) == steps and min(steps) < max(steps)
    found = rehearse(method, experiment, args, data, processor)
    # Two clients a round, each with the mean of all steps. What comes once a client does not grow with them.
    assert found.clients == pytest.approx(2 * sum(steps) / 6 + 2 * 7)
    assert (found.rounds, found.evaluations, found.checkpoints) == (5, 3, 3)
    assert found.server == 0.0
    # Far fewer than a round has: seven rows of four at each of two clients, thrice, in two rounds.
    assert clock.seconds <= 2 * 2 * (3 * 7 + 7)


def test_trained_alone_the_reserved_set_is_a_client_as_large_as_the_others(tmp_path, clock):
    experiment, args, data, processor = made(tmp_path)
    (steps,) = steps_of_clients("reserved_only", args, data)
    assert steps == pytest.approx(3 * data.client_sizes.mean() / 4, rel=0.1)
    assert rehearse("reserved_only", experiment, args, data, processor).clients == pytest.approx(steps + 7)


@pytest.mark.parametrize("method", ["fedavg", "fedmoe"])
def test_the_disk_is_that_of_the_run_and_the_run_is_as_without(method, tmp_path):
    # "after_round": each client that has taken part keeps a model.
    settings = {"preset": "paper", "num_routed_experts": 3, "num_clients": 3, "rounds": 4, "save_steps": 1}
    settings |= {"save_total_limit": None, "num_train_epochs": 1}
    experiment, args, data, processor = made(tmp_path, **settings)
    found = rehearse(method, experiment, args, data, processor)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
    trainer = make_trainer(method, experiment, args, data, processor)
    trainer.train()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    # The state of a run grows by some lines in each round.
    assert found.disk_bytes == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)
    assert any("_clients" in path.parts for path in files) == (method == "fedmoe")
    assert found.process_bytes > 1e8 and found.free_bytes > 0 and found.device_bytes is None

    args.output_dir = str(tmp_path / "without")
    torch.manual_seed(77)
    other = make_trainer(method, experiment, args, data, processor)
    other.train()
    assert_equal_states(state(trainer.model), state(other.model))


def test_an_evaluation_and_what_comes_last_are_timed(tmp_path):
    experiment, args, data, processor = made(tmp_path, eval_strategy="no", save_strategy="no")
    block = bytearray(600_000_000)
    del block
    high = peak_bytes()
    found = rehearse("fedavg_tuned_at_end", experiment, args, data, processor)
    assert sys.platform != "linux" or found.process_bytes < high - 300_000_000  # without what came before
    assert (found.evaluations, found.evaluation, found.checkpoints, found.checkpoint) == (0, 0.0, 0, 0.0)
    assert found.last > 0 and found.disk_bytes == 0
    experiment, args, data, processor = made(tmp_path)
    found = rehearse("fedavg_tuned_at_end", experiment, args, data, processor)
    assert found.evaluation > 0 and found.checkpoint > 0
    # With as many seconds for twice as many test rows as an evaluation takes.
    assert found.last > 2 * found.evaluation


@pytest.mark.parametrize("logging", [{}, {"logging_strategy": "no"}, {"logging_steps": 3}])
def test_an_evaluation_has_its_own_seconds_whether_rounds_are_logged_or_not(logging, tmp_path, clock, monkeypatch):
    evaluate = FederatedTrainer.evaluate

    def timed(*args, **kwargs):
        clock.seconds += 3
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(FederatedTrainer, "evaluate", timed)
    experiment, args, data, processor = made(tmp_path, eval_on_start=True, **logging)
    found = rehearse("fedavg", experiment, args, data, processor)
    assert (found.evaluation, found.evaluations, found.checkpoint) == (3.0, 4, 0.0)
    assert found.last == pytest.approx(3.0 * 100 / 50)


@pytest.mark.slow
def test_all_who_take_part_are_counted(tmp_path, clock):
    """Two are drawn, and FedJETs has the anchors of its four experts take part besides."""
    experiment, args, data, processor = made(tmp_path, num_routed_experts=4, eval_strategy="no", save_strategy="no")
    found = rehearse("fedjets", experiment, args, data, processor)
    trainer = make_trainer("fedjets", experiment, args, data, processor)
    trainer.train()
    took = sum(report.seconds["clients"] for report in trainer.rounds) / len(trainer.rounds)
    assert all(len(report.clients) >= 4 for report in trainer.rounds)
    assert found.clients == pytest.approx(took, rel=0.3)


def test_steps_that_gather_batches_are_of_more_rows(tmp_path):
    _, args = parse_settings(
        ImageExperiment, {**SETTINGS, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path)}
    )
    # Seven steps in each of three epochs; of ten epochs and more at least two.
    assert rehearsal._rows(args) == 7 * 2 * 4
    args.num_train_epochs = 30
    assert rehearsal._rows(args) == 2 * 2 * 4


def test_a_rehearsal_reports_to_nobody_and_chooses_no_model(tmp_path):
    settings = {**SETTINGS, "save_steps": 2, "load_best_model_at_end": True, "eval_delay": 3, "eval_on_start": True}
    _, args = parse_settings(ImageExperiment, {**settings, "output_dir": str(tmp_path)})
    args.report_to, args.push_to_hub = ["tensorboard"], True
    short = rehearsal._short_arguments(args, tmp_path / "short")
    assert (short.report_to, short.push_to_hub, short.load_best_model_at_end) == ([], False, False)
    assert (short.eval_on_start, short.eval_delay, short.rounds, short.client_choice) == (False, 0, 2, "uniform")
    assert (args.report_to, args.push_to_hub, args.rounds) == (["tensorboard"], True, 5)


def test_the_best_models_are_as_many_as_evaluations_at_most(tmp_path):
    changes = {"save_strategy": "best", "metric_for_best_model": "loss", "num_train_epochs": 0.1}
    found = rehearse("fedavg", *made(tmp_path, **changes))
    assert (found.evaluations, found.checkpoints) == (3, 3)


CLIENTS = {"noise_multiplier": 0.5, "clipping_norm": 1.0, "delta": 1e-3}
EXAMPLES = {"example_clipping_norm": 1.0, "example_delta": 1e-3}


@pytest.mark.parametrize(
    ("settings", "of_round"),
    [
        # Of six clients, one in each round on average; in these two rounds nobody is drawn.
        (CLIENTS | {"client_choice": "poisson", "clients_per_round": 1, "noise_source": "seed"}, 1),
        pytest.param(CLIENTS | {"client_choice": "poisson", "privacy_accountant": "pld"}, 2, marks=pytest.mark.slow),
        ({"target_epsilon": 40.0, "clipping_norm": 1.0, "clipping_quantile": 0.5, "delta": 1e-3}, 2),
        # A budget that is enough for five rounds of all rows, and for none of few.
        (EXAMPLES | {"example_noise_multiplier": 1.2, "example_target_epsilon": 6.0}, 2),
        pytest.param(EXAMPLES | {"example_target_epsilon": 6.0}, 2, marks=pytest.mark.slow),
    ],
)
def test_private_runs_have_a_forecast(settings, of_round, tmp_path, clock):
    changes = {"client_draw_seed": 2, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    experiment, args, data, processor = made(tmp_path, **changes, **settings)
    before = args.to_dict()
    found = rehearse("fedavg", experiment, args, data, processor)
    mean = sum(steps_of_clients("fedavg", args, data)) / 6
    assert found.clients == pytest.approx(of_round * (mean + 7), rel=0.1)
    assert args.to_dict() == before


def test_fewer_epochs_are_of_more_rows(tmp_path, clock):
    experiment, args, data, processor = made(tmp_path, num_train_epochs=0.2, per_device_train_batch_size=1)
    rehearse("fedavg", experiment, args, data, processor)
    # Twenty steps of each of two clients in each of two rounds.
    assert clock.seconds == pytest.approx(2 * 2 * (20 + 7), rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"save_total_limit": 1},
        pytest.param({"save_total_limit": 2}, marks=pytest.mark.slow),
        pytest.param({"save_total_limit": None}, marks=pytest.mark.slow),
        {"save_steps": 3},
        pytest.param({"save_only_model": True}, marks=pytest.mark.slow),
        {
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "eval_steps": 1,
            "greater_is_better": True,
        },
    ],
)
def test_the_disk_has_room_for_what_is_there_before_old_files_are_deleted(settings, tmp_path, monkeypatch):
    # Every client keeps a model of its own, and these are as large as the checkpoint.
    changes = {"preset": "paper", "num_routed_experts": 1, "rounds": 6, "save_steps": 1, "num_train_epochs": 0.1}
    experiment, args, data, processor = made(tmp_path, num_clients=3, **changes | settings)
    found = rehearse("fedmoe", experiment, args, data, processor)
    trainer = make_trainer("fedmoe", experiment, args, data, processor)
    most, rotate = [], FederatedTrainer._rotate

    def watched(self, newest):
        most.append(sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()))
        rotate(self, newest)

    monkeypatch.setattr(FederatedTrainer, "_rotate", watched)
    trainer.train()
    assert found.disk_bytes == pytest.approx(max(most), rel=0.15)


def test_the_rehearsal_gives_back_what_it_takes_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    found = rehearse("fedavg", *made(tmp_path, rounds=2, save_steps=1, save_total_limit=2))
    # Two checkpoints, as the run will have.
    assert found.free_bytes == pytest.approx(1000 + found.disk_bytes, rel=0.1)
    assert "are free" not in str(found)


def test_nothing_of_a_rehearsal_stays_in_memory(tmp_path):
    def trainers():
        return sum(isinstance(each, FederatedTrainer | LocalTrainer) for each in gc.get_objects())

    gc.collect()
    before, made_of = trainers(), made(tmp_path)
    rehearse("fedem", *made_of)
    assert trainers() == before


@pytest.mark.parametrize("where", ["client", "server"])
def test_what_does_not_fit_is_told_before_the_run(where, tmp_path, monkeypatch):
    def no_room(*anything, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2.00 GiB.")

    if where == "client":
        # Of a client it is a fault, with which the round would go on without it.
        monkeypatch.setattr(Participants, "task", no_room)
    else:
        monkeypatch.setattr(FederatedTrainer, "evaluate", no_room)
    experiment, args, data, processor = made(tmp_path)
    with pytest.raises(
        ValueError, match=r"'fedavg' does not fit .* take fewer .* memory\. Tried to allocate 2\.00 GiB\..*$"
    ):
        rehearse("fedavg", experiment, args, data, processor)
    assert not list((tmp_path / "run").glob("*"))


def test_one_client_without_room_is_enough(tmp_path, monkeypatch):
    task = Participants.task

    def no_room_for_the_first(self, client, *others):
        if client == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return task(self, client, *others)

    monkeypatch.setattr(Participants, "task", no_room_for_the_first)
    with pytest.raises(ValueError, match=r"'fedavg' does not fit into the GPU's memory"):
        rehearse("fedavg", *made(tmp_path, clients_per_round=6))


def test_other_faults_are_the_runs_own(tmp_path, monkeypatch):
    def broken(*anything, **named):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Participants, "task", broken)
    with pytest.raises(RuntimeError, match=r"No client of round 1 .*no such kernel"):
        rehearse("fedavg", *made(tmp_path))
    assert not list((tmp_path / "run").glob("*"))


FORECAST = Forecast(100, 60.0, 12.0, 30.0, 2.0, 20, 1, 100.0, None, 3_200_000_000, 142_000_000_000, 500_000_000_000)


def test_a_forecast_adds_up_and_says_what_a_run_needs():
    assert FORECAST.seconds == 100 * 72 + 20 * 30 + 2 + 100
    assert str(FORECAST) == (
        "about 2.2 hours: 100 rounds of 72 s (clients 60 s, server 12 s), 20 evaluations of 30 s, 1 checkpoint of "
        "2.0 s; 3.2 GB of memory, 142 GB on disk"
    )
    FORECAST.device_bytes, FORECAST.free_bytes = 23_200_000_000, 64_000_000_000
    assert str(FORECAST).endswith(
        "; 23 GB on the GPU, 3.2 GB of memory, 142 GB on disk, of which 64 GB are free: give another `output_dir`"
    )


@pytest.mark.parametrize(
    ("strategy", "every", "first", "count"),
    [
        ("no", 5, 0, 0),
        ("epoch", None, 0, 12),
        ("best", None, 0, 12),
        ("steps", 5, 0, 3),
        ("steps", 4, 0, 3),
        ("steps", 0.3, 0, 3),
        ("steps", 0, 0, 1),
        ("steps", 4, 5, 2),
        ("epoch", None, 11, 2),
        ("steps", 4, 13, 0),
    ],
)
def test_how_often_something_is_done(strategy, every, first, count):
    """Every four of twelve rounds; after the last one besides; a share is rounded up to whole rounds; not at first."""
    assert times(strategy, every, 12, first) == count


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_steps": 2, "eval_delay": 3, "save_steps": 0},
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        {"eval_steps": 0.3, "save_steps": 4},
    ],
)
def test_a_run_evaluates_and_saves_as_often_as_was_said(settings, tmp_path, monkeypatch):
    experiment, args, data, processor = made(tmp_path, num_train_epochs=0.1, save_total_limit=None, **settings)
    found = rehearse("fedavg", experiment, args, data, processor)
    trainer = make_trainer("fedavg", experiment, args, data, processor)
    trainer.train()
    done = sum("eval_loss" in entry for entry in trainer.state.log_history)
    assert (found.evaluations, found.checkpoints) == (done, len(list((tmp_path / "run").glob("checkpoint-*"))))
