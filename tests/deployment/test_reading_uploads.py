"""Forged uploads are refused by name, and nothing of them reaches the server."""

import copy
from dataclasses import replace

import pytest
import torch

from hf_fedmoe.deployment import Message, MessageError
from hf_fedmoe.deployment.reading_uploads import read_upload
from hf_fedmoe.federation import Processes
from hf_fedmoe.federation.participants import Reply
from hf_fedmoe.federation.uploads import Rows, UploadMemory
from tests.message_link import MessageLink, answering, tiny_node, tiny_server
from tests.tiny_federation import tiny_federation


def changed(**changes):
    """An upload in which some tensors are others, or gone where they are `None`."""

    def act(message):
        for name, change in changes.items():
            name = name.replace("__", "/", 1)
            if change is None:
                del message.tensors[name]
            else:
                message.tensors[name] = change(message.tensors.get(name))

    return act


def facts(**changes):
    return lambda message: message.facts.update(changes)


WEIGHT = "row__classifier.weight"
FORGERIES = {
    "another shape": (changed(**{WEIGHT: lambda t: t[:2]}), r"it sends \(2, 16\) as `row/classifier.weight`, where"),
    "another type": (changed(**{WEIGHT: lambda t: t.double() + 1e-12}), "is of torch.float64, and torch.float32, wh"),
    "another kind": (changed(**{WEIGHT: lambda t: t.long()}), "is of torch.int64, and torch.float32, which is due"),
    "missing": (changed(**{WEIGHT: None}), "it sends nothing as `row/classifier.weight`, where"),
    "unknown": (changed(row__trojan=lambda t: torch.zeros(3)), r"it sends \(3,\) as `row/trojan`, where nothing is"),
    "beside": (changed(beside__x=lambda t: torch.zeros(3)), "as `beside/x`, where nothing is due"),
    "no name": (changed(pickle__x=lambda t: torch.zeros(3)), "as `pickle/x`, where nothing is due"),
    "not finite": (changed(**{WEIGHT: lambda t: t * float("nan")}), "`classifier.weight` holds values that are not"),
    "too large": (changed(**{WEIGHT: lambda t: t * 1e30}), "`classifier.weight` holds .*, too much to compute with"),
    "examples": (facts(num_examples=13), "it reports num_examples = 13, and is registered with 12"),
    "no number": (facts(num_examples="12"), "it reports num_examples = '12', where a number is due"),
    "loss": (facts(metrics={}), r"it reports the metrics \[\], without a `loss`"),
    "metrics": (facts(metrics={"loss": float("inf")}), "it reports loss = inf"),
    "of another": (facts(client=2), "it sends an upload of client 2, where that of 0 is due"),
}


@pytest.fixture(scope="module")
def asked_and_answer(tmp_path_factory):
    """An engine, what it has asked its one client for, and the sound answer."""
    folder, data = tmp_path_factory.mktemp("one"), tiny_federation(1)
    node = tiny_node(folder / "node", "fedavg", 0, data)
    link = MessageLink({100: answering(node)})
    server = tiny_server(folder / "server", "fedavg", link, data, clients_per_round=1)
    server.open()
    engine = server._federation().engine
    engine.refresh_sizes()
    asked = engine.prepare(0, 0, 0)
    return engine, asked, node.answer(Message.unpack(engine.message(asked).pack()))


def receive(asked_and_answer, message):
    """Returns the fault of an upload, and the row that the method would see."""
    engine, asked, _ = asked_and_answer
    asked.reply, asked.answer = Reply(), message
    server = engine.server
    rows = Rows(server, UploadMemory(server), Processes(), [0], [[0]], "rows", [{}])
    engine.receive(asked, rows)
    return asked.reply.fault, rows


def test_a_sound_upload_is_taken(asked_and_answer):
    fault, rows = receive(asked_and_answer, asked_and_answer[2])
    assert fault is None and 0 in rows.tensors


def test_a_count_that_is_left_out_is_asked_for(asked_and_answer, monkeypatch):
    engine, asked, answer = asked_and_answer
    asked = replace(asked, names=asked.names | {"count"})
    monkeypatch.setattr(engine.server, "integers", [{"count": torch.tensor(3)}])
    out_P = torch.empty_like(engine.server.bank_SP[0])
    with pytest.raises(MessageError, match="it sends nothing as `integers/count`"):
        read_upload(answer, asked, engine.server, None, out_P)
    count = torch.tensor(5)
    message = replace(answer, tensors=answer.tensors | {"integers/count": count})
    found = read_upload(message, asked, engine.server, None, out_P).integers
    assert found == {"count": count} and found["count"].data_ptr() != count.data_ptr()  # no view of the message


def test_counts_are_where_the_servers_models_are(asked_and_answer, monkeypatch):
    engine, asked, answer = asked_and_answer
    on_device = {name: torch.tensor(3, device="meta") for name in ("count", "kept")}
    monkeypatch.setattr(engine.server, "integers", [on_device])
    message = replace(answer, tensors=answer.tensors | {"integers/count": torch.tensor(5)})
    out_P = torch.empty_like(engine.server.bank_SP[0], device="meta")
    asked = replace(asked, names=asked.names | {"count"})
    found = read_upload(message, asked, engine.server, None, out_P).integers
    assert {name: tensor.device.type for name, tensor in found.items()} == {"count": "meta", "kept": "meta"}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_uploads_are_refused_by_name(name, asked_and_answer):
    forge, words = FORGERIES[name]
    message = copy.deepcopy(asked_and_answer[2])
    forge(message)
    fault, rows = receive(asked_and_answer, Message.unpack(message.pack()))
    assert rows.tensors == {}
    with pytest.raises(ValueError, match=words):
        raise ValueError(fault)


def test_an_update_that_a_node_has_not_shortened_is_shortened_by_the_server(tmp_path):
    data = tiny_federation(1)
    node = tiny_node(tmp_path / "node", "fedavg", 0, data)
    link = MessageLink({100: answering(node)})
    server = tiny_server(tmp_path / "server", "fedavg", link, data, clients_per_round=1, max_update_norm=0.01)
    server.open()
    engine = server._federation().engine
    engine.refresh_sizes()
    asked = engine.prepare(0, 0, 0)
    fault, rows = receive((engine, asked, None), node.answer(Message.unpack(engine.message(asked).pack())))
    norm = (rows.rows_nP[0] - asked.task.received_P).norm().item()
    assert fault is None and 0.01 * (1 - 1e-3) < norm <= 0.01 * (1 + 2e-3)
