"""SIGTERM, which clusters send some time before they kill: the run ends with a checkpoint of its last round."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from hf_fedmoe.federation import Federation, LocalTrainer
from hf_fedmoe.strategies import FedMoE
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.termination import SigtermWatch, TerminatedError
from tests.every_method import trainer
from tests.tiny_federation import assert_equal_states, state, timeless


METHOD = "fedmoe_paper"  # whose clients keep what they have learned
SETTINGS = {"rounds": 6, "save_steps": 4}


def in_a_process(work, *arguments):
    """The exit code of `work(*arguments)` in a process of its own, which SIGTERM may end."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(120)
    assert not process.is_alive() or process.kill()
    return process.exitcode


def _before(owner, method, moment):
    """Sends SIGTERM to this process when `owner.method` is called for the `moment`-th time."""
    original, calls = vars(owner)[method], []

    def signalled(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return original(self, *arguments, **keywords)

    setattr(owner, method, signalled)


def _terminated(output_dir, owner, method, moment, changes):
    torch.set_num_threads(1)
    run = trainer(METHOD, output_dir, **SETTINGS | changes)
    _before(owner, method, moment)
    run.train()
    os._exit(0)


# Of two clients in a round: where SIGTERM comes, and the round whose checkpoint there is then.
MOMENTS = {
    "in the second round's first client": (LocalTrainer, "train", 3, 1),
    "in the third round's second client": (LocalTrainer, "train", 6, 2),
    "in the server's step of the third round": (FedMoE, "update", 3, 3),
    "in the evaluation after the third round": (FederatedTrainer, "evaluate", 3, 3),
    "while the fourth round is saved": (FederatedTrainer, "_write_checkpoint", 1, 4),
    "in the fifth round's first client": (LocalTrainer, "train", 9, 4),
}


def _ended_after_a_round(output_dir, number):
    """Sends SIGTERM to this process when a round has ended, before it is counted."""
    torch.set_num_threads(1)
    run, original = trainer(METHOD, output_dir, **SETTINGS), Federation.run_round

    def signalled(self, round_index, *arguments):
        report = original(self, round_index, *arguments)
        if round_index + 1 == number:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return report

    Federation.run_round = signalled
    run.train()
    os._exit(0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    run = trainer(METHOD, tmp_path_factory.mktemp("whole"), **SETTINGS)
    run.train()
    return run


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_last_round_is_saved_and_resumed_with_the_same_bits(moment, whole, tmp_path):
    owner, method, number, reached = MOMENTS[moment]
    owner = next(kind for kind in owner.__mro__ if method in vars(kind))
    assert in_a_process(_terminated, tmp_path, owner, method, number, {}) == 143
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{reached}")
    assert not list(tmp_path.glob("_tmp*")) + list(tmp_path.glob("_old*")) + list(tmp_path.glob("_lock"))
    resumed = trainer(METHOD, tmp_path, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]


def test_a_round_that_has_ended_counts(tmp_path, whole):
    assert in_a_process(_ended_after_a_round, tmp_path, 3) == 143
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
    resumed = trainer(METHOD, tmp_path, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))


@pytest.mark.parametrize(
    ("changes", "number"), [({"save_strategy": "no"}, 6), ({"save_only_model": True}, 6), ({}, 1)]
)
def test_nothing_is_saved_that_nobody_can_go_on_from(changes, number, tmp_path):
    assert in_a_process(_terminated, tmp_path, LocalTrainer, "train", number, changes) == 143
    assert not list(tmp_path.glob("checkpoint-*"))


def _train(output_dir):
    torch.set_num_threads(1)
    trainer(METHOD, output_dir, rounds=1000, save_steps=500).train()


def test_sigterm_from_outside(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_train, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("_clients/*")):  # a round has ended
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    reached = int(get_last_checkpoint(str(tmp_path)).split("-")[-1])
    whole = trainer(METHOD, tmp_path / "whole", rounds=reached + 1, save_steps=500)
    resumed = trainer(METHOD, tmp_path, rounds=reached + 1, save_steps=500)
    whole.train(), resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))


def test_the_handler_is_there_during_the_run_only():
    before = signal.getsignal(signal.SIGTERM)
    with SigtermWatch():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL


def test_a_request_breaks_off_what_may_be_broken_off_and_nothing_else():
    done = []
    with pytest.raises(SystemExit) as end, SigtermWatch() as watch:
        with watch.breakable(lambda: False):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("went on")
        assert watch.received
        with pytest.raises(TerminatedError):
            watch.end_if_received()
        with watch.breakable(lambda: True):
            done.append("never")
    assert end.value.code == 143 and done == ["went on"]
    assert isinstance(end.value.__cause__, TerminatedError)


def test_whoever_handles_sigterm_keeps_it(tmp_path):
    received = []
    for handler in (lambda number, frame: received.append(number), signal.SIG_IGN):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            with SigtermWatch() as watch:
                os.kill(os.getpid(), signal.SIGTERM)
                assert signal.getsignal(signal.SIGTERM) is handler and not watch.received
        finally:
            signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_in_another_thread_nothing_is_watched():
    seen = []

    def enter():
        with SigtermWatch():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_forked_process_is_ended_by_sigterm():
    begun, begin = os.pipe()
    with SigtermWatch() as watch:
        child = os.fork()
        if child == 0:
            os.write(begin, b".")  # Python forgets signals that come while it forks
            time.sleep(30)
            os._exit(0)
        os.read(begun, 1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert not watch.received
