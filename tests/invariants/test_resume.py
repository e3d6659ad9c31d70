"""A run that was stopped and resumed ends with the bits of one that was not."""

import json
import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_fedmoe.training.resuming import CLIENTS_FOLDER, choose_checkpoint
from tests.every_method import LORA_RUNS, PERSONAL_RUNS, RUNS, trainer
from tests.tiny_federation import assert_equal_states, state, timeless, tiny_rows


@pytest.mark.parametrize("name", [*RUNS, *LORA_RUNS])
def test_resumed_run_equals_uninterrupted_run_bitwise(name, tmp_path):
    """Goes on from what is on the disk after two of three rounds; those of the third have taken part before."""

    class Copy(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                shutil.copytree(args.output_dir, tmp_path / "resumed")

    whole = trainer(name, tmp_path / "whole", rounds=3)
    whole.add_callback(Copy())
    whole.train()
    resumed = trainer(name, tmp_path / "resumed", rounds=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    took_part = [set(record.clients) for record in whole.rounds]
    assert took_part[2] <= took_part[0] | took_part[1]
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
    if name in PERSONAL_RUNS:
        states = [[state(model) for model in personal_models(run)] for run in (resumed, whole)]
        for mine, theirs in zip(*states, strict=True):
            assert_equal_states(mine, theirs)
        assert resumed.evaluate_clients() == whole.evaluate_clients()
        newcomer = tiny_rows(10, seed=5)
        assert_equal_states(state(resumed.personalize(newcomer)), state(whole.personalize(newcomer)))


def personal_models(run):
    """Each in its turn: they may live in one worker."""
    federation = run._federation_of_the_last_round()
    return (federation.personal_model(client) for client in range(federation.num_clients))


ROUNDS_TO_BE_KILLED_IN = 1000


def _run_until_killed(name, output_dir):
    torch.set_num_threads(1)
    run = trainer(name, output_dir, rounds=ROUNDS_TO_BE_KILLED_IN)
    run.train(resume_from_checkpoint=get_last_checkpoint(str(output_dir)))


@pytest.mark.parametrize(
    "kills", [pytest.param(6, id="some"), pytest.param(100, id="hundred", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["fedmoe", "fedmoe_paper"])
def test_killed_at_random_moments_ends_with_the_same_bits(name, kills, tmp_path):
    torch.set_num_threads(1)
    output_dir, rng, context = tmp_path / "killed", random.Random(3), multiprocessing.get_context("fork")
    output_dir.mkdir()
    for kill in range(kills):
        before = get_last_checkpoint(str(output_dir))
        process = context.Process(target=_run_until_killed, args=(name, output_dir))
        process.start()
        # Every other run dies at any moment of its start or first rounds, the others some time after a checkpoint.
        if kill % 2:
            deadline = time.monotonic() + 60
            while get_last_checkpoint(str(output_dir)) == before:
                assert process.is_alive() and time.monotonic() < deadline
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    reached = int(get_last_checkpoint(str(output_dir)).split("-")[-1])
    assert reached >= kills // 2
    whole, resumed = (trainer(name, folder, rounds=reached + 2) for folder in (tmp_path / "whole", output_dir))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
    # Of what the kills left, nothing is there any more but whole checkpoints and what they name.
    checkpoints = {path.name for path in output_dir.glob("checkpoint-*")}
    kept = {CLIENTS_FOLDER} if name == "fedmoe_paper" else set()
    assert {path.name for path in output_dir.iterdir()} == checkpoints | kept
    assert {f"checkpoint-{reached + more}" for more in (1, 2)} <= checkpoints
    for checkpoint in checkpoints:
        choose_checkpoint(output_dir / checkpoint, output_dir)  # which compares all files
    assert {path.name for path in (output_dir / CLIENTS_FOLDER).glob("*")} == named_files(output_dir)
    assert bool(named_files(output_dir)) == bool(kept)


def named_files(run_dir):
    """The client files that the checkpoints of a run name."""
    manifests = [json.loads(path.read_text()) for path in run_dir.glob("checkpoint-*/manifest.json")]
    return {name for manifest in manifests for name in manifest["clients"]}
