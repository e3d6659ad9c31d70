"""Clients that take longer than they may."""

import itertools
import signal
import threading
import time
from functools import wraps

import pytest
from transformers import BertForSequenceClassification, default_data_collator

from hf_fedmoe.federation import ClientClock
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import assert_equal_states, tiny_args, tiny_expert, tiny_federation


PATIENCE = 60.0


def hang():
    time.sleep(PATIENCE)
    raise AssertionError("nobody interrupted it")


def hang_in_python():
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        pass
    raise AssertionError("nobody interrupted it")


def try_again_and_again():
    """Whatever happens, as readers of files on a network do."""
    for attempt in range(3):
        try:
            hang()
        except BaseException:
            if attempt == 2:
                raise


@pytest.mark.parametrize("client", [hang, hang_in_python, try_again_and_again])
def test_a_client_whose_time_is_up_is_interrupted_at_whatever(client):
    clock, started = ClientClock(0.2), time.monotonic()
    with pytest.raises(TimeoutError, match=r"^took longer than `client_timeout` = 0\.2 s$"), clock.client():
        client()
    assert 0.2 <= time.monotonic() - started < PATIENCE / 2
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    clock.check()  # of the next one there is nothing to say


def test_clients_at_once_have_the_time_of_all():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"= 0\.1 s for each of 3 clients"), ClientClock(0.1).client(3):
        hang()
    assert time.monotonic() - started >= 0.3


def test_what_must_be_whole_is_not_interrupted():
    clock, done = ClientClock(0.1), []
    with pytest.raises(TimeoutError), clock.client():
        with clock.whole():
            with clock.whole():
                time.sleep(0.2)
            done.append("inner")
            time.sleep(1.2)  # it rings again
            done.append("outer")
        done.append("next")
    assert done == ["inner", "outer"]


def test_another_alarm_rings_when_it_should_have_or_after_the_client():
    rung = []
    former = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with ClientClock(30).client():
            time.sleep(0.3)
            assert not rung
        time.sleep(0.1)
        assert len(rung) == 1
        signal.setitimer(signal.ITIMER_REAL, 20, 7)
        with ClientClock(30).client():
            time.sleep(0.1)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 19 < left <= 19.9 and interval == 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_without_a_limit_nothing_is_touched():
    for seconds in (None, 0):
        clock = ClientClock(seconds)
        with clock.client():
            assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
            clock.check()


def test_in_another_thread_it_is_between_batches():
    clock, caught = ClientClock(0.1), []

    def client():
        with clock.client():
            while True:
                time.sleep(0.05)
                clock.check()

    def train():
        try:
            client()
        except TimeoutError as error:
            caught.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(PATIENCE)
    assert caught == ["took longer than `client_timeout` = 0.1 s"]


class Collator:
    """
    Does something to client 1 in its second batch: `where` it is, in the main process or in a worker.

    Args:
        data ([`FederatedDataset`]): The clients.
        fail (`Callable`): What it does.
    """

    def __init__(self, data, fail):
        self.bad = {tuple(row["input_ids"]) for row in data.client(1)}
        self.fail, self.batches = fail, 0

    def __call__(self, rows):
        if any(tuple(row["input_ids"]) in self.bad for row in rows):
            self.batches += 1
            if self.batches % 3 == 2:
                self.fail()
        return default_data_collator(rows)


def fail_at_once():
    raise OSError("bad sector")


def run(folder, fail, **changes):
    data = tiny_federation()
    args = tiny_args(folder, **{"rounds": 2, "clients_per_round": 4, "learning_rate": 1e-2} | changes)
    trainer = FederatedTrainer(tiny_expert(), args, data, train_data_collator=Collator(data, fail))
    trainer.train()
    return trainer


FAULT = "TimeoutError: took longer than `client_timeout` = 3 s"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataloader_num_workers": 1},
        {"dataloader_num_workers": 2},
        {"clients_at_once": 2, "lr_scheduler_type": "constant"},
    ],
    ids=str,
)
def test_a_collator_that_hangs_costs_its_client_its_place_and_nobody_a_bit(changes, tmp_path):
    # Round by round another batch of it would be the second: one round.
    hanging = run(tmp_path / "hangs", hang, rounds=1, client_timeout=3, **changes)
    assert hanging.rounds[0].refused == {1: FAULT}
    failing = run(tmp_path / "fails", fail_at_once, rounds=1, **changes)
    assert failing.rounds[0].refused == {1: "OSError: bad sector"}
    assert_equal_states(hanging.model.state_dict(), failing.model.state_dict())


def test_a_model_that_hangs_leaves_nothing_behind(tmp_path, monkeypatch):
    """In the middle of the second step, with gradients and an optimizer's state: the only client of a round."""
    calls, hangs_at = itertools.count(1), [4]
    forward = BertForSequenceClassification.forward

    @wraps(forward)
    def perhaps_hang(model, *args, **kwargs):
        if model.training and next(calls) in hangs_at:
            hang()
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", perhaps_hang)

    def federation(folder):
        args = tiny_args(folder, gradient_accumulation_steps=2, client_timeout=3)
        trainer = FederatedTrainer(tiny_expert(), args, tiny_federation(client_size=24))
        return trainer, trainer._federation()

    (_, late), (_, patient) = runs = federation(tmp_path / "late"), federation(tmp_path / "patient")
    with pytest.raises(RuntimeError, match=r"sent a sound model. client \d: TimeoutError: took longer"):
        late.run_round(0, 1)
    assert any(p.grad is not None for p in late.local_trainer.worker.parameters())
    assert late.local_trainer.optimizer.state  # of the step before
    hangs_at.clear()
    for each in (late, patient):
        each.run_round(0, 1)
        each.run_round(1, 1)
    assert_equal_states(*(trainer.model.state_dict() for trainer, _ in runs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_timeout": -1}, "`client_timeout` is -1: give seconds, or 0"),
        (
            {"client_timeout": 60, "client_parallelism": "data"},
            "`client_timeout` is 60, but with `client_parallelism`",
        ),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_args(tmp_path, **changes)
