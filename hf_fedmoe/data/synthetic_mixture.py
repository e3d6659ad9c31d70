"""
The synthetic mixture of FedEM and pFedMM: every client mixes the same few linear classifiers in its own proportions.

Shape suffixes: M clients, K components, D features, N rows.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, List, Value


# Rows that every client has for training, and the most that one has.
MIN_TRAIN_ROWS, MAX_TRAIN_ROWS = 50, 1000


@dataclass(frozen=True)
class SyntheticMixture:
    """
    Args:
        train (`list[datasets.Dataset]`): The rows that each of the M clients trains on, with the columns `features` (D
            numbers), `label` (0 or 1) and `component`, which of the K classifiers gave the label and no model sees.
        test (`list[datasets.Dataset]`): The rows that each client is tested on, likewise.
        proportions_MK (`np.ndarray` of shape `[M, K]`): The share of each component at each client.
        theta_KD (`np.ndarray` of shape `[K, D]`): The classifiers.
    """

    train: list[Dataset]
    test: list[Dataset]
    proportions_MK: np.ndarray
    theta_KD: np.ndarray


def synthetic_mixture(
    num_clients: int = 300,
    num_features: int = 150,
    num_components: int = 3,
    alpha: float = 0.4,
    noise: float = 0.1,
    test_size: int = 5000,
    seed: int = 0,
) -> SyntheticMixture:
    """
    Draws the clients of the synthetic experiment of FedEM (Marfoq et al., 2021), which pFedMM repeats.

    A client's proportions are drawn from Dir(alpha). Each of its rows is uniform in [-1, 1] and takes a component k in
    these proportions; its label is theta_k . x plus a normal error, as a sigmoid, rounded. The thetas are uniform in
    [-1, 1]. A client trains on min(floor(lognormal(4, 2)) + 50, 1000) rows.

    For a trainer: `FederatedDataset.from_clients(mixture.train, test=concatenate_datasets(mixture.test))`.

    Args:
        num_clients (`int`, *optional*, defaults to 300): Clients M.
        num_features (`int`, *optional*, defaults to 150): Length D of a row.
        num_components (`int`, *optional*, defaults to 3): Components K.
        alpha (`float`, *optional*, defaults to 0.4): Concentration of the proportions; small is one component a
            client.
        noise (`float`, *optional*, defaults to 0.1): Standard deviation of the error.
        test_size (`int`, *optional*, defaults to 5000): Test rows of each client. All defaults together take 0.9 GB.
        seed (`int`, *optional*, defaults to 0): Of everything. The test rows change nothing about the others, nor does
            a client about its neighbours' rows.

    Returns:
        [`SyntheticMixture`]

    Raises:
        ValueError: When a number is out of its range.
    """
    counts = {"num_clients": num_clients, "num_features": num_features, "num_components": num_components}
    for name, value in (counts | {"test_size": test_size}).items():
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}, but a Dirichlet concentration must be above 0.")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}, but a standard deviation must be a number of at least 0.")
    common_seed, *client_seeds = np.random.SeedSequence(seed).spawn(1 + num_clients)
    theta_KD = np.random.default_rng(common_seed).uniform(-1, 1, (num_components, num_features))
    train, test, proportions = [], [], []
    for client_seed in client_seeds:
        rng = np.random.default_rng(client_seed)
        proportions.append(rng.dirichlet(np.full(num_components, alpha)))
        train_size = min(int(rng.lognormal(4, 2)) + MIN_TRAIN_ROWS, MAX_TRAIN_ROWS)
        train.append(_draw(train_size, proportions[-1], theta_KD, noise, rng))
        test.append(_draw(test_size, proportions[-1], theta_KD, noise, rng))
    return SyntheticMixture(train, test, np.stack(proportions), theta_KD)


def _draw(
    num_rows: int, proportions_K: np.ndarray, theta_KD: np.ndarray, noise: float, rng: np.random.Generator
) -> Dataset:
    num_components, num_features = theta_KD.shape
    x_ND = rng.uniform(-1, 1, (num_rows, num_features)).astype(np.float32)
    component_N = rng.choice(num_components, num_rows, p=proportions_K)
    score_N = (x_ND * theta_KD[component_N]).sum(1) + rng.normal(0, noise, num_rows)
    features = Features(
        {
            "features": List(Value("float32"), length=num_features),
            "label": ClassLabel(num_classes=2),
            "component": Value("int64"),
        }
    )
    # The sigmoid of a score rounds to 1 where the score is above 0.
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), num_features),
        pa.array((score_N > 0).astype(np.int64)),
        pa.array(component_N),
    ]
    return Dataset(pa.table(columns, schema=features.arrow_schema))
