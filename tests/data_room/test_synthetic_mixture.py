import numpy as np
import pytest
from datasets import ClassLabel, Features, List, Value, concatenate_datasets

from hf_fedmoe.data import FederatedDataset, synthetic_mixture
from hf_fedmoe.models import LinearConfig, LinearForClassification
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import tiny_args


def columns(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = rows.with_format("numpy")[:]
    return rows["features"], rows["label"], rows["component"]


def test_sizes_and_columns_of_the_paper():
    mixture = synthetic_mixture(test_size=1)
    sizes = np.array([len(rows) for rows in mixture.train])
    assert (mixture.proportions_MK.shape, mixture.theta_KD.shape, len(mixture.test)) == ((300, 3), (3, 150), 300)
    assert sizes.min() >= 50 and sizes.max() == 1000
    # floor(lognormal(4, 2)): half of them are above e^4 = 54.6, and P(Z > (ln 950 - 4) / 2) = 7.7 % reach the bound.
    assert np.median(sizes - 50) == pytest.approx(np.exp(4), rel=0.25)
    assert (sizes == 1000).mean() == pytest.approx(0.077, abs=0.03)
    assert mixture.train[0].features == Features(
        {
            "features": List(Value("float32"), length=150),
            "label": ClassLabel(num_classes=2),
            "component": Value("int64"),
        }
    )
    # Dir(0.4, 0.4, 0.4): mean 1/3, variance (1/3)(2/3) / (1.2 + 1)
    np.testing.assert_allclose(mixture.proportions_MK.sum(1), 1)
    np.testing.assert_allclose(mixture.proportions_MK.mean(0), 1 / 3, atol=0.06)
    np.testing.assert_allclose(mixture.proportions_MK.var(0), 2 / 9 / 2.2, rtol=0.25)


def test_labels_are_the_components():
    mixture = synthetic_mixture(num_clients=2, num_features=6, noise=0.0, test_size=4000)
    for proportions_K, *parts in zip(mixture.proportions_MK, mixture.train, mixture.test, strict=True):
        for rows in parts:
            x_ND, label_N, component_N = columns(rows)
            scores_N = (x_ND * mixture.theta_KD[component_N]).sum(1)
            np.testing.assert_array_equal(label_N, np.round(1 / (1 + np.exp(-scores_N))))
            assert x_ND.dtype == np.float32 and -1 <= x_ND.min() < x_ND.max() <= 1
            np.testing.assert_allclose(x_ND.mean(0), 0, atol=4 * (1 / 3 / len(rows)) ** 0.5)
            shares_K = np.bincount(component_N, minlength=3) / len(rows)
            np.testing.assert_allclose(shares_K, proportions_K, atol=2.5 * len(rows) ** -0.5)
        np.testing.assert_allclose(x_ND.var(0), 1 / 3, atol=0.02)
    assert np.abs(mixture.theta_KD).max() <= 1


def test_noise_turns_labels_near_the_boundary():
    mixture = synthetic_mixture(num_clients=1, num_features=6, noise=0.1, test_size=20_000)
    x_ND, label_N, component_N = columns(mixture.test[0])
    scores_N = (x_ND * mixture.theta_KD[component_N]).sum(1)
    turned_N = (scores_N > 0) != (label_N == 1)
    # One standard deviation off the boundary 16 % are turned, half of those at it, and none far away.
    assert turned_N[np.abs(scores_N) < 0.01].mean() == pytest.approx(0.5, abs=0.08)
    assert turned_N[np.abs(np.abs(scores_N) - 0.1) < 0.02].mean() == pytest.approx(0.159, abs=0.04)
    assert not turned_N[np.abs(scores_N) > 0.5].any()


def test_one_seed_decides_all_and_sizes_nothing_else():
    first = synthetic_mixture(num_clients=4, num_features=6, test_size=10, seed=3)
    for other in (
        synthetic_mixture(num_clients=4, num_features=6, test_size=10, seed=3),
        synthetic_mixture(num_clients=3, num_features=6, test_size=20, seed=3),
    ):
        np.testing.assert_array_equal(other.theta_KD, first.theta_KD)
        for mine, theirs in zip(first.train, other.train, strict=False):
            assert mine[:] == theirs[:]
    another = synthetic_mixture(num_clients=4, num_features=6, test_size=10, seed=4)
    assert not np.isclose(another.theta_KD, first.theta_KD).any()
    assert another.train[0][0] != first.train[0][0] != first.test[0][0]


def test_a_linear_classifier_learns_it_in_rounds(tmp_path):
    """FedAvg finds the direction of one component; clients of three cannot agree on one."""
    accuracies = {}
    for num_components in (1, 3):
        mixture = synthetic_mixture(8, 10, num_components, test_size=100, seed=1)
        data = FederatedDataset.from_clients(mixture.train, test=concatenate_datasets(mixture.test))
        assert data.client_sizes.tolist() == [len(rows) for rows in mixture.train] and data.num_labels == 2
        model = LinearForClassification(LinearConfig(num_features=10))
        args = tiny_args(
            tmp_path, rounds=6, clients_per_round=8, learning_rate=0.1, per_device_train_batch_size=32, max_grad_norm=0
        )
        trainer = FederatedTrainer(model, args, data)
        trainer.train()
        accuracies[num_components] = trainer.evaluate(data.test)["eval_accuracy"]
        if num_components == 1:
            theta_D, found_D = mixture.theta_KD[0], model.linear.weight[0].detach().numpy()
            assert theta_D @ found_D / np.linalg.norm(theta_D) / np.linalg.norm(found_D) > 0.98
    assert accuracies[1] > 0.93 and accuracies[3] < accuracies[1] - 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clients": 0}, "num_clients is 0, but must be at least 1"),
        ({"num_features": 0}, "num_features is 0, but must be at least 1"),
        ({"num_components": -1}, "num_components is -1"),
        ({"test_size": 0}, "test_size is 0"),
        ({"alpha": 0.0}, r"alpha is 0.0, but a Dirichlet concentration must be above 0"),
        ({"noise": -0.1}, "noise is -0.1, but a standard deviation"),
        ({"noise": float("nan")}, "noise is nan"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_mixture(**arguments)
