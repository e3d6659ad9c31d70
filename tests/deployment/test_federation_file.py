"""The federation of docs/deployment.md, from its files to a model, with a link in one process."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from hf_fedmoe.deployment import Node, make_node_trainer, make_server_trainer, methods_table
from hf_fedmoe.deployment.client_rows import client_rows
from hf_fedmoe.deployment.federation_file import read_federation
from hf_fedmoe.experiments.named_strategies import STRATEGIES
from tests.message_link import MessageLink, answering


REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "deployment.md").read_text()
# Few steps, of the same kind.
SMALL = {"rounds": 1, "gate_epochs": 1, "final_expert_epochs": 0, "max_length": 8, "save_strategy": "no"}


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE).group(1)


def write_rows(path, *rows):
    path.write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]) + "\n")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "federation.yaml").write_text(block("yaml"))
    (tmp_path / "mydata.py").write_text(block("python"))
    good, bad = ("a fine dress", "good"), ("it tore at once", "bad")
    for name in ("reserved", "validation"):
        write_rows(tmp_path / f"{name}.csv", *[good, bad] * 4)
    write_rows(tmp_path / "north.csv", *[good] * 6)  # of one class only
    return tmp_path


def node(files, name, data):
    folder = files / name
    return Node(folder, lambda sent: make_node_trainer(sent, folder, lambda columns: client_rows(data, columns)))


def test_the_federation_of_the_page(files):
    nodes = {1: node(files, "north", str(files / "north.csv")), 2: node(files, "south", f"{files / 'mydata.py'}:load")}
    link = MessageLink({number: answering(each) for number, each in nodes.items()})
    trainer = make_server_trainer(files / "federation.yaml", link, SMALL)
    trainer.train()
    assert trainer.rounds[0].refused == {} and trainer.rounds[0].num_examples == 8
    assert trainer.state.log_history[0]["bytes_up"] == trainer.state.log_history[0]["bytes_down"]
    trainer.save_model()
    classify = pipeline("text-classification", model=str(files / "run"))
    assert {each["label"] for each in classify(["fine", "tore"], top_k=None)[0]} == {"good", "bad"}


IMAGES = """\
kind: images
model: [small_cnn]
model_config: '{"channels": [4, 6], "kernel_size": 3, "padding": 1, "hidden_size": 8}'
image_size: 8
method: fedavg
num_clients: 2
min_clients: 2
clients_per_round: 2
validation: watched
rounds: 2
save_strategy: "no"
learning_rate: 0.1
optim: sgd
use_cpu: true
output_dir: run
"""


def write_images(folder, *classes):
    """Dark cats and light dogs, six of a class."""
    chance = np.random.default_rng(len(str(folder)))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels_YX = chance.integers(0, 60, (8, 8)) + 180 * (name == "dog")
            Image.fromarray(pixels_YX.astype(np.uint8)).save(folder / name / f"{number}.png")


def test_folders_of_images_by_class(tmp_path):
    """One client has a class only, whose number is that of the server's."""
    write_images(tmp_path / "watched", "cat", "dog")
    write_images(tmp_path / "north", "dog")
    write_images(tmp_path / "south", "cat", "dog")
    (tmp_path / "federation.yaml").write_text(IMAGES)
    nodes = {number: node(tmp_path, f"node{number}", str(tmp_path / n)) for number, n in enumerate(("north", "south"))}
    link = MessageLink({number: answering(each) for number, each in nodes.items()})
    trainer = make_server_trainer(tmp_path / "federation.yaml", link)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert [report.refused for report in trainer.rounds] == [{}, {}]
    assert trainer.rounds[0].num_examples == 18 and trainer.evaluate()["eval_loss"] < before
    assert trainer.model.config.id2label == {0: "cat", 1: "dog"}
    assert client_rows(str(tmp_path / "north"), {"image_column": None, "label_column": None})["label"] == ["dog"] * 6


def test_a_folder_of_images_without_classes_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'.*empty' has no subfolders: put its images into one for each class"):
        client_rows(str(tmp_path / "empty"), {"image_column": None, "label_column": None})


def test_the_table_of_the_page():
    # fedavg_tuned_at_end is FedAvgReserved by another name.
    assert methods_table(STRATEGIES) in PAGE


def test_the_node_is_told_what_is_wrong_with_its_rows(files):
    write_rows(files / "other.csv", ("a dress", "lovely"))
    link = MessageLink({1: answering(node(files, "north", str(files / "other.csv")))})
    trainer = make_server_trainer(files / "federation.yaml", link, SMALL)
    link.forget, link.pause = None, 0.0
    trainer.roster.open(None)
    trainer.roster.welcome()
    (answer,) = link.receive()
    assert b"'label' of the client's rows has classes that the others have not: lovely" in answer.packed


@pytest.mark.parametrize(
    "told, words",
    [
        ({"partition": "iid"}, "`partition` is 'iid', which says nothing where clients are elsewhere"),
        (
            {"secure_aggregation": True},
            "`secure_aggregation` is True, but there is none: Flower 1.42",
        ),
        ({"kind": "sounds"}, "`kind` is 'sounds': choose from texts, images"),
        ({"kind": "images"}, "There is no setting 'peft'"),
        ({"min_clients": 3}, "`min_clients` is 3: give 1 to 2, all clients"),
        ({"round_timeout": 0}, "`round_timeout` is 0.0: give seconds above 0"),
        ({"method": "l2sgd", "peft": "none"}, "'l2sgd' cannot run there: the server changes rows that stay"),
        ({"method": "cent_moe"}, "`method` is 'cent_moe', which has no clients"),
        ({"learning_rat": 1}, "There is no setting 'learning_rat': is it learning_rate"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_starts(told, words, files):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_server_trainer(files / "federation.yaml", MessageLink({}), told)


def test_a_file_says_how_many_clients_there_are(files):
    (files / "few.yaml").write_text("model: [gpt2-reviews]\n")
    with pytest.raises(ValueError, match="`num_clients` is missing"):
        read_federation(files / "few.yaml")


def test_data_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`data` names the file '.*gone.py', which is not there"):
        client_rows(f"{tmp_path / 'gone.py'}:load", {})
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"`data` names the function 'load', which '.*empty.py' has not"):
        client_rows(f"{tmp_path / 'empty.py'}:load", {})
