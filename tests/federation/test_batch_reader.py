"""Batches of clients from worker processes."""

import multiprocessing
import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from hf_fedmoe.data import AUGMENTATIONS, ImageCollator
from hf_fedmoe.federation import BatchReader
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import image_model, trainer
from tests.tiny_federation import assert_equal_states, tiny_args, tiny_expert, tiny_federation
from tests.tiny_images import tiny_image_federation, tiny_processor


class CannotTravelError(Exception):
    """Made from two values, of which the pickled one has none."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second


class Noisy:
    """
    A collator that augments, and writes down what it has read if there is a `log`. A row cannot be read, one ends the
    process that tries, one keeps it for ever, and one fails in a way that cannot be told to another process.
    """

    broken, deadly, endless, strange = 90, 91, 92, 93

    def __init__(self, log=None):
        self.log = log

    def __call__(self, rows):
        if self.log is not None:
            with self.log.open("a") as file:
                print(os.getpid(), rows, file=file)
        if self.deadly in rows:
            os._exit(1)
        if self.endless in rows:
            time.sleep(600)
        if self.broken in rows:
            raise OSError("bad sector")
        if self.strange in rows:
            raise CannotTravelError(1, 2)
        noise = [*torch.rand(2).tolist(), random.random(), np.random.random()]
        return {"rows": torch.tensor(rows), "noise": torch.tensor(noise)}


class Large:
    """A collator whose tensors are as shared memory carries them, and of a dtype that numpy has not."""

    def __call__(self, rows):
        return {"large": torch.rand(len(rows), 2**19), "half": torch.rand(3).bfloat16()}


@pytest.fixture
def reader():
    readers = []

    def make(num_workers=2, log=None, collate=None):
        args = SimpleNamespace(dataloader_num_workers=num_workers, dataloader_prefetch_factor=None)
        readers.append(BatchReader(list(range(100)), collate or Noisy(log), args))
        return readers[-1]

    yield make
    for each in readers:
        each.close()
    assert multiprocessing.active_children() == []


FIRST, SECOND, THIRD = ([(10 * client + index, [10 * client + index, 7]) for index in range(3)] for client in range(3))
DEADLY = [(1, [5]), (2, [Noisy.deadly, 6])]


def rows_of(batches):
    return [batch["rows"].tolist() for batch in batches]


def noise_of(batches):
    return torch.cat([batch["noise"] for batch in batches])


def rows_in(wanted):
    return [rows for _, rows in wanted]


def wait_until(told):
    deadline = time.monotonic() + 60
    while not told():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_passes_come_as_expected_and_others_when_they_are_asked_for(reader):
    batches = reader()
    batches.expect([FIRST, SECOND, THIRD])
    assert rows_of(batches.read(FIRST)) == rows_in(FIRST)
    next(batches.read(SECOND))  # and no more of it: the client failed
    assert rows_of(batches.read(THIRD)) == rows_in(THIRD)
    assert rows_of(batches.read(FIRST)) == rows_in(FIRST)
    batches.expect([FIRST, SECOND, THIRD])
    assert rows_of(batches.read(THIRD)) == rows_in(THIRD)


def test_the_next_client_is_read_while_this_one_trains(reader, tmp_path):
    log = tmp_path / "log"
    batches = reader(num_workers=1, log=log)
    batches.expect([FIRST, SECOND, THIRD])
    list(batches.read(FIRST))
    # A worker is two batches ahead, and no more.
    wait_until(lambda: str(rows_in(SECOND)[1]) in log.read_text())
    time.sleep(0.1)
    assert len(log.read_text().splitlines()) == len(FIRST) + 2


def test_what_is_random_follows_from_the_batch_alone(reader):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    many, one = reader(num_workers=2), reader(num_workers=1)
    many.expect([FIRST, SECOND])
    in_turn = [noise_of(many.read(wanted)) for wanted in (FIRST, SECOND)]
    alone = noise_of(one.read(SECOND))
    assert torch.equal(in_turn[1], alone)
    assert not torch.isclose(in_turn[0], alone).any()
    # Those of this process, from which dropout is drawn, are as they were.
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_tensors_of_any_size_and_dtype_arrive(reader):
    (batch,) = reader(collate=Large()).read([(3, [1, 2])])
    torch.manual_seed(3)
    here = Large()([1, 2])
    assert all(torch.equal(batch[name], here[name]) for name in here)


def test_a_failure_is_that_of_its_own_client(reader):
    batches = reader()
    lost = [(1, [5]), (2, [Noisy.broken])]
    batches.expect([lost, FIRST])
    with pytest.raises(OSError) as caught:
        list(batches.read(lost))
    assert str(caught.value) == "bad sector"
    assert "test_batch_reader.py" in caught.value.__notes__[0]  # where in the worker
    assert rows_of(batches.read(FIRST)) == rows_in(FIRST)
    # Of a client that is left before that row, none at all.
    batches.expect([lost, SECOND])
    next(batches.read(lost))
    assert rows_of(batches.read(SECOND)) == rows_in(SECOND)
    with pytest.raises(RuntimeError, match=r"^CannotTravelError"):
        list(batches.read([(1, [Noisy.strange])]))
    assert len(multiprocessing.active_children()) == 2  # nobody died of it


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_that_die_take_nobody_elses_batches_with_them(num_workers, reader):
    batches, undisturbed = reader(num_workers), reader(1)
    batches.expect([FIRST, DEADLY, SECOND, DEADLY, THIRD])
    assert torch.equal(noise_of(batches.read(FIRST)), noise_of(undisturbed.read(FIRST)))
    deadly = batches.read(DEADLY)
    assert next(deadly)["rows"].tolist() == [5]
    message = "two worker processes died reading it, .* the second left with exit code 1: look at the rows 91, 6 of"
    with pytest.raises(RuntimeError, match=message):
        next(deadly)
    for wanted in (SECOND, THIRD):
        assert torch.equal(noise_of(batches.read(wanted)), noise_of(undisturbed.read(wanted)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_that_are_killed_once_are_replaced_and_nobody_hears_of_it(number, reader):
    batches, undisturbed = reader(), reader(1)
    batches.expect([FIRST, SECOND])
    first = batches.read(FIRST)
    read = [next(first)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    assert torch.equal(noise_of([*read, *first]), noise_of(undisturbed.read(FIRST)))
    assert torch.equal(noise_of(batches.read(SECOND)), noise_of(undisturbed.read(SECOND)))


def test_a_collator_that_ends_every_process_fails_and_does_not_hang(reader):
    batches = reader()
    deadly = [[(seed, [Noisy.deadly]), (seed, [Noisy.deadly])] for seed in range(3)]
    batches.expect(deadly)
    for wanted in deadly:
        with pytest.raises(RuntimeError, match="two worker processes died"):
            list(batches.read(wanted))


def test_a_worker_that_hangs_hangs_for_its_own_client_only(reader):
    batches = reader()
    endless, end = [(1, [5]), (2, [Noisy.endless])], time.monotonic() + 0.5

    def check():
        if time.monotonic() > end:
            raise TimeoutError("too long")

    batches.expect([FIRST, endless, SECOND, endless, THIRD])
    assert rows_of(batches.read(FIRST, check)) == rows_in(FIRST)
    with pytest.raises(TimeoutError, match="too long"):
        list(batches.read(endless, check))
    assert rows_of(batches.read(SECOND)) == rows_in(SECOND)
    next(batches.read(endless))  # which fails while it trains: nobody waits for the worker that hangs
    assert rows_of(batches.read(THIRD)) == rows_in(THIRD)
    assert time.monotonic() < end + 30


def test_a_second_pass_ends_the_first(reader):
    batches = reader()
    first = batches.read(FIRST)
    next(first)
    next(batches.read(SECOND))
    with pytest.raises(RuntimeError, match="Two passes over clients' batches at once"):
        next(first)


def test_workers_end_with_the_process_that_started_them(reader):
    told, tell = multiprocessing.Pipe(duplex=False)

    def start():
        batches = reader()
        next(batches.read([(1, [5]), (2, [Noisy.endless])]))
        tell.send([worker.pid for worker in multiprocessing.active_children()])
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    workers = told.recv()
    process.join()
    assert len(workers) == 2
    wait_until(lambda: not any(running(pid) for pid in workers))


def running(pid):
    """Tells whether a process is there, and not only as one that its parent has not heard of."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Some that train from what was read ahead, and those with loops, batches or models of their own.
@pytest.mark.parametrize("name", ["fedavg", "fedmoe", "apfl", "fedem", "fedrolex"])
def test_a_run_ends_with_the_bits_of_one_that_reads_itself(name, tmp_path):
    settings = {"rounds": 2, "clients_per_round": 2, "save_strategy": "no", "eval_strategy": "no"}
    runs = [trainer(name, tmp_path / str(workers), **settings, dataloader_num_workers=workers) for workers in (0, 2)]
    for run in runs:
        run.train()
        assert not any(report.refused for report in run.rounds)
        assert multiprocessing.active_children() == []
    assert_equal_states(*(run.model.state_dict() for run in runs))


class Guilty:
    """A collator of texts that ends a worker process, or raises in the main one, on the first example of a client."""

    def __init__(self, data, client):
        self.bad, self.main = data.client(client)[0]["input_ids"], os.getpid()

    def __call__(self, rows):
        if any(row["input_ids"] == self.bad for row in rows):
            if os.getpid() == self.main:
                raise OSError("bad sector")
            os.kill(os.getpid(), signal.SIGKILL)
        return default_data_collator(rows)


def test_a_client_whose_example_ends_workers_is_refused_alone_and_changes_no_bit(tmp_path):
    runs = []
    for workers in (0, 1, 2):
        data = tiny_federation()
        args = tiny_args(tmp_path / str(workers), rounds=2, clients_per_round=4, dataloader_num_workers=workers)
        runs.append(FederatedTrainer(tiny_expert(), args, data, train_data_collator=Guilty(data, 1)))
        runs[-1].train()
        assert [list(report.refused) for report in runs[-1].rounds] == [[1], [1]]
    assert runs[0].rounds[0].refused[1] == "OSError: bad sector"
    assert "ended by SIGKILL" in runs[1].rounds[0].refused[1]
    assert_equal_states(runs[0].model.state_dict(), runs[1].model.state_dict())
    assert_equal_states(runs[0].model.state_dict(), runs[2].model.state_dict())


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
