"""Greetings: who is greeted, when again, and when no more."""

import numpy as np

from hf_fedmoe.deployment.link import Answer
from hf_fedmoe.deployment.messages import Message
from hf_fedmoe.deployment.roster import Identity, Roster


class OneNode:
    """A link to node 7, which notes what it is told."""

    pause = 0.0

    def __init__(self):
        self.sent, self.forgotten = [], []

    def nodes(self):
        return {7}

    def send(self, node, kind, packed):
        self.sent.append(f"{kind} {len(self.sent) + 1}")
        return self.sent[-1]

    def forget(self, message_id):
        self.forgotten.append(message_id)


def opened(tmp_path):
    roster = Roster(OneNode(), tmp_path, np.zeros(1, dtype=int), {})
    roster.open(Identity("a", "b"))
    return roster, roster.link


def test_one_that_has_answered_is_not_greeted_again(tmp_path, monkeypatch):
    """Nobody waits any more for the answer to a first greeting that was lost."""
    monkeypatch.setattr("hf_fedmoe.deployment.roster.PATIENCE_SECONDS", -1)
    roster, link = opened(tmp_path)
    roster.welcome()
    roster.welcome()
    facts = {"node": "x", "client": None, "num_examples": 12, "start": {}, "layout": "a", "frozen": "b"}
    assert roster.take(Answer("hello 2", Message("node", facts).pack()))
    roster.welcome()
    assert roster.connected == {0: 7} and roster.sizes_M.tolist() == [12]
    assert link.sent == ["hello 1", "hello 2"] and link.forgotten == ["hello 1"]
    assert not roster.take(Answer("hello 1", b""))


def test_one_that_sends_no_answer_is_not_greeted_again_and_one_that_lost_it_is(tmp_path):
    roster, link = opened(tmp_path)
    for lost, expected in ((True, 2), (False, 2)):
        roster.welcome()
        assert roster.take(Answer(link.sent[-1], None, "pieces are missing", lost=lost))
        roster.welcome()
        roster.welcome()
        assert len(link.sent) == expected and roster.connected == {}
