"""Forecasts of rehearsals, by a clock that goes on by a second with each local step and by seven with each probe."""

from types import SimpleNamespace

import pytest
import torch

from hf_fedmoe.experiments import ImageExperiment, make_trainer, parse_settings
from hf_fedmoe.experiments.rehearsal import Forecast, _times, rehearse, steps_of_clients
from hf_fedmoe.federation import LocalTrainer, Participants
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
    found = rehearse("fedavg_tuned_at_end", experiment, args, data, processor)
    assert (found.evaluations, found.evaluation, found.checkpoints, found.checkpoint) == (0, 0.0, 0, 0.0)
    assert found.last > 0 and found.disk_bytes == 0
    experiment, args, data, processor = made(tmp_path)
    found = rehearse("fedavg_tuned_at_end", experiment, args, data, processor)
    assert found.evaluation > 0 and found.checkpoint > 0
    # With as many seconds for twice as many test rows as an evaluation takes.
    assert found.last > 2 * found.evaluation


def test_what_does_not_fit_is_told_before_the_run(tmp_path, monkeypatch):
    experiment, args, data, processor = made(tmp_path)

    def no_room(*anything):
        raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Participants, "train", no_room)
    with pytest.raises(
        ValueError, match=r"'fedavg' does not fit .* take fewer .* memory\. Tried to allocate 2\.00 GiB\.$"
    ):
        rehearse("fedavg", experiment, args, data, processor)
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
    ("strategy", "every", "times"),
    [("no", 5, 0), ("epoch", None, 12), ("best", None, 12), ("steps", 5, 3), ("steps", 4, 3), ("steps", 0.3, 3)],
)
def test_how_often_something_is_done(strategy, every, times):
    """Every four of twelve rounds; after the last one besides; a share is rounded up to whole rounds."""
    assert _times(strategy, every, 12) == times
