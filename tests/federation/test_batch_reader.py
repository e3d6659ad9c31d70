"""Batches of clients from worker processes."""

import os
import time
from types import SimpleNamespace

import pytest
import torch

from hf_fedmoe.data import AUGMENTATIONS, ImageCollator
from hf_fedmoe.federation import BatchReader
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import image_model, trainer
from tests.tiny_federation import assert_equal_states, tiny_args
from tests.tiny_images import tiny_image_federation, tiny_processor


class Noisy:
    """
    A collator that augments, and writes down what it has read if there is a `log`. A row cannot be read, and one ends
    the process that tries.
    """

    broken, deadly = 90, 91

    def __init__(self, log=None):
        self.log = log

    def __call__(self, rows):
        if self.log is not None:
            with self.log.open("a") as file:
                print(rows, file=file)
        if self.deadly in rows:
            os._exit(1)
        if self.broken in rows:
            raise OSError("bad sector")
        return {"rows": torch.tensor(rows), "noise": torch.rand(len(rows))}


def reader(num_workers=2, log=None):
    args = SimpleNamespace(
        dataloader_num_workers=num_workers,
        dataloader_prefetch_factor=None,
        dataloader_pin_memory=False,
        device=torch.device("cpu"),
    )
    return BatchReader(list(range(100)), Noisy(log), args)


FIRST, SECOND, THIRD = ([(10 * client + index, [10 * client + index, 7]) for index in range(3)] for client in range(3))


def rows_of(batches):
    return [batch["rows"].tolist() for batch in batches]


def rows_in(wanted):
    return [rows for _, rows in wanted]


def test_passes_come_as_expected_and_others_when_they_are_asked_for():
    batches = reader()
    batches.expect([FIRST, SECOND, THIRD])
    assert rows_of(batches.read(FIRST)) == rows_in(FIRST)
    next(batches.read(SECOND))  # and no more of it: the client failed
    assert rows_of(batches.read(THIRD)) == rows_in(THIRD)
    assert rows_of(batches.read(FIRST)) == rows_in(FIRST)
    batches.expect([FIRST, SECOND, THIRD])
    assert rows_of(batches.read(THIRD)) == rows_in(THIRD)


def test_the_next_client_is_read_while_this_one_trains(tmp_path):
    log = tmp_path / "log"
    batches = reader(num_workers=1, log=log)
    batches.expect([FIRST, SECOND, THIRD])
    list(batches.read(FIRST))
    deadline = time.monotonic() + 60
    while str(rows_in(SECOND)[1]) not in log.read_text():  # a worker is two batches ahead
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_random_follows_from_the_batch_alone():
    state = torch.get_rng_state()
    many, one = reader(num_workers=2), reader(num_workers=1)
    many.expect([FIRST, SECOND])
    in_turn = [torch.cat([batch["noise"] for batch in many.read(wanted)]) for wanted in (FIRST, SECOND)]
    alone = torch.cat([batch["noise"] for batch in one.read(SECOND)])
    assert torch.equal(in_turn[1], alone)
    assert not torch.equal(in_turn[0], alone)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's


def test_a_failure_is_that_of_its_own_client():
    batches = reader()
    lost = [(1, [5]), (2, [Noisy.broken])]
    batches.expect([lost, FIRST])
    with pytest.raises(OSError, match="bad sector"):
        list(batches.read(lost))
    assert rows_of(batches.read(FIRST)) == rows_in(FIRST)
    # Of a client that is left before that row, none at all.
    batches.expect([lost, SECOND])
    next(batches.read(lost))
    assert rows_of(batches.read(SECOND)) == rows_in(SECOND)


def test_workers_that_die_are_replaced():
    batches = reader()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(batches.read([(1, [5]), (2, [Noisy.deadly])]))
    assert rows_of(batches.read(FIRST)) == rows_in(FIRST)


def test_a_second_pass_ends_the_first():
    batches = reader()
    first = batches.read(FIRST)
    next(first)
    next(batches.read(SECOND))
    with pytest.raises(RuntimeError, match="Two passes over clients' batches at once"):
        next(first)


# Some that train from what was read ahead, and those with loops, batches or models of their own.
@pytest.mark.parametrize("name", ["fedavg", "fedmoe", "apfl", "fedem", "fedrolex"])
def test_a_run_ends_with_the_bits_of_one_that_reads_itself(name, tmp_path):
    settings = {"rounds": 2, "clients_per_round": 2, "save_strategy": "no", "eval_strategy": "no"}
    runs = [trainer(name, tmp_path / str(workers), **settings, dataloader_num_workers=workers) for workers in (0, 2)]
    for run in runs:
        run.train()
        assert not any(report.refused for report in run.rounds)
    assert_equal_states(*(run.model.state_dict() for run in runs))


def augmented(folder, workers, **changes):
    return FederatedTrainer(
        image_model("fedavg"),
        tiny_args(folder, rounds=2, save_strategy="steps", dataloader_num_workers=workers, **changes),
        tiny_image_federation(),
        processing_class=tiny_processor(),
        train_data_collator=ImageCollator(tiny_processor(), AUGMENTATIONS["photographs"]),
    )


def test_augmentation_is_the_same_for_any_number_of_workers_and_after_a_resume(tmp_path):
    one, two = augmented(tmp_path / "1", 1), augmented(tmp_path / "2", 2)
    one.train()
    two.train()
    assert_equal_states(one.model.state_dict(), two.model.state_dict())
    resumed = augmented(tmp_path / "1", 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-1"))
    assert_equal_states(one.model.state_dict(), resumed.model.state_dict())
