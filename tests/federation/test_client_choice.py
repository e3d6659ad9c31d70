import numpy as np
import pytest

from hf_fedmoe.federation import CLIENT_CHOICES
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation


def draws(choice: str, num_clients: int, clients_per_round: int, rounds: int = 400) -> np.ndarray:
    return np.array(
        [
            CLIENT_CHOICES[choice](num_clients, clients_per_round, np.random.default_rng(round_index))
            for round_index in range(rounds)
        ]
    )


def test_uniform_choice_takes_each_client_equally_often_and_none_twice_in_a_round():
    drawn = draws("uniform", 8, 3)
    assert all(len(set(round_)) == 3 for round_ in drawn)
    np.testing.assert_allclose(np.bincount(drawn.ravel()) / 400, 3 / 8, atol=0.08)


def test_stratified_choice_takes_one_of_each_residue_class():
    drawn = draws("stratified", 11, 3)
    assert (drawn % 3 == [0, 1, 2]).all()
    shares = np.bincount(drawn.ravel()) / 400
    expected = [1 / len(range(client % 3, 11, 3)) for client in range(11)]
    np.testing.assert_allclose(shares, expected, atol=0.08)


def test_the_trainer_draws_as_told(tmp_path):
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, client_choice="stratified"), tiny_federation())
    trainer.train()
    assert all([client % 2 for client in report.clients] == [0, 1] for report in trainer.rounds)


def test_another_name(tmp_path):
    with pytest.raises(ValueError, match="`client_choice` is 'best': choose one of 'uniform', 'stratified'"):
        tiny_args(tmp_path, client_choice="best")
