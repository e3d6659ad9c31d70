"""Clients elsewhere end with the bits of clients in one process, for every method that can run there."""

import pytest

from hf_fedmoe.deployment import why_not
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import LORA_RUNS, RUNS, lora
from tests.message_link import MessageLink, tiny_run, tiny_server
from tests.tiny_federation import assert_equal_states, state, timeless, tiny_args, tiny_federation


ALL = RUNS | LORA_RUNS


def in_one_process(folder, name, **changes):
    method = ALL[name]
    peft_config = lora() if name in LORA_RUNS and method.adapters else None
    args = tiny_args(folder, **method.resumed | changes)
    run = FederatedTrainer(
        method.model(), args, tiny_federation(), strategy=method.strategy(), peft_config=peft_config
    )
    run.train()
    return run


QUICK = ("fedavg", "fedprox", "fedmoe", "lora_fedmoe", "fedavg_krum", "fedmoe_median")
RUNNING = [name for name, method in ALL.items() if why_not(method.strategy()) is None]
# Their clients choose what they need of a model when they have it: here whole models travel, and are counted.
WHOLE = ("fedjets", "fedrolex", "heterofl")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNNING]
)
def test_messages_end_with_the_bits_of_one_process(name, tmp_path):
    ours = tiny_run(tmp_path / "messages", name)
    theirs = in_one_process(tmp_path / "one", name)
    assert_equal_states(state(ours.model), state(theirs.model))
    left_out = ("bytes_up", "bytes_down") if name in WHOLE else ()
    log, wanted = (
        [{key: value for key, value in entry.items() if key not in left_out} for entry in timeless(history)]
        for history in (ours.state.log_history, theirs.state.log_history)
    )
    assert log == wanted


def test_methods_that_cannot_run_are_refused(tmp_path):
    refused = set(ALL) - set(RUNNING)
    assert refused == {"decentralised", "l2sgd"}
    for name in refused:
        with pytest.raises(
            ValueError, match=f"Clients are elsewhere, but '{name}' cannot run there: .*Choose another"
        ):
            tiny_server(tmp_path, name, MessageLink({}), tiny_federation())
