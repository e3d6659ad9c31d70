"""
The nine faults of an upload: refused by name where clients are simulated and where they send messages.

Senders of the ninth (twice, unknown, late, of an old round) are in test_failures.py and test_soundness.py.
"""

import copy
import json

import numpy as np
import pytest
import torch

from hf_fedmoe.deployment import Answer, Message, MessageError, Node, NodeTrainer, ServerDataset, ServerTrainer
from hf_fedmoe.deployment.roster import Roster
from hf_fedmoe.federation import Processes, read_json, write_json
from hf_fedmoe.federation.participants import Reply
from hf_fedmoe.federation.uploads import Rows, UploadMemory
from hf_fedmoe.strategies import AFL, QFFL, FedAvg
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import image_model
from tests.message_link import MessageLink, answering
from tests.tiny_federation import tiny_args, tiny_federation
from tests.tiny_images import tiny_image_federation, tiny_processor


NORMALISATION = "resnet.embedder.embedder.normalization"
WEIGHT, COUNT = f"{NORMALISATION}.weight", f"{NORMALISATION}.num_batches_tracked"
NAN, INF = float("nan"), float("inf")


def weight(value):
    """A payload, or a message, in which one weight has another value."""

    def in_row(payload, layout):
        layout.views(payload.row_P)[WEIGHT][1] = value

    def in_message(message):
        message.tensors[f"row/{WEIGHT}"][1] = value

    return in_row, in_message


def report(name, value):
    return lambda payload, layout: setattr(payload, name, value), lambda message: message.facts.update({name: value})


def row(change):
    return lambda payload, layout: setattr(payload, "row_P", change(payload.row_P))


def tensor(name, change):
    def act(message):
        message.tensors[name] = change(message.tensors[name])

    return act


def count(change):
    def in_integers(payload, layout):
        payload.integers[COUNT] = change(payload.integers[COUNT])

    return in_integers, tensor(f"integers/{COUNT}", change)


OF_WEIGHT = f"row/{WEIGHT}"
# By the fault: how a payload has it, how a message has it, and what is said of each.
FAULTS = {
    "1 not a number": (*weight(NAN), f"`{WEIGHT}` holds values that are not finite", ""),
    "1 infinite": (*weight(-INF), f"`{WEIGHT}` holds values that are not finite", ""),
    "2 negative examples": (*report("num_examples", -12), "it reports num_examples = -12, and is registered with", ""),
    "3 a shape that would broadcast": (
        row(lambda row_P: row_P[:1]),
        tensor(OF_WEIGHT, lambda t: t[:1]),
        "its weights are a (1,) row of torch.float32, expected (",
        f"it sends (1,) as `{OF_WEIGHT}`, where (4,) is due",
    ),
    "3 a count that would broadcast": (
        *count(lambda t: t[None]),
        f"it sends (1,) of torch.int64 as `{COUNT}`, expected () of torch.int64",
        f"it sends (1,) as `integers/{COUNT}`, where () is due",
    ),
    "4 another shape": (
        row(lambda row_P: row_P.repeat(2)),
        tensor(OF_WEIGHT, lambda t: t.repeat(2)),
        "row of torch.float32, expected (",
        f"it sends (8,) as `{OF_WEIGHT}`, where (4,) is due",
    ),
    "5 a count in part": (
        *count(lambda t: t + 0.5),
        f"it sends () of torch.float32 as `{COUNT}`, expected () of torch.int64",
        f"`integers/{COUNT}` is of torch.float32, and torch.int64, which is due, does not hold the same numbers",
    ),
    "5 a count below 0": (*count(lambda t: t - 100), f"`{COUNT}` is -97, which is no count of batches", ""),
    "5 an absurd count": (*count(lambda t: t + 2**60), f"`{COUNT}` is {2**60 + 3}, which is no count of batches", ""),
    "6 a billion examples": (*report("num_examples", 10**9), "= 1000000000, and is registered with 12", ""),
    "7 a type that holds other numbers": (
        row(lambda row_P: row_P.double()),
        tensor(OF_WEIGHT, lambda t: t.double() + 1e-12),
        "row of torch.float64, expected (",
        f"`{OF_WEIGHT}` is of torch.float64, and torch.float32, which is due, does not hold the same numbers",
    ),
    "8 no examples": (*report("num_examples", 0), "it reports num_examples = 0, and is registered with 12", ""),
}


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    """The participants of a simulation, and the sound upload of its client 0."""
    args = tiny_args(tmp_path_factory.mktemp("simulation"), clients_per_round=1)
    data = tiny_image_federation(1)
    run = FederatedTrainer(image_model("fedavg"), args, data, FedAvg(), processing_class=tiny_processor())
    participants = run._federation().participants
    task = participants.task(0, 0, torch.zeros_like(participants.server.bank_SP[0]))
    payload, _ = participants.strategy.train_client(participants.local_trainer, task)
    return participants, task, payload


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """The engine of a server, what it has asked its one client for, and the sound answer."""
    folder, data = tmp_path_factory.mktemp("deployment"), tiny_image_federation(1)

    def make_trainer(settings):
        args = tiny_args(folder / "trainer")
        return NodeTrainer(
            image_model("fedavg"), args, data.client(0), FedAvg(), num_labels=4, processing_class=tiny_processor()
        )

    node = Node(folder / "node", make_trainer, 0)
    server = ServerTrainer(
        image_model("fedavg"),
        tiny_args(folder / "server", clients_per_round=1),
        ServerDataset(1, data.reserved, data.validation),
        MessageLink({100: answering(node)}),
        strategy=FedAvg(),
        processing_class=tiny_processor(),
    )
    server.open()
    engine = server._federation().engine
    engine.refresh_sizes()
    asked = engine.prepare(0, 0, 0)
    return engine, asked, node.answer(Message.unpack(engine.message(asked).pack()))


def received(deployment, forge=lambda message: None):
    engine, asked, answer = deployment
    message = copy.deepcopy(answer)
    forge(message)
    asked.reply, asked.answer = Reply(), Message.unpack(message.pack())
    rows = Rows(engine.server, UploadMemory(engine.server), Processes(), [0], [[0]], "rows", [{}])
    engine.receive(asked, rows)
    return asked.reply, rows


def test_sound_uploads_have_no_fault(simulation, deployment):
    participants, task, payload = simulation
    reply, _ = participants.train(0, 0, task.out_P, (task, copy.deepcopy(payload)))
    assert reply.fault is None
    reply, rows = received(deployment)
    assert reply.fault is None and 0 in rows.tensors


@pytest.mark.parametrize("name", FAULTS)
def test_a_simulated_client_is_refused_by_name(name, simulation):
    forge, _, words, _ = FAULTS[name]
    participants, task, payload = simulation
    payload = copy.deepcopy(payload)
    forge(payload, participants.server.layout)
    reply, _ = participants.train(0, 0, task.out_P, (task, payload))
    assert words in reply.fault


@pytest.mark.parametrize("name", FAULTS)
def test_a_client_elsewhere_is_refused_by_name(name, deployment):
    _, forge, words, own_words = FAULTS[name]
    reply, rows = received(deployment, forge)
    assert (own_words or words) in reply.fault and rows.tensors == {}


def test_another_type_that_holds_the_same_numbers_is_taken(deployment):
    _, plain = received(deployment)
    as_double = tensor(OF_WEIGHT, lambda t: t.double())
    as_int32 = tensor(f"integers/{COUNT}", lambda t: t.int())

    def forge(message):
        as_double(message)
        as_int32(message)

    reply, rows = received(deployment, forge)
    assert reply.fault is None and torch.equal(rows.rows_nP, plain.rows_nP)
    assert reply.integers[COUNT].dtype == torch.int64 and reply.integers[COUNT] == 3


def test_half_precision_is_taken_where_it_is_exact(deployment):
    reply, rows = received(deployment, tensor(OF_WEIGHT, lambda t: torch.full_like(t, 0.5).half()))
    layout = deployment[0].server.layout
    assert reply.fault is None and torch.equal(layout.views(rows.rows_nP[0])[WEIGHT], torch.full((4,), 0.5))


def test_a_count_that_is_left_out_is_refused(deployment):
    reply, _ = received(deployment, lambda message: message.tensors.pop(f"integers/{COUNT}"))
    assert reply.fault == f"it sends nothing as `integers/{COUNT}`, where () is due"


def test_reports_that_are_no_numbers_of_a_computer_are_refused(deployment):
    reply, _ = received(deployment, lambda message: message.facts["metrics"].update(steps=10**400))
    assert reply.fault == "it reports a number of 1329 bits as steps"


@pytest.mark.parametrize("name", ["loss\nRound 2 goes on", "x" * 101])
def test_metrics_have_names_that_can_be_told(name, deployment):
    reply, _ = received(deployment, lambda message: message.facts["metrics"].update({name: INF}))
    assert "where a printable name is due" in reply.fault and "\n" not in reply.fault


@pytest.mark.parametrize("value", [NAN, INF, 1e39, -1e39])
def test_reports_that_would_overflow_are_refused(value, simulation, deployment):
    participants, task, payload = simulation
    payload = copy.deepcopy(payload)
    payload.metrics["start_loss"] = value
    reply, _ = participants.train(0, 0, task.out_P, (task, payload))
    elsewhere, _ = received(deployment, lambda message: message.facts["metrics"].update(start_loss=value))
    assert reply.fault == elsewhere.fault == f"it reports start_loss = {value}"


def test_a_report_by_which_clients_are_weighed_must_be_there(simulation):
    participants, _, payload = simulation
    payload = copy.deepcopy(payload)
    missing = "it reports no start_loss, by which it would be weighed"
    assert AFL().upload_fault(participants.server, payload) == missing
    payload.metrics["start_loss"] = -1.0  # a loss of one's own may be
    assert AFL().upload_fault(participants.server, payload) is None
    assert QFFL().upload_fault(participants.server, payload) == missing.replace("start_loss", "learning_rate")
    payload.metrics["learning_rate"] = -0.1
    assert (
        QFFL().upload_fault(participants.server, payload) == "it reports learning_rate = -0.1, where 0 or more is due"
    )


def test_uploads_of_which_none_weighs_anything_end_the_run_with_the_reason(tmp_path):
    class NoExamples(FedAvg):
        def train_client(self, local, task):
            payload, kept = super().train_client(local, task)
            payload.num_examples = 0
            return payload, kept

    data, processor = tiny_image_federation(), tiny_processor()
    run = FederatedTrainer(image_model("fedavg"), tiny_args(tmp_path), data, NoExamples(), processing_class=processor)
    reason = "it reports num_examples = 0, and is registered with 12"
    with pytest.raises(RuntimeError, match=rf"No client of round 1 sent a sound model. client \d, .*: {reason}"):
        run.train()


# Who registers


def registered(deployment, **changes):
    """The reason why a node cannot take part."""
    roster = deployment[0].roster
    hello = {"node": "another", "client": 0, "num_examples": 12, "start": {}, **vars(roster.identity), **changes}
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        roster._register(101, Message("node", hello))
    return str(caught.value)


def test_nodes_that_cannot_be_are_refused_when_they_come(deployment):
    many = "it reports 1000000000 examples, where 1 to 1000000 (`max_client_examples`) are due"
    assert registered(deployment, num_examples=10**9) == many
    assert "it reports True examples" in registered(deployment, num_examples=True)
    assert registered(deployment, client=0).startswith("it is configured as client 0, which another node is")
    assert registered(deployment, client=None) == "all 1 clients have a node: raise `num_clients`"
    assert registered(deployment, client=7) == "it is configured as client 7, and clients are 0 to 0"
    registered(deployment, start=[1, 2])
    assert deployment[0].roster.sizes_M.tolist() == [12]


def test_what_nodes_are_known_by_is_not_for_the_hub(deployment, tmp_path):
    roster = deployment[0].roster
    assert roster.path.name.startswith("_") and set(read_json(roster.path)["clients"].values()) == {0}
    table = {"run": "r", "clients": {"a text that only the node has": 0}}
    write_json(tmp_path / "clients.json", table)  # as it was once called
    found = Roster(MessageLink({}), tmp_path, np.zeros(1, dtype=int), {})
    assert found.numbers == table["clients"] and [path.name for path in tmp_path.iterdir()] == ["_nodes.json"]


def test_the_bound_of_examples_is_a_setting(tmp_path):
    data = tiny_federation(1)
    rows, link = ServerDataset(1, validation=data.validation), MessageLink({})
    with pytest.raises(ValueError, match="`max_client_examples` is 0: give at least 1"):
        ServerTrainer(image_model("fedavg"), tiny_args(tmp_path), rows, link, max_client_examples=0)


def test_a_message_of_impossible_shapes_is_none():
    shape = {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}  # of which PyTorch has no strides
    header = json.dumps({"__metadata__": {"hf_fedmoe": '{"protocol": 1, "kind": "trained"}'}, "row/x": shape}).encode()
    with pytest.raises(MessageError, match=r"bytes are no message: ValueError: 'row/x' has the shape"):
        Message.unpack(len(header).to_bytes(8, "little") + header)


def test_who_sends_a_message_does_not_write_the_log(deployment):
    engine, asked, _ = deployment
    asked.reply, asked.message_ids, asked.answered = Reply(), ["1"], False
    fault = "no memory\n\x1b[2KRound 9 goes on\u202e \ud800 " + "x" * 10_000
    engine.take(Answer("1", Message("failed", {"fault": fault}).pack()), [asked])
    told = asked.reply.fault
    assert told.startswith(r"no memory \x1b[2KRound 9 goes on\u202e \ud800 xxx") and told.isprintable()
    assert len(told) < 1100 and told.endswith("...")


def test_bytes_that_are_too_deep_are_no_message():
    facts = "[" * 100_000
    header = ('{"__metadata__": {"hf_fedmoe": "' + facts + '"}}').encode()
    with pytest.raises(ValueError, match=r"bytes are no message: RecursionError"):
        Message.unpack(len(header).to_bytes(8, "little") + header)
