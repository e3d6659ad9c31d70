"""Methods that train on the reserved set alone, beside the clients."""

import pytest

from hf_fedmoe.experiments.methods import centralised
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation


EXAMPLES = {"example_noise_multiplier": 1.0, "example_clipping_norm": 0.5, "example_delta": 1e-2}
CLIENTS = {"target_epsilon": 2.0, "clipping_norm": 0.5, "delta": 1e-3, "client_choice": "poisson"}


@pytest.mark.parametrize("private", [EXAMPLES, CLIENTS, EXAMPLES | CLIENTS], ids=["examples", "clients", "both"])
def test_the_reserved_set_is_trained_without_noise_in_a_private_run(private, tmp_path):
    def trained(**changes):
        args = tiny_args(tmp_path, rounds=2, **changes)
        run = FederatedTrainer(tiny_expert(), **centralised(args, tiny_federation()))
        run.train()
        assert not any("epsilon" in name for entry in run.state.log_history for name in entry)
        # The run's own stay as they are.
        assert args.is_private == ("target_epsilon" in changes)
        assert args.hides_examples == ("example_noise_multiplier" in changes)
        return state(run.model)

    assert_equal_states(trained(**private), trained())
