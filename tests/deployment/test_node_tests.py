"""Nodes test the server's model on rows that nobody trains on, and tell two counts."""

import numpy as np
import pytest
import torch

from hf_fedmoe.data import FederatedDataset, hold_out_client_tests
from hf_fedmoe.deployment import Answer, Message
from hf_fedmoe.reporting import read_client_table
from tests.message_link import MessageLink, answering, tiny_node, tiny_server
from tests.tiny_federation import tiny_federation


SHARE = 0.25


def right(trainer, rows):
    """Counts the rows whose class a model finds, one by one."""
    found = 0
    for row in rows:
        batch = trainer.data_collator([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            found += int((trainer.model.eval()(**batch).logits.argmax(-1) == labels).sum())
    return found


@pytest.mark.parametrize("name", ["fedavg", "fedmoe"])
def test_nodes_tell_how_many_of_their_own_rows_the_model_finds(name, tmp_path):
    data = tiny_federation(3)
    nodes = [tiny_node(tmp_path / f"node{client}", name, client, data, SHARE) for client in range(3)]
    sent = []

    def told(client):
        answer = answering(nodes[client])

        def tell(packed):
            answered = answer(packed)
            sent.append(Message.unpack(answered))
            return answered

        return tell

    link = MessageLink({100 + client: told(client) for client in range(3)})
    server = tiny_server(tmp_path / "server", name, link, data, min_clients=3, client_test_share=SHARE)
    server.train()
    assert server.roster.sizes_M.tolist() == [9, 9, 9]  # of twelve rows each
    before = [each._made[1].server.bank_SP.clone() for each in nodes]
    metrics = server.evaluate_clients()
    columns = server._columns_of_clients().column_names
    expected = []
    for client in range(3):
        held = hold_out_client_tests(
            FederatedDataset.from_clients({"here": data.client(client)}), SHARE, seed=server.args.seed
        )
        expected.append(right(server, held.client_test(0).select_columns(columns)))
    assert [score.accuracy * score.test_size for score in server.client_table] == pytest.approx(expected)
    assert 0 < sum(expected) < 9  # or the test could not fail
    assert metrics["clients_accuracy"] == pytest.approx(sum(expected) / 9)
    assert metrics["clients_bottom_decile"] == pytest.approx(np.percentile([each / 3 for each in expected], 10))
    assert metrics["clients_worst"] == pytest.approx(min(expected) / 3) and metrics["clients_tested"] == 3
    assert server.state.log_history[-1]["clients_accuracy"] == metrics["clients_accuracy"]
    table = read_client_table(tmp_path / "server" / "_client_metrics.csv")
    assert [(each.client, each.train_size, each.test_size) for each in table] == [(0, 9, 3), (1, 9, 3), (2, 9, 3)]
    # Two counts and nothing else went up, and nodes are as they were.
    told_of_tests = [message for message in sent if message.kind == "tested"]
    assert [(set(each.facts), each.tensors) for each in told_of_tests] == [
        ({"client", "test_size", "correct"}, {})
    ] * 3
    assert all(torch.equal(each._made[1].server.bank_SP, bank) for each, bank in zip(nodes, before, strict=True))


FORGED = {
    "more than all": ({"correct": 4}, "it says that 4 of 3 test rows are right"),
    "more than can be": ({"test_size": 2_000_000}, "it says that .* of 2000000 test rows are right"),
    "none": ({"test_size": 0, "correct": 0}, "it says that 0 of 0 test rows are right"),
    "no count": ({"correct": True}, "where its client and two counts are due"),
    "of another": ({"client": 1}, "where its client and two counts are due"),
}


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A server and its one node, whose answers to tests a test can change."""
    folder, data, changes = tmp_path_factory.mktemp("one"), tiny_federation(1), {}
    answer = answering(tiny_node(folder / "node", "fedavg", 0, data, SHARE))

    def tell(packed):
        answered = answer(packed)
        message = Message.unpack(answered)
        message.facts.update(changes if message.kind == "tested" else {})
        return message.pack()

    link = MessageLink({100: tell})
    server = tiny_server(
        folder / "server", "fedavg", link, data, client_test_share=SHARE, round_timeout=60.0, clients_per_round=1
    )
    server.open()
    return server, changes


@pytest.mark.parametrize("name", FORGED)
def test_counts_that_cannot_be_are_left_out(name, tested, caplog, monkeypatch):
    server, changes = tested
    forged, words = FORGED[name]
    changes.clear()
    changes.update(forged)
    told = []
    monkeypatch.setattr("hf_fedmoe.deployment.node_tests.logger.warning", told.append)
    with pytest.raises(RuntimeError, match="No node has tested the model"):
        server.evaluate_clients()
    with pytest.raises(ValueError, match=words):
        raise ValueError(told[0])


def test_a_test_that_is_lost_is_asked_for_again(tested, monkeypatch):
    server, changes = tested
    changes.clear()
    link, receive, lost = server.roster.link, server.roster.link.receive, []

    def losing():
        for answer in receive():
            first = not lost and answer.packed is not None and Message.unpack(answer.packed).kind == "tested"
            lost.extend([answer] * first)
            yield Answer(answer.message_id, None, "the app was killed") if first else answer

    monkeypatch.setattr(link, "receive", losing)
    assert server.evaluate_clients()["clients_tested"] == 1 and len(lost) == 1


def test_another_model_and_no_test_rows_are_faults(tmp_path):
    data = tiny_federation(1)
    facts = {"run": "abc", "settings": {}, "client": 0}
    answer = tiny_node(tmp_path / "other", "fedavg", 0, data, SHARE).answer(
        Message("test", facts, {"served/x": torch.zeros(2)})
    )
    assert "MessageError: the server's model has" in answer.facts["fault"]
    answer = tiny_node(tmp_path / "none", "fedavg", 0, data).answer(Message("test", facts))
    assert answer.facts["fault"] == "MessageError: `client_test_share` is 0, and so there are no test rows"


def test_what_cannot_be_tested_is_said_before_training(tmp_path):
    data = tiny_federation(1)
    with pytest.raises(ValueError, match="'apfl' makes a personal model for each client, and nodes test the server's"):
        tiny_server(tmp_path / "server", "apfl", MessageLink({}), data, client_test_share=SHARE, clients_per_round=1)
    server = tiny_server(tmp_path / "server", "fedavg", MessageLink({}), data, clients_per_round=1)
    with pytest.raises(ValueError, match="`client_test_share` is 0, so that nodes hold no rows out"):
        server.evaluate_clients()
