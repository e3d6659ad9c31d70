"""
Domains: groups of clients to whom the same input looks different, or means something else.

[`domains`] gives each domain of a dataset clients of its own. [`joined`] makes a dataset of several, each a domain,
and [`with_domains`] domains of a dataset without any, by shifts of which it is known how much there is to win.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from .counted import counted
from .label_maps import with_one_label_map
from .labels import read_labels
from .partitions import check_num_clients, iid


DOMAIN_COLUMN = "domain"
SHIFTS = ("rotations", "labels")


def domains(
    domain: Sequence | np.ndarray, num_clients: int, seed: int = 0, client_size: int | None = None
) -> list[np.ndarray]:
    """
    Gives each domain equally many clients, among whom its rows are dealt: client c has rows of domain c modulo their
    number.

    Args:
        domain (`Sequence`, shape `[N]`): Domain of each row, strings or integers.
        num_clients (`int`): Number of clients M, a multiple of the number of domains.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffles.
        client_size (`int`, *optional*): Rows for each client; what is left over goes to nobody.

    Returns:
        `list[np.ndarray]`: M sorted index arrays.

    Raises:
        ValueError: When the clients cannot be shared out among the domains, or a domain has too few rows.
    """
    check_num_clients(num_clients)
    given_N = np.asarray(domain)
    if (
        given_N.dtype.kind in "fO"
        and (missing := np.flatnonzero([each is None or each != each for each in given_N])).size
    ):
        raise ValueError(
            f"`domain` is missing in {counted(len(missing), 'row')} of {len(given_N)}, row {missing[0] + 1} first: "
            "name that of each, or leave such rows out."
        )
    names, domain_N = np.unique(given_N, return_inverse=True)
    if not len(names):
        raise ValueError("There are no rows to give to clients: `domain` is empty.")
    if num_clients % len(names):
        raise ValueError(
            f"num_clients is {num_clients}, but there are {len(names)} domains: take as many clients for each, for "
            f"example {len(names) * max(1, round(num_clients / len(names)))}."
        )
    clients: list[np.ndarray] = [np.empty(0, np.int64)] * num_clients
    for number, name in enumerate(names.tolist()):
        rows = np.flatnonzero(domain_N == number)
        try:
            parts = iid(len(rows), num_clients // len(names), seed + number, client_size)
        except ValueError as error:
            raise ValueError(f"The domain {name!r} has too few rows. {error}") from None
        clients[number :: len(names)] = [rows[part] for part in parts]
    return clients


def joined(sources: Mapping[str, DatasetDict], seed: int = 0) -> DatasetDict:
    """
    Joins classification datasets to one, of which each is a domain, column `domain`, with equally many rows: as many
    as the smallest has, in training and in the test.

    Classes are the same where their names are.

    Args:
        sources (`Mapping[str, datasets.DatasetDict]`): By the names of their domains, as `load_source` gives them:
            `train` and `test` with a column `label`, and `text` or `image`. Other columns are left out.
        seed (`int`, *optional*, defaults to 0): Seed of the draw of rows.

    Returns:
        `datasets.DatasetDict`

    Raises:
        ValueError: When some are of texts and others of images, or their classes cannot be told by their names.
    """
    contents = {
        name: "image" if "image" in source["train"].column_names else "text" for name, source in sources.items()
    }
    if len(set(contents.values())) > 1:
        raise ValueError(
            f"{' and '.join(sources)} are to be one data set, but are of {', '.join(contents.values())}: join either "
            "texts or images."
        )
    splits = {}
    for split in ("train", "test"):
        size = min(len(source[split]) for source in sources.values())
        for name, source in sources.items():
            rows = source[split].select_columns([contents[name], "label"]).shuffle(seed=seed).select(range(size))
            # Pictures differ in their mode, of which nothing is said from here on.
            rows = rows.cast_column("image", ImageFeature()) if contents[name] == "image" else rows
            splits[name, split] = rows.add_column(DOMAIN_COLUMN, [name] * size)
    alike = with_one_label_map({f"{name} ({split})": rows for (name, split), rows in splits.items()}, {}, "label")
    return DatasetDict(
        {split: concatenate_datasets([alike[f"{name} ({split})"] for name in sources]) for split in ("train", "test")}
    )


def with_domains(dataset: Dataset, num_domains: int, shift: str, seed: int = 0) -> Dataset:
    """
    Deals the rows of a dataset to domains, column `domain`, and shifts them.

    Args:
        dataset (`datasets.Dataset`): With a column `label`, a `ClassLabel`, and for rotations `image`.
        num_domains (`int`): How many.
        shift (`str`): What differs between domains: `"rotations"` (images are turned by domain / num_domains of a full
            turn) or `"labels"` (the class is another one: of domain g class y becomes y + g C / num_domains modulo C,
            so that the same image means something else to each).
        seed (`int`, *optional*, defaults to 0): Seed of the deal.

    Returns:
        `datasets.Dataset`

    Raises:
        ValueError: When there is no such shift, or the dataset has not what it needs.
    """
    if shift not in SHIFTS:
        raise ValueError(f"shift is {shift!r}: choose one of {', '.join(map(repr, SHIFTS))}.")
    if num_domains < 1:
        raise ValueError(f"num_domains is {num_domains}: give at least 1.")
    if DOMAIN_COLUMN in dataset.column_names:
        raise ValueError(f"The data has a column {DOMAIN_COLUMN!r} already: it has domains.")
    if shift == "labels":
        before_N, feature = read_labels(dataset, "label", "dataset"), dataset.features["label"]
        if not isinstance(feature, ClassLabel):
            raise ValueError(f"`label` is of the type {feature}: make it a `ClassLabel`, as `load_source` does.")
        if num_domains > feature.num_classes:
            raise ValueError(
                f"num_domains is {num_domains}, but {feature.num_classes} classes have no more shifts: lower it."
            )
    if shift == "rotations" and "image" not in dataset.column_names:
        raise ValueError(
            f"shift is {shift!r}, but only images can be turned, and the data has the columns {dataset.column_names}: "
            "take 'labels'."
        )
    domain_N = np.random.default_rng(seed).permutation(len(dataset)) % num_domains
    dataset = dataset.add_column(DOMAIN_COLUMN, domain_N)
    if shift == "labels":
        labels_N = (before_N + domain_N * feature.num_classes // num_domains) % feature.num_classes
        return dataset.remove_columns("label").add_column("label", labels_N, feature=feature)

    def turn(rows: dict[str, list]) -> dict[str, list]:
        degrees = [360 * domain / num_domains for domain in rows[DOMAIN_COLUMN]]
        return {"image": [_turned(image, angle) for image, angle in zip(rows["image"], degrees, strict=True)]}

    return dataset.map(turn, batched=True, features=dataset.features, load_from_cache_file=False)


def _turned(image: Image.Image | None, degrees: float) -> Image.Image:
    if image is None:
        raise ValueError("A row has no `image`: leave such rows out before domains are made.")
    return image.rotate(degrees) if degrees else image
