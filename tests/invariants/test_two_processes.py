"""A run in two processes ends with the bits of a run in one."""

import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_fedmoe.federation.uploads import ShardedUploads
from hf_fedmoe.strategies import FedAvg, FedMoE, FedMoESettings
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import LORA_RUNS, PERSONAL_RUNS, RUNS, image_model, trainer
from tests.failing_processes import ERRORS, SETTINGS
from tests.tiny_federation import (
    assert_equal_states,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
)
from tests.tiny_images import tiny_image_federation, tiny_processor, tiny_resnet
from tests.training.test_owners_of_text import trainer as trainer_of_owners
from tests.two_processes import (
    PROCESSES,
    assert_same,
    index_of_this_process,
    join_group,
    launch,
    record,
)


QUICK_RUNS = (
    "fedavg_top_k",
    "l2sgd",
    "scaffold",
    "fedmoe_paper",
    "lora_fedmoe_paper",
    "fedavg_krum",
    "fedmoe_median",
)

# What one process alone does as well as two


def run_by_name(name, output_dir):
    run = trainer(name, output_dir, **SETTINGS)
    run.train()
    return run


class FailingClient(FedAvg):
    def train_client(self, local, task):
        if task.client == 2:
            raise OSError("battery empty")
        return super().train_client(local, task)


def failing_client(output_dir):
    run = FederatedTrainer(tiny_expert(), tiny_args(output_dir, **SETTINGS), tiny_federation(), FailingClient())
    run.train()
    return run


def an_idle_process(output_dir):
    run = trainer("fedavg_client_optimizer", output_dir, clients_per_round=1)
    run.train()
    return run


class OneServer(FedAvg):
    """Its step may be taken in the main process only, but all have what comes of it."""

    def update(self, server, uploads, step):
        assert index_of_this_process() == 0
        server.tensors[f"round {step.round_index}"] = torch.tensor([step.round_index, 1], dtype=torch.int16)
        return super().update(server, uploads, step)

    def download(self, server, client, kept_P):
        return server.bank_SP[0] * (1 + sum(tensor.sum() for tensor in server.tensors.values()))

    def finish(self, server, step):
        assert index_of_this_process() == 0
        server.bank_SP += 1


def other_weights_in_one_process(output_dir):
    model = tiny_expert()
    with torch.no_grad():
        model.classifier.weight += index_of_this_process()
    args = tiny_args(output_dir, eval_strategy="steps", eval_steps=1, **SETTINGS)
    run = FederatedTrainer(model, args, tiny_federation(), OneServer())
    run.train()
    return run


def fedmoe_of_images(output_dir, strategy=FedMoE, **changes):
    """Its experts have statistics and integer buffers, and all that the server's step can have."""
    settings = FedMoESettings(server_iterations=2, expert_epochs=1, download_epochs=1, final_expert_epochs=1)
    args = tiny_args(output_dir, rounds=2, **SETTINGS | changes)
    data, processor = tiny_image_federation(), tiny_processor()
    run = FederatedTrainer(image_model("fedmoe"), args, data, strategy(settings), processing_class=processor)
    run.train()
    return run


class SecondFails(FedMoE):
    """The client that the second process trains: it has no upload to probe."""

    place = 1

    def participants(self, server, drawn, round_index):
        self.failing = drawn[self.place]
        return drawn

    def train_client(self, local, task):
        if task.client == self.failing:
            raise OSError("battery empty")
        return super().train_client(local, task)


def all_uploads_of_one_process(output_dir):
    strategy = SecondFails(FedMoESettings("paper", server_iterations=2))
    args = tiny_args(output_dir, rounds=2, save_strategy="steps", **SETTINGS)
    run = FederatedTrainer(tiny_mixture(), args, tiny_federation(), strategy)
    run.train()
    return run


class CountingRows(FailingClient):
    needs = "mean"

    def update(self, server, uploads, step):
        rows_mP = uploads._summands()[0]
        return super().update(server, uploads, step) | {"rows": len(rows_mP)}


def sums(output_dir, client_parallelism="sums"):
    torch.manual_seed(5)
    args = tiny_args(
        output_dir, client_parallelism=client_parallelism, optim="sgd", max_grad_norm=0.0, clients_per_round=4
    )
    data, processor = tiny_image_federation(), tiny_processor()
    run = FederatedTrainer(tiny_resnet(), args, data, CountingRows(), processing_class=processor)
    run.train()
    return run


def owners_of_text(output_dir):
    """A mixture for language, whose owners' sums travel beside their adapters."""
    run = trainer_of_owners(output_dir, **SETTINGS | {"save_strategy": "steps", "save_steps": 1})
    run.train()
    return run


def hidden_examples(output_dir):
    """Clients that train by DP-SGD: what each round of each has cost is counted alike in all processes."""
    pytest.importorskip("opacus", reason="example-level privacy is by Opacus: pip install 'hf_fedmoe[test]'")
    private = {"example_target_epsilon": 3.0, "example_delta": 1e-2, "example_clipping_norm": 0.5}
    args = tiny_args(output_dir, noise_source="seed", **private, **SETTINGS)
    run = FederatedTrainer(tiny_expert(), args, tiny_federation())
    run.train()
    return run


CASES = {
    "hidden_examples": hidden_examples,
    "owners_of_text": owners_of_text,
    "failing_client": failing_client,
    "an_idle_process": an_idle_process,
    "other_weights_in_one_process": other_weights_in_one_process,
    "fedmoe_of_images": fedmoe_of_images,
    "all_uploads_of_one_process": all_uploads_of_one_process,
}


class OwnRows(SecondFails):
    """
    The third fails, one of two that the main process trains; tells how many uploads that one has. Each sends its
    number beside its model.
    """

    place = 2
    needs = "fusion"

    def upload_tensors(self, server, client):
        return {"client": torch.zeros(2, dtype=torch.int64)}

    def train_client(self, local, task):
        payload, retained = super().train_client(local, task)
        payload.tensors["client"] = torch.tensor([task.client, 100])
        return payload, retained

    def update(self, server, uploads, step):
        rows_mP = uploads.own_nP if isinstance(uploads, ShardedUploads) else uploads._rows_mP
        assert [tensors["client"].tolist() for tensors in uploads.tensors] == [[c, 100] for c in uploads.clients]
        assert uploads.sum_of("client").tolist() == [sum(uploads.clients), 300]
        return super().update(server, uploads, step) | {"rows": len(rows_mP)}


def fedmoe_sums(output_dir, client_parallelism="sums"):
    changes = {"clients_per_round": 4, "optim": "sgd", "max_grad_norm": 0.0}
    return fedmoe_of_images(output_dir, OwnRows, client_parallelism=client_parallelism, **changes)


def scaffold_sums(output_dir, client_parallelism="sums"):
    run = trainer("scaffold", output_dir, client_parallelism=client_parallelism, optim="sgd", **SETTINGS)
    run.train()
    return run


def at_once(output_dir, clients_at_once=2):
    changes = {"clients_per_round": 4, "optim": "sgd", "clients_at_once": clients_at_once}
    run = FederatedTrainer(tiny_expert(), tiny_args(output_dir, **changes), tiny_federation())
    run.train()
    return run


# Equal but for rounding.
SUMS = {"sums": sums, "fedmoe_sums": fedmoe_sums, "scaffold_sums": scaffold_sums, "at_once": at_once}
QUICK = {name: functools.partial(run_by_name, name) for name in QUICK_RUNS} | CASES
REST = {name: functools.partial(run_by_name, name) for name in [*RUNS, *LORA_RUNS] if name not in QUICK_RUNS}


def interrupted(output_dir):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    run = trainer("fedmoe_paper", output_dir, **SETTINGS)
    run.add_callback(Stop())
    run.train()


def resumed(output_dir):
    run = trainer("fedmoe_paper", output_dir, **SETTINGS)
    run.train(resume_from_checkpoint=True)
    return run


def forwards(output_dir):
    """Counts how often this process runs experts and clients in a round and at the end, to train them or not."""
    model, counts = tiny_mixture(), Counter()
    experts = list(model.experts)

    def count(module, *_):
        # A client's model is a copy of the first expert, and of this hook.
        name = "expert" if any(module is expert for expert in experts) else "client"
        counts[f"{name} {'trained' if module.training else 'asked'}"] += 1

    for expert in experts:
        expert.register_forward_hook(count)
    strategy = FedMoE(FedMoESettings(final_expert_epochs=1))
    FederatedTrainer(model, tiny_args(output_dir, rounds=1, **SETTINGS), tiny_federation(), strategy).train()
    return counts


# The launch


def process(index, port, folder, names):
    join_group(index, port)
    for name in names:
        if name in ERRORS:
            try:
                ERRORS[name](folder / name)
            except Exception as error:
                (folder / f"{name}-{index}.txt").write_text(f"{type(error).__name__}: {error}")
        elif name == "forwards":
            (folder / f"{name}-{index}.json").write_text(json.dumps(forwards(folder / name)))
        elif name == "interrupted":
            interrupted(folder / name)
        elif name == "resumed":
            record(resumed(folder / name), folder / f"{name}-{index}")
        else:
            record((QUICK | SUMS | REST)[name](folder / name), folder / f"{name}-{index}")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    interrupted(folder / "resumed")
    launch(process, folder, [*QUICK, *SUMS, *ERRORS, "forwards", "interrupted", "resumed"])
    return folder


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rest")
    launch(process, folder, list(REST))
    return folder


# The tests


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_two_processes_end_with_the_bits_of_one(name, request, tmp_path):
    folder = request.getfixturevalue("quick" if name in QUICK else "rest")
    record((QUICK | REST)[name](tmp_path / name), tmp_path / "alone")
    for index in range(PROCESSES):
        assert_same(folder / f"{name}-{index}", tmp_path / "alone")
    assert_equal_kept(folder / name, tmp_path / name)
    if name in PERSONAL_RUNS:
        table = (tmp_path / name / "_client_metrics.csv").read_text()
        assert (folder / name / "_client_metrics.csv").read_text() == table


def assert_equal_kept(first, second):
    """The clients' own files in the last checkpoints, and nothing beside them."""
    manifests = []
    for folder in (first, second):
        checkpoints = {int(path.parent.name.split("-")[-1]): path for path in folder.glob("*/federation.json")}
        named = [json.loads(path.read_text())["clients"] for path in checkpoints.values()]
        written = {path.name for path in folder.glob("_clients/*")}
        assert written == {name for manifest in named for name in manifest.values()}
        manifests.append(json.loads(checkpoints[max(checkpoints)].read_text())["clients"] if checkpoints else {})
    assert manifests[0].keys() == manifests[1].keys()
    for client in manifests[0]:
        mine, theirs = (load_file(f / "_clients" / m[client]) for f, m in zip((first, second), manifests, strict=True))
        assert_equal_states(mine, theirs)


def test_a_failing_client_of_one_process_is_refused_by_all(quick):
    for index in range(PROCESSES):
        rounds = json.loads((quick / f"failing_client-{index}.json").read_text())["rounds"]
        refused = [refused for clients, refused, _ in rounds if 2 in clients]
        assert refused and all(faults == {"2": "OSError: battery empty"} for faults in refused)


def test_sums_of_uploads_end_like_one_process_but_for_rounding(quick, tmp_path):
    record(sums(tmp_path / "clients", "clients"), tmp_path / "alone")
    record(sums(tmp_path / "sums"), tmp_path / "sums-alone")
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert [report["rows"] for _, _, report in alone["rounds"]] == [3, 3, 3]
    for path in (tmp_path / "sums-alone", *(quick / f"sums-{index}" for index in range(PROCESSES))):
        facts = json.loads(Path(f"{path}.json").read_text())
        assert [report["rows"] for _, _, report in facts["rounds"]] == [1, 1, 1]
        assert [entry["loss"] for entry in facts["log"][:-1]] == pytest.approx(
            [entry["loss"] for entry in alone["log"][:-1]], rel=1e-5
        )
        states = (load_file(f"{path}.safetensors"), load_file(tmp_path / "alone.safetensors"))
        assert_equal_states(*states, atol=1e-6, rtol=1e-5)


def test_fed_moe_fuses_uploads_where_they_are(quick, tmp_path):
    record(fedmoe_sums(tmp_path / "clients", "clients"), tmp_path / "alone")
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert [report["rows"] for _, _, report in alone["rounds"]] == [3, 3]
    for path in (quick / f"fedmoe_sums-{index}" for index in range(PROCESSES)):
        facts = json.loads(Path(f"{path}.json").read_text())
        assert [report["rows"] for _, _, report in facts["rounds"]] == [1, 1]
        assert [refused for _, refused, _ in facts["rounds"]] == [refused for _, refused, _ in alone["rounds"]]
        states = (load_file(f"{path}.safetensors"), load_file(tmp_path / "alone.safetensors"))
        # Adam trains gate and experts on the server, and divides small gradients by themselves: alpha's is smallest.
        alphas = [values.pop("alpha_logit") for values in states]
        torch.testing.assert_close(*alphas, atol=5e-3, rtol=0)
        assert_equal_states(*states, atol=1e-3, rtol=1e-3)


def test_sums_of_what_travels_beside_models(quick, tmp_path):
    record(scaffold_sums(tmp_path / "clients", "clients"), tmp_path / "alone")
    record(scaffold_sums(tmp_path / "sums"), tmp_path / "sums-alone")
    norms = [
        [report["control_norm"] for *_, report in json.loads(Path(f"{path}.json").read_text())["rounds"]]
        for path in (tmp_path / "alone", tmp_path / "sums-alone", quick / "scaffold_sums-0", quick / "scaffold_sums-1")
    ]
    assert min(norms[0]) > 0 and all(found == pytest.approx(norms[0], rel=1e-5) for found in norms)
    states = (load_file(quick / "scaffold_sums-1.safetensors"), load_file(tmp_path / "alone.safetensors"))
    assert_equal_states(*states, atol=1e-6, rtol=1e-5)


def test_each_process_trains_its_own_clients_at_once(quick, tmp_path):
    record(at_once(tmp_path / "one_by_one", 1), tmp_path / "alone")
    assert_same(*(quick / f"at_once-{index}" for index in range(PROCESSES)))
    states = (load_file(quick / "at_once-1.safetensors"), load_file(tmp_path / "alone.safetensors"))
    assert_equal_states(*states, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_each_process_does_its_share_of_the_server_step(quick, tmp_path):
    """Three clients of three steps and three experts, asked in three batches: before, after the round, at the end."""
    alone = {"client trained": 3 * 3, "client asked": 3 * 3, "expert asked": 3 * 3 * 3, "expert trained": 3}
    trial = {"client trained": 1}  # in each process, before the first round
    assert Counter(forwards(tmp_path)) == Counter(alone) + Counter(trial)
    found = (json.loads((quick / f"forwards-{index}.json").read_text()) for index in range(PROCESSES))
    main, other = (dict(Counter(counts) - Counter(trial)) for counts in found)
    assert main == {"client trained": 2 * 3, "client asked": 2 * 3, "expert asked": 2 * 3 * 3, "expert trained": 2}
    assert other == {name: count - main[name] for name, count in alone.items()}


def test_resumes_with_more_processes_and_with_fewer(quick, tmp_path):
    record(run_by_name("fedmoe_paper", tmp_path / "whole"), tmp_path / "whole")
    record(resumed(quick / "interrupted"), tmp_path / "fewer")
    whole = json.loads((tmp_path / "whole.json").read_text())
    for path in (tmp_path / "fewer", quick / "resumed-0", quick / "resumed-1"):
        assert_equal_states(load_file(f"{path}.safetensors"), load_file(tmp_path / "whole.safetensors"))
        # The last line has means over the rounds of each process itself.
        assert json.loads(Path(f"{path}.json").read_text())["log"][:-1] == whole["log"][:-1]


MAIN_BREAKS = ["MemoryError: no room", "RuntimeError: Process 0 failed: MemoryError: no room"]
ANOTHER_BREAKS = ["RuntimeError: Process 1 failed: MemoryError: no room", "MemoryError: no room"]


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("broken_server", MAIN_BREAKS),
        ("broken_probe", ANOTHER_BREAKS),
        ("broken_share_of_the_main", MAIN_BREAKS),
        ("broken_share_of_another", ANOTHER_BREAKS),
        (
            "broken_after_sharing",
            ["OSError: not raised before", "RuntimeError: Process 0 failed: OSError: not raised before"],
        ),
        ("full_disk", ["OSError: no space left", "RuntimeError: Process 0 failed: OSError: no space left"]),
        ("no_place_for_kept", ["RuntimeError: Process 1 failed: OSError: read-only", "OSError: read-only"]),
    ],
)
def test_an_error_of_one_process_ends_all(quick, name, errors):
    assert [(quick / f"{name}-{index}.txt").read_text() for index in range(PROCESSES)] == errors


def test_a_trial_that_fails_in_one_process_ends_all(quick):
    told = [(quick / f"broken_collator-{index}.txt").read_text() for index in range(PROCESSES)]
    fault = "ValueError: `train_data_collator` can make no batch of row 0 of client 0"
    assert told[0].startswith(f"RuntimeError: Process 1 failed: {fault}") and told[1].startswith(fault)


@pytest.mark.parametrize(
    ("name", "breaks", "error"),
    [
        ("unsound_server", 0, "RuntimeError: The server is not sound after its step of round 1, in which the client"),
        ("unsound_end", 0, "RuntimeError: The server is not sound after what 'fedavg' does last: `server.tensors"),
        ("unwritten_row", 1, "BrokenPromiseError: The strategy 'fedavg' (UnwrittenRow) does not keep"),
    ],
)
def test_what_is_unsound_in_one_process_ends_all(quick, name, breaks, error):
    for index in range(PROCESSES):
        message = (quick / f"{name}-{index}.txt").read_text()
        assert message.startswith(error if index == breaks else f"RuntimeError: Process {breaks} failed: {error}")


def test_processes_with_different_data_are_refused(quick):
    for index in range(PROCESSES):
        message = (quick / f"other_data-{index}.txt").read_text()
        assert message.startswith("ValueError: The main process has data = ") and "process 1 has" in message
