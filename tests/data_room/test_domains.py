"""Domains: who holds rows of which, and what is shifted."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from hf_fedmoe.data import DOMAIN_COLUMN, domains, joined, with_domains


def pictures(count: int = 40) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 6), dtype=np.uint8)
    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=list("abcd"))})
    return Dataset.from_dict({"image": list(pixels), "label": np.arange(count) % 4}, features=features)


def test_each_domain_has_clients_of_its_own():
    domain = np.array(["x", "y", "y", "x"] * 10)
    clients = domains(domain, num_clients=4, seed=1)
    assert [set(domain[rows]) for rows in clients] == [{"x"}, {"y"}, {"x"}, {"y"}]
    assert sorted(np.concatenate(clients)) == list(range(40)) and {len(rows) for rows in clients} == {10}
    assert [len(rows) for rows in domains(domain, 4, client_size=3)] == [3] * 4
    again = domains(domain, num_clients=4, seed=1)
    assert all((mine == theirs).all() for mine, theirs in zip(clients, again, strict=True))
    assert any((mine != theirs).any() for mine, theirs in zip(clients, domains(domain, 4, seed=2), strict=True))


def test_clients_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match=r"num_clients is 5, but there are 2 domains: .* for example 4"):
        domains(["x", "y"] * 5, 5)
    with pytest.raises(ValueError, match=r"The domain 'y' has too few rows. 2 clients need 6 rows, but num_rows is 2"):
        domains(["x"] * 6 + ["y"] * 2, 4, client_size=3)


def test_images_are_turned_by_their_domain():
    before = pictures()
    after = with_domains(before, 4, "rotations")
    domain_N = after[DOMAIN_COLUMN]
    assert sorted(domain_N) == sorted(list(range(4)) * 10)
    assert after["label"][:] == before["label"][:] and after.features["image"] == before.features["image"]
    for place in range(0, 40, 7):
        turned = np.rot90(np.asarray(before[place]["image"]), domain_N[place])
        assert (np.asarray(after[place]["image"]) == turned).all()


def test_labels_are_moved_by_their_domain():
    before = pictures()
    after = with_domains(before, 2, "labels", seed=3)
    moved = [(y + 2 * domain) % 4 for y, domain in zip(before["label"], after[DOMAIN_COLUMN], strict=True)]
    assert after["label"][:] == moved and after.features["label"] == before.features["label"]
    assert with_domains(before, 2, "labels", seed=3)[DOMAIN_COLUMN][:] == after[DOMAIN_COLUMN][:]


def test_what_cannot_be_shifted_is_refused():
    with pytest.raises(ValueError, match="shift is 'colours': choose one of 'rotations', 'labels'"):
        with_domains(pictures(), 2, "colours")
    with pytest.raises(
        ValueError, match=r"shift is 'rotations', but only images can be turned, and .*: take 'labels'"
    ):
        with_domains(pictures().remove_columns("image"), 2, "rotations")
    with pytest.raises(ValueError, match="has a column 'domain' already"):
        with_domains(with_domains(pictures(), 2, "labels"), 2, "labels")
    with pytest.raises(ValueError, match="num_domains is 5, but 4 classes have no more shifts: lower it"):
        with_domains(pictures(), 5, "labels")
    unlabelled = pictures().remove_columns("label").add_column("label", [-1] * 40)
    with pytest.raises(ValueError, match="-1"):
        with_domains(unlabelled, 2, "labels")
    with pytest.raises(ValueError, match=r"`label` is of the type Value.*: make it a `ClassLabel`"):
        with_domains(pictures().remove_columns("label").add_column("label", [1] * 40), 2, "labels")
    with pytest.raises(ValueError, match="num_domains is 0"):
        with_domains(pictures(), 0, "labels")


def source_of(kind: str, names: list[str], sizes: dict[str, int]) -> DatasetDict:
    """Makes a data set of grey or coloured pictures, or texts, whose rows of a class are alike."""
    splits = {}
    for split, size in sizes.items():
        labels = [row % len(names) for row in range(size)]
        if kind == "text":
            content = Dataset.from_dict({"text": [f"{kind} {names[label]}" for label in labels]})
        else:
            shape = (4, 4) if kind == "grey" else (6, 6, 3)
            mode = "L" if kind == "grey" else "RGB"
            pixels = [np.full(shape, 10 * label + 7, np.uint8) for label in labels]
            content = Dataset.from_dict({"image": pixels}, Features({"image": Image(mode=mode)}))
        splits[split] = content.add_column("label", labels, feature=ClassLabel(names=names))
    return DatasetDict(splits)


def test_data_sets_are_joined_as_domains_whose_classes_go_by_name():
    sizes = {"train": 20, "test": 8}
    several = {
        "digits": source_of("grey", ["0", "1"], sizes),
        "characters": source_of("grey", ["0", "1", "A"], {"train": 31, "test": 9}),
        "photographs": source_of("coloured", ["cat", "dog"], {"train": 40, "test": 30}),
    }
    found = joined(several)
    for split, size in sizes.items():
        rows = found[split]
        assert rows["domain"][:] == [name for name in several for _ in range(size)]
        names = rows.features["label"].names
        assert sorted(names) == ["0", "1", "A", "cat", "dog"]
        for row in rows:
            own = several[row["domain"]][split].features["label"].names
            assert own[(np.asarray(row["image"]).flat[0] - 7) // 10] == names[row["label"]]
    assert joined(several)["train"]["label"][:] == found["train"]["label"][:]
    assert joined(several, seed=1)["train"]["label"][:] != found["train"]["label"][:]
    clients = domains(found["train"]["domain"], 6)
    assert [set(found["train"].select(rows)["domain"]) for rows in clients[:3]] == [{name} for name in sorted(several)]


def test_texts_and_pictures_are_not_joined():
    sizes = {"train": 4, "test": 4}
    several = {"digits": source_of("grey", ["0", "1"], sizes), "shop": source_of("text", ["bad", "good"], sizes)}
    with pytest.raises(ValueError, match="digits and shop are to be one data set, but are of image, text"):
        joined(several)
