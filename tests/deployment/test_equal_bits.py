"""Clients elsewhere end with the bits of clients in one process, for every method that can run there."""

import pytest

from hf_fedmoe.training import FederatedTrainer
from tests.every_method import LORA_RUNS, RUNS, lora
from tests.message_link import tiny_run
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


@pytest.mark.parametrize("name", ALL)
def test_messages_end_with_the_bits_of_one_process(name, tmp_path):
    ours = tiny_run(tmp_path / "messages", name)
    theirs = in_one_process(tmp_path / "one", name)
    assert_equal_states(state(ours.model), state(theirs.model))
    log, wanted = timeless(ours.state.log_history), timeless(theirs.state.log_history)
    assert log == wanted
