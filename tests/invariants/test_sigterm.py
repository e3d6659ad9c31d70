"""SIGTERM to both processes of a launch, which is what clusters send: a checkpoint, and the bits of one process."""

import multiprocessing
import os
import signal
import socket

import torch
from transformers.trainer_utils import get_last_checkpoint

from hf_fedmoe.federation import LocalTrainer
from tests.every_method import trainer
from tests.tiny_federation import assert_equal_states, state, timeless
from tests.two_processes import PROCESSES, join_group


METHOD, SETTINGS = "fedmoe_paper", {"rounds": 5, "save_steps": 4}


def _terminated(index, port, output_dir):
    """Sends SIGTERM in the third round, while each process trains one of two clients."""
    join_group(index, port)
    train, calls = LocalTrainer.train, []

    def signalled(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, *arguments, **keywords)

    LocalTrainer.train = signalled
    trainer(METHOD, output_dir, **SETTINGS).train()


def test_both_processes_end_and_the_last_round_is_saved(tmp_path):
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_terminated, args=(index, port, tmp_path / "run")) for index in range(PROCESSES)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
        assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * PROCESSES
    finally:
        for process in processes:
            process.kill()
    assert get_last_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint-2")
    resumed, whole = (trainer(METHOD, tmp_path / name, **SETTINGS) for name in ("run", "whole"))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
