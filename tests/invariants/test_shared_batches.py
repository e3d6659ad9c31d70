"""A run whose processes train each client together ends like that of one process, but for rounding."""

import functools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.strategies import FedAvg, FedMoE, FedMoESettings
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import METHODS, PERSONAL_RUNS, trainer
from tests.tiny_federation import assert_equal_states, tiny_args, tiny_expert, tiny_federation, tiny_gate
from tests.tiny_models import make_different
from tests.two_processes import (
    PROCESSES,
    assert_same,
    index_of_this_process,
    join_group,
    launch,
    record,
)


QUICK_METHODS = ("fedprox", "scaffold", "fedmoe", "fedem")
REST = ["lora"] + [name for name in METHODS if name not in (*QUICK_METHODS, "pfedmoe")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Of what Adam trains on the server: alpha's gradient is small, and Adam divides it by itself.
SERVER_TOLERANCE = {"rtol": 1e-4, "atol": 1e-3}


def settings(name):
    return {
        # 12 rows, or 8 where some are held out: the last batch has one, of which the second process gets none.
        "per_device_train_batch_size": 7 if name in PERSONAL_RUNS else 11,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "max_grad_norm": 0.5,
        # Some gradients are 0 but for rounding, which Adam would divide by itself.
        "adam_epsilon": 1e-3,
        "rounds": 2,
        "clients_per_round": 3,
        "client_parallelism": "data",
    }


def run_by_name(name, output_dir, **changes):
    if name == "lora":  # without the dropout of those in `LORA_RUNS`
        args = tiny_args(output_dir, **settings(name) | changes)
        run = FederatedTrainer(tiny_expert(), args, tiny_federation(), peft_config=LoraConfig(r=4))
    else:
        run = trainer(name, output_dir, **settings(name) | changes)
    run.train()
    return run


def shared_gate(kind, output_dir, **changes):
    """A gate that reads examples. Of the last batch of the reserved set, one row, the second process has none."""
    gate = {"gate": tiny_gate(2)} if kind == "model" else {"gate": "adapter", "peft_config": LoraConfig(r=4)}
    model = FedMoEForSequenceClassification.from_expert(tiny_expert(), num_routed_experts=2, **gate)
    # Alpha has no gradient but rounding while all experts are alike, and Adam would divide that by itself.
    for seed, expert in enumerate(model.experts):
        make_different(expert, 0.3, seed)
    rows = []

    def count(gate, _, output):
        rows.append(len(output.logits if kind == "model" else output) * gate.training)

    model.gate.register_forward_hook(count)
    stay_different = {"fusion_warmup": False, "fusion_rate": 0.2, "main_fusion_rate": 0.2}
    gate_settings = {"gate_batch_size": 7, "gate_epochs": 2, "balance_weight": 0.3, "server_iterations": 2}
    strategy = FedMoE(FedMoESettings(**stay_different, **gate_settings))
    args = tiny_args(output_dir, **settings("fedmoe") | changes)
    run = FederatedTrainer(model, args, tiny_federation(reserved_size=22), strategy)
    run.train()
    (output_dir / f"gate_rows-{index_of_this_process()}").write_text(str(sum(rows)))
    return run


# What goes wrong in one process


class BrokenRow:
    """The collator of a disk that cannot be read by one process, once it has given some batches."""

    def __init__(self, collate):
        self.collate, self.calls = collate, 0

    def __call__(self, rows):
        self.calls += 1
        if index_of_this_process() == 1 and self.calls in (2, 8):
            raise OSError("bad sector")
        return self.collate(rows)


def broken_row(output_dir):
    args = tiny_args(output_dir, clients_per_round=3, client_parallelism="data", rounds=2, optim="sgd")
    run = FederatedTrainer(tiny_expert(), args, tiny_federation())
    # Three batches of each client: the first client of the first round fails, and the third.
    run.train_data_collator = BrokenRow(run.train_data_collator)
    run.train()
    return run


class FailsSomewhere(FedAvg):
    """One process fails before, the other after a client's training."""

    shares_batches = True

    def train_client(self, local, task):
        if task.client == 0 and index_of_this_process() == 0:
            raise OSError("before")
        payload = super().train_client(local, task)
        if task.client == 1 and index_of_this_process() == 1:
            raise OSError("after")
        return payload


class ForgetsARow(FedAvg):
    """One process sends another row than it was given."""

    shares_batches = True

    def train_client(self, local, task):
        payload, kept = super().train_client(local, task)
        if index_of_this_process() == 1:
            payload.row_P = payload.row_P.clone()
        return payload, kept


class AddsNothingUp(FedAvg):
    """Each process takes its own steps on its share of the batches."""

    shares_batches = True

    def train_client(self, local, task):
        plan = local.plan(task.dataset, task.seed)
        local.begin(task.received_P, task.integers, len(plan))
        for batches in local.steps(task.dataset, plan, task.seed):
            for batch in batches:
                local.worker(**batch).loss.backward()
            local.apply_gradients()
        return local.payload(task.out_P, len(task.dataset), torch.tensor(1.0), len(plan)), {}


BROKEN = {"forgets_a_row": ForgetsARow, "adds_nothing_up": AddsNothingUp}


def broken_promise(name, output_dir):
    args = tiny_args(output_dir, clients_per_round=4, client_parallelism="data", rounds=1)
    with pytest.raises(RuntimeError) as error:
        FederatedTrainer(tiny_expert(), args, tiny_federation(), BROKEN[name]()).train()
    return str(error.value)


def fails_somewhere(output_dir):
    args = tiny_args(output_dir, clients_per_round=4, client_parallelism="data", rounds=1)
    run = FederatedTrainer(tiny_expert(), args, tiny_federation(), FailsSomewhere())
    run.train()
    return run


FAILING = {"broken_row": broken_row, "fails_somewhere": fails_somewhere}
GATES = {f"gate_{kind}": functools.partial(shared_gate, kind) for kind in ("model", "adapter")}


def process(index, port, folder, names):
    join_group(index, port)
    for name in names:
        if name in BROKEN:
            (folder / f"{name}-{index}.txt").write_text(broken_promise(name, folder / name))
        else:
            make = (FAILING | GATES).get(name) or functools.partial(run_by_name, name)
            record(make(folder / name), folder / f"{name}-{index}")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    launch(process, folder, [*QUICK_METHODS, *GATES, *FAILING, *BROKEN])
    return folder


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rest")
    launch(process, folder, REST)
    return folder


@pytest.mark.parametrize("name", [*QUICK_METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_shares_of_batches_end_like_one_process(name, request, tmp_path):
    folder = request.getfixturevalue("quick" if name in QUICK_METHODS else "rest")
    record(run_by_name(name, tmp_path / name, client_parallelism=None), tmp_path / "alone")
    assert_like_one_process(name, folder / name, tmp_path / "alone")


@pytest.mark.parametrize("name", GATES)
def test_a_gate_that_reads_examples_is_trained_by_all_processes(name, quick, tmp_path):
    record(GATES[name](tmp_path, client_parallelism=None), tmp_path / "alone")
    assert_same(*(quick / f"{name}-{index}" for index in range(PROCESSES)))
    # Adam divides small gradients by themselves; tests/strategies/test_gate_training.py is stricter.
    states = (load_file(quick / f"{name}-0.safetensors"), load_file(tmp_path / "alone.safetensors"))
    assert_equal_states(*states, rtol=1e-3, atol=1e-3)
    assert_equal_gate_reports(quick / f"{name}-0", tmp_path / "alone")
    # Batches of 7, 7, 7 and 1 rows, twice in each of two iterations of each of two rounds.
    assert (tmp_path / "gate_rows-0").read_text() == str(8 * 22)
    rows = [(quick / name / f"gate_rows-{index}").read_text() for index in range(PROCESSES)]
    assert rows == [str(8 * (4 + 4 + 4 + 1)), str(8 * (3 + 3 + 3 + 1))]


def assert_equal_gate_reports(*paths):
    rounds = [json.loads(Path(f"{path}.json").read_text())["rounds"] for path in paths]
    for name in ("gate_loss", "gate_grad_norm", "alpha"):
        found, expected = ([metrics[name] for _, _, metrics in reports] for reports in rounds)
        assert found == pytest.approx(expected, rel=1e-2) and expected[0] > 1e-3


def assert_like_one_process(name, folder, alone):
    """Both processes recorded the same beside `folder`, and what one process does but for rounding."""
    assert_same(*(f"{folder}-{index}" for index in range(PROCESSES)))
    found, expected = (load_file(f"{path}.safetensors") for path in (f"{folder}-0", alone))
    on_server = {tensor for tensor in found if name == "fedmoe" and tensor.startswith(("alpha_logit", "gate."))}
    for part, tolerance in ((found.keys() - on_server, TOLERANCE), (on_server, SERVER_TOLERANCE)):
        assert_equal_states(*({tensor: s[tensor] for tensor in part} for s in (found, expected)), **tolerance)
    logs = [json.loads(Path(f"{path}.json").read_text())["log"] for path in (f"{folder}-0", alone)]
    found, expected = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert len(found) > 1 and found == pytest.approx(expected, rel=1e-4)


def recorded_rounds(folder, name):
    both = [json.loads((folder / f"{name}-{index}.json").read_text()) for index in range(PROCESSES)]
    assert both[0]["rounds"] == both[1]["rounds"]
    assert_equal_states(*(load_file(folder / f"{name}-{index}.safetensors") for index in range(PROCESSES)))
    return both[0]["rounds"]


def test_rows_that_one_process_cannot_read_fail_their_client_in_all(quick):
    (clients, refused, _), (_, others, _) = recorded_rounds(quick, "broken_row")
    assert refused == {str(clients[0]): "OSError: bad sector", str(clients[2]): "OSError: bad sector"} and not others


def test_a_client_that_fails_in_one_process_before_or_after_its_training_fails_in_all(quick):
    ((_, refused, _),) = recorded_rounds(quick, "fails_somewhere")
    assert refused == {"0": "OSError: before", "1": "OSError: after"}


def test_a_promise_that_is_broken_in_one_process_ends_all(quick):
    main, other = ((quick / f"forgets_a_row-{index}.txt").read_text() for index in range(PROCESSES))
    assert other.startswith("The strategy 'fedavg' (ForgetsARow)") and "sends another row than `task.out_P`" in other
    assert main == f"Process 1 failed: BrokenPromiseError: {other}"


def test_clients_of_which_processes_have_different_models_end_all(quick):
    messages = [(quick / f"adds_nothing_up-{index}.txt").read_text() for index in range(PROCESSES)]
    assert (
        messages[0] == messages[1] and "`shares_batches` is True, but processes end with different mo" in messages[0]
    )
