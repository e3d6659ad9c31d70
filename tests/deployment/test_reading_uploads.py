"""Forged uploads are refused by name, and nothing of them reaches the server."""

import copy
from dataclasses import replace

import pytest
import torch

from hf_fedmoe.deployment import Message
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
    "another shape": (changed(**{WEIGHT: lambda t: t[:2]}), r"it sends \(2, 16\) as `row/classifier.weight` of its"),
    "another type": (changed(**{WEIGHT: lambda t: t.half()}), "`row/classifier.weight` is of torch.float16, where"),
    "missing": (changed(**{WEIGHT: None}), "it sends nothing as `row/classifier.weight` of its model, where"),
    "unknown": (changed(row__trojan=lambda t: torch.zeros(3)), r"it sends \(3,\) as `row/trojan` of its model, where"),
    "beside": (changed(beside__x=lambda t: torch.zeros(3)), "as `beside/x` beside its model, where nothing is due"),
    "no name": (changed(pickle__x=lambda t: torch.zeros(3)), "it sends `pickle/x`, which nobody asked for"),
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


def test_a_count_that_is_left_out_is_the_servers(asked_and_answer, monkeypatch):
    engine, asked, answer = asked_and_answer
    asked = replace(asked, names=asked.names | {"count"})
    monkeypatch.setattr(engine.server, "integers", [{"count": torch.tensor(3)}])
    for sent, count in (({}, 3), ({"integers/count": torch.tensor(5)}, 5)):
        message = replace(answer, tensors=answer.tensors | sent)
        payload = read_upload(message, asked, engine.server, None, torch.empty_like(engine.server.bank_SP[0]))
        assert payload.integers == {"count": torch.tensor(count)}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_uploads_are_refused_by_name(name, asked_and_answer):
    forge, words = FORGERIES[name]
    message = copy.deepcopy(asked_and_answer[2])
    forge(message)
    fault, rows = receive(asked_and_answer, Message.unpack(message.pack()))
    assert rows.tensors == {}
    with pytest.raises(ValueError, match=words):
        raise ValueError(fault)
