"""Flower as the link: its messages carry ours, its apps are a server and nodes. Needs `hf_fedmoe[flower]`."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_fedmoe.deployment import Answer, Message
from tests.message_link import answering, tiny_node, tiny_run, tiny_server
from tests.tiny_federation import assert_equal_states, state, tiny_federation


flower = pytest.importorskip("flwr.app")

from hf_fedmoe.deployment import FlowerLink, client_app, server_app  # noqa: E402
from hf_fedmoe.deployment.flower_link import from_record, to_record  # noqa: E402


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def identity():
    """Flower's processes say who they are before they make a message."""
    identity = import_module("flwr.supercore.task_identity").TaskIdentity
    identity.run_id, identity.node_id, identity.task_id = 1, 0, 1


class Grid:
    """Flower's `Grid` in one process: SuperNodes are functions from message to message."""

    def __init__(self, nodes):
        self.nodes, self.replies, self.count = nodes, {}, 0

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        (message,) = messages
        self.count += 1
        message.metadata.__dict__["_message_id"] = name = f"message {self.count}"
        self.replies[name] = self.nodes[message.metadata.dst_node_id](message)
        return [name]

    def pull_messages(self, message_ids):
        return [self.replies.pop(name) for name in message_ids if name in self.replies]


def test_a_record_holds_the_bytes_and_nothing_else():
    packed = Message("hello", {"run": "abc"}).pack()
    record = to_record([packed])
    assert from_record(record) == packed and len(record["hf_fedmoe"]) == 0
    with pytest.raises(ValueError, match="holds no message of hf_fedmoe"):
        from_record(flower.RecordDict())
    pickled = flower.Array(dtype="object", shape=(1,), stype="pickle", data=b"x")
    with pytest.raises(ValueError, match="holds an array as 'pickle', where 'safetensors' is due"):
        from_record(flower.RecordDict({"hf_fedmoe": flower.ArrayRecord({"0": pickled})}))


def test_apps_over_a_grid_end_with_the_bits_of_our_own_link(tmp_path, capsys):
    data = tiny_federation(2)
    makers = [tiny_node(tmp_path / f"maker{client}", "fedprox", client, data, 0.25).make_trainer for client in (0, 1)]
    app = [client_app(lambda settings, context, make=make: make(settings)) for make in makers]

    def node(client):
        config = {"folder": str(tmp_path / f"node{client}"), "client": client}
        context = flower.Context(1, client, config, flower.RecordDict(), {})
        return lambda message: app[client](message=message, context=context)

    trainers = []

    def make_trainer(link, context):
        trainers.append(tiny_server(tmp_path / "server", "fedprox", link, data, min_clients=2, client_test_share=0.25))
        return trainers[-1]

    link = FlowerLink(Grid({}))
    assert list(link.receive()) == []
    context = flower.Context(1, 0, {}, flower.RecordDict(), {})
    server_app(make_trainer)(Grid({100 + client: node(client) for client in range(2)}), context)
    assert re.search(r"^2 clients tested on own rows: accuracy 0\.\d+, bottom decile", capsys.readouterr().out, re.M)
    ours = tiny_run(tmp_path / "ours", "fedprox", data, test_share=0.25)
    assert_equal_states(state(trainers[0].model), state(ours.model))
    assert [score.test_size for score in trainers[0].client_table] == [3, 3]
    assert (tmp_path / "server" / "README.md").is_file()
    # Nobody who has apps calls `train`, which is what a trainer that is stopped names otherwise.
    assert trainers[0].goes_on_by == "the same server, started again,"


def test_a_record_holds_pieces():
    """Has Flower take pieces apart and put them together, also where some are alike, as zeros are."""
    inflate = import_module("flwr.supercore.inflatable.inflatable_utils").inflate_object_from_contents
    nested = import_module("flwr.supercore.inflatable.inflatable_object").get_all_nested_objects
    pieces = [*[b"0000"] * 9, b"1234", b"0000", b"567"]
    record = to_record(pieces)
    assert [piece.data for piece in record["hf_fedmoe"].values()] == pieces
    contents = {name: each.deflate() for name, each in nested(record).items()}
    assert from_record(inflate(record.object_id, contents)) == b"".join(pieces)
    assert from_record(to_record([])) == b""
    record = to_record(pieces)
    del record["hf_fedmoe"]["3"]
    with pytest.raises(ValueError, match="holds no message of hf_fedmoe"):
        from_record(record)


def test_answers_are_pulled_one_by_one_in_the_order_of_the_messages():
    grid = Grid({node: lambda message: flower.Message(to_record([b"x"]), reply_to=message) for node in (7, 8, 9)})
    link = FlowerLink(grid)
    names = [link.send(node, "train", [b"x"]) for node in (9, 7, 8)]
    answers = link.receive()
    assert next(answers) == Answer(names[0], b"x")
    assert list(grid.replies) == names[1:]
    link.forget(names[1])
    assert list(answers) == [Answer(names[2], b"x")]
    assert list(grid.replies) == [names[1]]


def test_errors_of_flower_are_faults(tmp_path):
    error = flower.Error(code=3, reason="the SuperNode has gone")
    grid = Grid({7: lambda message: flower.Message(error, reply_to=message)})
    link = FlowerLink(grid)
    name = link.send(7, "train", [b"x"])
    assert list(link.receive()) == [Answer(name, None, "Flower's error 3, the SuperNode has gone", lost=True)]
    name = link.send(7, "train", [b"x"])
    link.forget(name)
    assert list(link.receive()) == []
    grid.push_messages = lambda messages: [None]
    with pytest.raises(ConnectionError, match="SuperLink does not take the message"):
        link.send(7, "train", [b"x"])


def test_a_record_that_lacks_pieces_is_the_node_s_own_fault():
    def without_its_first_piece(message):
        record = to_record([b"x"])
        record["hf_fedmoe"]["1"] = record["hf_fedmoe"].pop("0")
        return flower.Message(record, reply_to=message)

    link = FlowerLink(Grid({7: without_its_first_piece}))
    name = link.send(7, "train", [b"x"])
    assert list(link.receive()) == [Answer(name, None, "the record holds no message of hf_fedmoe", lost=False)]


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_the_app_at_a_node_hands_bytes_to_its_own_process(kind, tmp_path):
    import threading
    from multiprocessing.connection import Listener

    from hf_fedmoe.deployment.launching import CLIENT_APP
    from hf_fedmoe.deployment.relay import FAMILY, serve

    node = tiny_node(tmp_path / "node", "fedavg", 0, tiny_federation(2))
    socket = tmp_path / "s"
    ended = threading.Event()
    supernode = SimpleNamespace(wait=lambda: ended.wait() and 3, poll=lambda: 3 if ended.is_set() else None)
    codes = []
    names = {}
    exec(compile(CLIENT_APP, "hf_fedmoe_client_app.py", "exec"), names)
    context = flower.Context(1, 1, {"socket": str(socket)}, flower.RecordDict(), {})
    hello = Message("hello", {"run": "abc", "settings": {}}).pack()
    with Listener(str(socket), FAMILY) as listener:
        server = threading.Thread(target=lambda: codes.append(serve(node, socket, supernode, listener)))
        server.start()
        asked = flower.Message(to_record([hello]), dst_node_id=1, message_type=kind)
        reply = names["app"](message=asked, context=context)
        ended.set()
        server.join(10)
    assert codes == [3]
    assert Message.unpack(from_record(reply.content)).facts == Message.unpack(answering(node)(hello)).facts


@pytest.mark.slow
def test_three_hospitals_over_real_flower(tmp_path):
    """A SuperLink and three SuperNodes: minutes, of which most are imports."""
    script = REPOSITORY / "examples" / "three_hospitals" / "run.py"
    command = [sys.executable, str(script), "--folder", str(tmp_path), "--port", "8340", "--rows", "40"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert re.search(r"stars?  I love it, .*\n *\d stars?  Terrible quality", result.stdout)
    log = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["refused_clients"] for entry in log if "bytes_up" in entry] == [0, 0, 0]
