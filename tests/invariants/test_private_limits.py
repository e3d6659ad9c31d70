"""Private runs without noise are those without privacy, bit for bit, in every engine; what enters a sum is bounded."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from hf_fedmoe.federation import private_mean, why_not_private
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import LORA_RUNS, RUNS, lora
from tests.message_link import tiny_run
from tests.tiny_federation import assert_equal_states, state, timeless, tiny_args, tiny_federation
from tests.two_processes import index_of_this_process, join_group, launch, record


ALL = RUNS | LORA_RUNS
PRIVATE = [
    name
    for name, method in ALL.items()
    # With Krum what becomes of an update depends on the others.
    if why_not_private(method.strategy()) is None and "robust_fusion" not in method.resumed
]
QUICK = ("fedavg", "fedadam", "fedrep", "lora_fedavg")
# Clients of equal size, drawn without replacement: the plain mean is that of equal weights.
SILENT = {"noise_multiplier": 0.0, "clipping_norm": math.inf, "noise_source": "seed"}
NOISY = {"noise_multiplier": 1.0, "clipping_norm": 0.05, "delta": 1e-2, "noise_source": "seed"}
NOISY["client_choice"] = "poisson"


of_every_method = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRIVATE]
)


def run(folder, name, **changes):
    method = ALL[name]
    peft_config = lora() if name in LORA_RUNS and method.adapters else None
    if peft_config is not None:
        changes = {"lora_fusion": "ffa", "client_ranks": None} | changes
    args = tiny_args(folder, **method.resumed | {"rounds": 2} | changes)
    made = FederatedTrainer(
        method.model(), args, tiny_federation(), strategy=method.strategy(), peft_config=peft_config
    )
    made.train()
    return made


@of_every_method
def test_without_noise_and_bound_it_is_the_plain_mean(name, tmp_path):
    private, plain = run(tmp_path / "private", name, **SILENT), run(tmp_path / "plain", name)
    assert_equal_states(state(private.model), state(plain.model))


@pytest.mark.parametrize("changes", [{"clients_at_once": 2}, {"client_parallelism": "data"}])
def test_every_engine_ends_with_the_bits_of_its_plain_mean(changes, tmp_path):
    private = run(tmp_path / "private", "fedavg", **SILENT, **changes)
    assert_equal_states(state(private.model), state(run(tmp_path / "plain", "fedavg", **changes).model))


def test_messages_end_with_the_bits_of_one_process(tmp_path):
    messages = tiny_run(tmp_path / "messages", "fedavg", **NOISY)
    in_one_process = run(tmp_path / "one", "fedavg", rounds=3, **NOISY)
    assert_equal_states(state(messages.model), state(in_one_process.model))
    assert messages.state.log_history[0]["epsilon"] == in_one_process.state.log_history[0]["epsilon"]


@of_every_method
def test_no_update_in_a_sum_is_longer_than_the_norm(name, tmp_path, monkeypatch):
    seen = []
    fuse = private_mean.fuse_models_

    def spy(bank_SP, rows_kP, *args):
        seen.extend((row_P.double() - bank_SP[0].double()).norm().item() for row_P in rows_kP)
        return fuse(bank_SP, rows_kP, *args)

    monkeypatch.setattr(private_mean, "fuse_models_", spy)
    # What top_k leaves out comes back in a later update, which is bounded when it is read.
    compressed = {"upload_compression": "top_k", "top_k_share": 0.5, "keep_client_optimizer": False}
    run(tmp_path, name, **NOISY, **compressed, clients_per_round=3, learning_rate=0.1)
    assert len(seen) >= 2 and max(seen) == pytest.approx(0.05, rel=1e-4)


def test_noise_is_the_systems_unless_the_seed_is_asked_for(tmp_path):
    assert tiny_args(tmp_path).noise_source == "system"
    again = [state(run(tmp_path / str(n), "fedavg", **NOISY).model) for n in range(2)]
    assert_equal_states(*again)
    assert not torch.equal(again[0]["classifier.weight"], state(ALL["fedavg"].model())["classifier.weight"])


ADAPTIVE = NOISY | {"noise_multiplier": 0.1, "clipping_quantile": 0.5}


def in_two_processes(index, port, folder, names):
    """A process of its own; what the system's entropy draws must be the same in both."""
    join_group(index, port)
    record(run(folder / "run", "fedadam", **ADAPTIVE), folder / f"process{index_of_this_process()}")
    of_system = run(folder / "system", "fedavg", **ADAPTIVE | {"noise_source": "system"})
    record(of_system, folder / f"system{index_of_this_process()}")


@pytest.mark.slow
def test_two_processes_end_with_the_bits_of_one(tmp_path):
    launch(in_two_processes, tmp_path, None)
    one = run(tmp_path / "one", "fedadam", **ADAPTIVE)
    for index in range(2):
        assert_equal_states(load_file(tmp_path / f"process{index}.safetensors"), state(one.model))
        facts = json.loads((tmp_path / f"process{index}.json").read_text())
        assert facts["log"] == timeless(one.state.log_history)
    first, second = (load_file(tmp_path / f"system{index}.safetensors") for index in range(2))
    assert_equal_states(first, second)
    facts = [json.loads((tmp_path / f"system{index}.json").read_text()) for index in range(2)]
    assert facts[0] == facts[1]
