"""A folder of images per client, a subfolder per class."""

import numpy as np
import pytest
from PIL import Image

from hf_fedmoe import FederatedDataset


def fill(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (4, 4), number).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return {"north": fill(tmp_path / "north", cat=4, dog=2), "south": fill(tmp_path / "south", cat=1, cow=3)}


def test_folders_become_clients_of_one_label_map(folders):
    data = FederatedDataset.from_folders(folders)
    assert data.client_names == ["north", "south"] and data.label_names == ["cat", "cow", "dog"]
    assert data.label_counts().tolist() == [[4, 0, 2], [1, 3, 0]]
    assert np.asarray(data.client("north")[2]["image"])[0, 0] == 2
    assert FederatedDataset.from_folders(list(folders.values())).client_names == ["north", "south"]


def test_splits_are_folders_or_shares(folders, tmp_path):
    held = fill(tmp_path / "held", cat=1, dog=1, cow=1)
    data = FederatedDataset.from_folders(folders, reserved=held, test=0.2, classes=["dog", "cow", "cat"])
    assert len(data.reserved) == 3 and len(data.test) == 2 and data.client_sizes.sum() == 8
    assert data.label_names == ["dog", "cow", "cat"]


def test_what_is_wrong_with_a_folder_is_said(folders, tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder '.*nroth' of 'north': is it '.*north'\?"):
        FederatedDataset.from_folders({"north": str(tmp_path / "nroth")})
    with pytest.raises(ValueError, match="is a file: give a folder with a subfolder for each class"):
        FederatedDataset.from_folders({"north": str(tmp_path / "north" / "cat" / "0.png")})
    with pytest.raises(ValueError, match="cat' has no subfolders: put its images into one for each class"):
        FederatedDataset.from_folders({"north": str(tmp_path / "north" / "cat")})
    (tmp_path / "south" / "hen").mkdir()
    with pytest.raises(ValueError, match="hen' has no images: put some of this class there, or take the folder away"):
        FederatedDataset.from_folders(folders)


def test_files_that_are_no_images_are_named_and_hidden_ones_are_not(folders, tmp_path):
    (tmp_path / "south" / "cow" / "notes.pdf").touch()  # an image that Pillow writes only
    (tmp_path / "south" / "cow" / ".DS_Store").touch()
    (tmp_path / "south" / "cow" / "Thumbs.db").touch()
    with pytest.warns(UserWarning, match=r"cow' has 1 file with the ending of no .* out: notes.pdf") as told:
        assert FederatedDataset.from_folders(folders).client_sizes.tolist() == [6, 4]
    assert len(told) == 1


def test_an_image_outside_of_the_subfolders_is_named(folders, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "south" / "loose.png")
    for name in ("notes.txt", "._loose.png"):  # the latter is what a copy from a Mac leaves
        (tmp_path / "south" / name).touch()
    with pytest.warns(UserWarning, match=r"south' has 1 image outside of its subfolders, left out: loose.png") as told:
        assert FederatedDataset.from_folders(folders).client_sizes.tolist() == [6, 4]
    assert len(told) == 1


def test_a_subfolder_in_two_spellings_is_refused(folders, tmp_path):
    (tmp_path / "south" / "cat").rename(tmp_path / "south" / "Cat")
    with pytest.raises(
        ValueError, match=r"`subfolder` has one name in two .*'Cat' in '.*south': write it alike every"
    ):
        FederatedDataset.from_folders(folders)


def test_a_folder_of_all_clients_is_noticed(tmp_path):
    fill(tmp_path / "north", cat=4, dog=2)
    fill(tmp_path / "south", cat=1, dog=2, cow=3)
    with pytest.warns(UserWarning, match="north, south, are taken for classes, but .*give each of them"):
        assert FederatedDataset.from_folders([str(tmp_path)]).label_names == ["north", "south"]
