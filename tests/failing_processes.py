"""Runs in which something goes wrong in one of two processes."""

import functools

import torch
from transformers import TrainerCallback, default_data_collator

from hf_fedmoe.strategies import FedAvg, FedMoE
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.weights import Payload
from tests.every_method import trainer
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation, tiny_mixture
from tests.two_processes import PROCESSES, index_of_this_process


# Of three clients one process trains two; the 20 validation rows fill no batch of 8.
SETTINGS = {"clients_per_round": 3}


class BrokenServer(FedAvg):
    def update(self, server, uploads, step):
        raise MemoryError("no room")


def broken_server(output_dir):
    FederatedTrainer(tiny_expert(), tiny_args(output_dir, **SETTINGS), tiny_federation(), BrokenServer()).train()


class BrokenProbe(FedMoE):
    def probe(self, server, row_P, reserved):
        if index_of_this_process():
            raise MemoryError("no room")
        return super().probe(server, row_P, reserved)


def broken_probe(output_dir):
    FederatedTrainer(tiny_mixture(), tiny_args(output_dir, **SETTINGS), tiny_federation(), BrokenProbe()).train()


class UnsoundServer(FedAvg):
    def update(self, server, uploads, step):
        super().update(server, uploads, step)
        server.bank_SP[0, 0] = float("nan")
        return {}


def unsound_server(output_dir):
    FederatedTrainer(tiny_expert(), tiny_args(output_dir, **SETTINGS), tiny_federation(), UnsoundServer()).train()


class UnsoundEnd(FedAvg):
    def finish(self, server, step):
        server.tensors["best"] = torch.tensor(float("inf"))


def unsound_end(output_dir):
    FederatedTrainer(tiny_expert(), tiny_args(output_dir, rounds=1), tiny_federation(), UnsoundEnd()).train()


class UnwrittenRow(FedAvg):
    """Gives that of the client that the second process trains."""

    def train_client(self, local, task):
        if index_of_this_process() == 0:
            return super().train_client(local, task)
        return Payload(task.out_P, {}, 1, {"loss": 1.0}), {}


def unwritten_row(output_dir):
    FederatedTrainer(tiny_expert(), tiny_args(output_dir, **SETTINGS), tiny_federation(), UnwrittenRow()).train()


def work_that_breaks_in(step, index):
    if index_of_this_process() == index:
        raise MemoryError("no room")
    return {}


class BrokenShare(FedAvg):
    def __init__(self, index):
        self.index = index

    def update(self, server, uploads, step):
        step.share(work_that_breaks_in, [self.index, self.index])
        raise OSError("not raised before")


def broken_share(index, output_dir):
    args = tiny_args(output_dir, **SETTINGS)
    FederatedTrainer(tiny_expert(), args, tiny_federation(), BrokenShare(index)).train()


def other_data(output_dir):
    data = tiny_federation(seed=index_of_this_process())
    FederatedTrainer(tiny_expert(), tiny_args(output_dir, **SETTINGS), data).train()


def full_disk(output_dir):
    run = trainer("fedavg", output_dir, **SETTINGS)
    if index_of_this_process() == 0:
        run.model.save_pretrained = functools.partial(_raise, OSError("no space left"))
    run.train()


def _raise(error, *args, **kwargs):
    raise error


def broken_collator(output_dir):
    run = trainer("fedavg", output_dir, **SETTINGS)
    # One collator, as far as the processes can compare, but the second one's disk is bad.
    run.train_data_collator = _collate_on_a_good_disk
    run.train()


def _collate_on_a_good_disk(rows):
    if index_of_this_process():
        raise OSError("bad sector")
    return default_data_collator(rows)


def no_place_for_kept(output_dir):
    class ReadOnly(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            if index_of_this_process():
                run._active_federation.store.put = functools.partial(_raise, OSError("read-only"))

    run = trainer("local", output_dir, **SETTINGS)
    run.add_callback(ReadOnly())
    run.train()


ERRORS = {
    "no_place_for_kept": no_place_for_kept,
    "broken_server": broken_server,
    "broken_probe": broken_probe,
    "unsound_server": unsound_server,
    "unsound_end": unsound_end,
    "unwritten_row": unwritten_row,
    "broken_share_of_the_main": functools.partial(broken_share, 0),
    "broken_share_of_another": functools.partial(broken_share, 1),
    "broken_after_sharing": functools.partial(broken_share, PROCESSES),
    "other_data": other_data,
    "broken_collator": broken_collator,
    "full_disk": full_disk,
}
