"""Nodes that die, hang, come back, are late, say things twice or say old things, and servers that are killed."""

import pytest

from hf_fedmoe.deployment import Answer, Message
from tests.message_link import MessageLink, answering, tiny_node, tiny_run, tiny_server
from tests.tiny_federation import assert_equal_states, state, tiny_federation


# Clients keep something, their optimizer and what `top_k` left out, and a checkpoint is written after each round.
KEEPS = {"save_strategy": "steps", "keep_client_optimizer": True, "clients_per_round": 3}


class Killed(BaseException):
    """The server's process is gone."""


def nodes_of(folder, name, **changes):
    data = tiny_federation(3)
    return [tiny_node(folder / f"node{client}", name, client, data, **changes) for client in range(3)]


def link_to(nodes):
    return MessageLink({100 + place: answering(node) for place, node in enumerate(nodes)})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("whole"), "fedavg_top_k", tiny_federation(3), **KEEPS)


def start(tmp_path, link, name="fedavg_top_k", **changes):
    return tiny_server(tmp_path / "server", name, link, tiny_federation(3), **KEEPS | changes)


def in_train(round_index, act):
    """Wraps a node: `act(packed, answer)` takes the place of its answer in a round."""

    def wrap(answer):
        def answered(packed):
            message = Message.unpack(packed)
            if message.kind == "train" and message.facts["round"] == round_index:
                return act(packed, answer)
            return answer(packed)

        return answered

    return wrap


def test_one_that_dies_is_missing_in_its_round_and_the_others_go_on(tmp_path):
    link = link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS))

    def die(packed, answer):
        del link.answers[101]
        return None

    link.answers[101] = in_train(1, die)(link.answers[101])
    server = start(tmp_path, link, min_clients=2, round_timeout=0.2)
    server.train()
    assert [report.refused for report in server.rounds] == [
        {},
        {1: "no answer in `round_timeout` = 0.2 s"},
        {1: "no node of this client is connected"},
    ]
    assert server.rounds[2].num_examples == 24


def test_one_that_hangs_is_waited_for_no_longer_than_the_timeout(tmp_path):
    link = link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS))
    link.answers[102] = in_train(0, lambda packed, answer: None)(link.answers[102])
    server = start(tmp_path, link, min_clients=2, round_timeout=0.2, rounds=2)
    server.train()
    assert [sorted(report.refused) for report in server.rounds] == [[2], []]


def test_one_that_comes_back_in_time_ends_with_the_bits_of_a_run_without_failures(tmp_path, uninterrupted):
    nodes = nodes_of(tmp_path, "fedavg_top_k", **KEEPS)
    link = link_to(nodes)

    def die_and_come_back(packed, answer):
        answer(packed)  # it has trained and kept what it keeps, but its answer is lost
        del link.answers[101]
        data = tiny_federation(3)
        link.answers[201] = answering(tiny_node(tmp_path / "node1", "fedavg_top_k", 1, data, **KEEPS))
        return None

    link.answers[101] = in_train(1, die_and_come_back)(link.answers[101])
    server = start(tmp_path, link, min_clients=3)
    server.train()
    assert [report.refused for report in server.rounds] == [{}, {}, {}]
    assert_equal_states(state(server.model), state(uninterrupted.model))


def test_one_that_is_late_takes_part_from_then_on(tmp_path):
    link = link_to(nodes_of(tmp_path, "scaffold"))
    late = link.answers.pop(102)
    link.answers[100] = in_train(1, lambda packed, answer: link.answers.setdefault(102, late) and answer(packed))(
        link.answers[100]
    )
    server = start(tmp_path, link, "scaffold", min_clients=2, round_timeout=0.2, rounds=4)
    server.train()
    assert sorted(server.rounds[0].refused) == [2]
    assert server.rounds[3].refused == {}
    # Methods that divide by all clients' examples know of it too.
    assert server._federation_of_the_last_round().server.num_examples == 36


def test_what_is_said_twice_counts_once(tmp_path, uninterrupted):
    class Echo(MessageLink):
        def receive(self):
            came = super().receive()
            return [*came, *came]

    server = start(tmp_path, Echo(link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)).answers), min_clients=3)
    server.train()
    assert_equal_states(state(server.model), state(uninterrupted.model))


def test_an_upload_of_an_old_round_is_refused(tmp_path):
    link, old = link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)), {}
    plain = link.answers[100]

    def repeat(packed):
        answer = plain(packed)
        if Message.unpack(packed).kind == "hello":
            return answer
        return old.setdefault("answer", answer)

    link.answers[100] = repeat
    server = start(tmp_path, link, min_clients=2)
    server.train()
    assert server.rounds[0].refused == {}
    assert server.rounds[2].refused == {0: "it sends an upload of round 0, where that of 2 is due"}


SLOW_RESUMES = ("apfl", "fedmoe_paper_top_k", "fedrep", "scaffold")


@pytest.mark.parametrize(
    "name", ["fedavg_top_k", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_RESUMES)]
)
def test_a_killed_server_is_resumed_and_asks_again_for_the_round_that_was_lost(name, tmp_path):
    # Nodes go on in the memory that they have, or are started again from their folders.
    whole = tiny_run(tmp_path / "whole", name, tiny_federation(3), **KEEPS)
    link = link_to(nodes_of(tmp_path, name, **KEEPS))

    def kill(packed, answer):
        answer(packed)  # this client has trained; the server never hears of it
        raise Killed

    link.answers[101] = in_train(2, kill)(link.answers[101])
    with pytest.raises(Killed):
        start(tmp_path, link, name, min_clients=3).train()
    link = link_to(nodes_of(tmp_path, name, **KEEPS))
    server = start(tmp_path, link, name, min_clients=3)
    server.train(resume_from_checkpoint=True)
    assert len(server.rounds) == 1
    assert_equal_states(state(server.model), state(whole.model))


def test_a_server_that_goes_back_further_finds_what_clients_kept_then(tmp_path, uninterrupted):
    # Of three rounds only the first has a checkpoint when the server is killed in the third.
    changes = {"save_steps": 1}
    link = link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS))

    def kill(packed, answer):
        raise Killed

    link.answers[102] = in_train(2, kill)(link.answers[102])
    with pytest.raises(Killed):
        start(tmp_path, link, min_clients=3, **changes).train()
    first = tmp_path / "server" / "checkpoint-1"
    server = start(tmp_path, link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)), min_clients=3)
    server.train(resume_from_checkpoint=first)
    assert len(server.rounds) == 2
    assert_equal_states(state(server.model), state(uninterrupted.model))


def test_too_few_uploads_end_the_run(tmp_path):
    link = link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS))
    for node in (100, 101):
        link.answers[node] = in_train(
            1, lambda packed, answer: Message("failed", {"fault": "OSError: the disk is full"}).pack()
        )(link.answers[node])
    server = start(tmp_path, link, min_clients=2)
    with pytest.raises(
        RuntimeError, match=r"Round 2 has 1 sound uploads, and `min_clients` is 2. client 0, client 1: "
    ):
        server.train()


def test_bytes_that_are_no_message_are_refused(tmp_path):
    link = link_to(nodes_of(tmp_path, "fedavg"))
    link.answers[100] = in_train(0, lambda packed, answer: b"\x80\x04pickle")(link.answers[100])
    server = start(tmp_path, link, "fedavg", min_clients=2, rounds=1, keep_client_optimizer=False)
    server.train()
    assert server.rounds[0].refused[0].startswith("8 bytes are no message: ")


class Broken(MessageLink):
    """Cannot bring what nodes say of a message whose number is in `lines`."""

    lines: frozenset[str] = frozenset()

    def receive(self):
        return [
            Answer(each.message_id, None, "the line is cut") if each.message_id in self.lines else each
            for each in super().receive()
        ]


def broken(nodes, lines):
    link = Broken(link_to(nodes).answers)
    link.lines = frozenset(lines)
    return link


def test_one_whose_answer_the_transport_cannot_bring_is_asked_again(tmp_path, uninterrupted):
    # Greetings are messages 1 to 3, the tasks of the first round 4 to 6.
    link = broken(nodes_of(tmp_path, "fedavg_top_k", **KEEPS), {"5"})
    server = start(tmp_path, link, min_clients=3)
    server.train()
    assert [report.refused for report in server.rounds] == [{}, {}, {}]
    assert_equal_states(state(server.model), state(uninterrupted.model))


def test_one_whose_answers_never_come_is_missing_when_the_time_is_up(tmp_path):
    link = broken(nodes_of(tmp_path, "fedavg_top_k", **KEEPS), map(str, range(4, 10**5)))
    link.pause = 0.01
    for node in (100, 101):  # these two are heard all the same
        link.answers[node] = unnumbered(link, link.answers[node])
    server = start(tmp_path, link, min_clients=2, round_timeout=1.0, rounds=1)
    server.train()
    assert server.rounds[0].refused == {2: "its node gives no answer: the line is cut"}


def test_one_that_sends_no_message_is_refused_and_does_not_train_again(tmp_path):
    """Asking again would bring the same, and a round that waits for all would never end."""

    class Odd(MessageLink):
        def receive(self):
            for answer in super().receive():
                odd = answer.message_id == "5"  # greetings are 1 to 3, the tasks of the first round 4 to 6
                yield Answer(answer.message_id, None, "pieces are missing", lost=False) if odd else answer

    link = Odd(link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)).answers)
    server = start(tmp_path, link, min_clients=2, round_timeout=60.0, rounds=1)
    server.train()
    assert server.rounds[0].refused == {1: "it sends no message: pieces are missing"} and link.sent == 6


def test_one_that_cannot_answer_a_greeting_is_not_greeted_without_pause(tmp_path):
    class Deaf(MessageLink):
        """Its node 102 runs into an error as soon as it is asked."""

        pause = 0.05

        def receive(self):
            for answer in super().receive():
                deaf = answer.message_id in self.to_deaf
                yield Answer(answer.message_id, None, "the app failed") if deaf else answer

        def send(self, node, kind, pieces):
            name = super().send(node, kind, pieces)
            self.to_deaf += [name] * (node == 102)
            return name

    deaf = Deaf(link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)).answers)
    deaf.to_deaf, looks = [], []

    def nodes():
        looks.append(None)
        return {100, 101, 102} if len(looks) < 25 else {100, 101, 102, 103}

    deaf.nodes = nodes
    deaf.answers[103] = deaf.answers[102]
    start(tmp_path, deaf, min_clients=3, rounds=1).train()
    # Of two dozen looks, 50 ms apart, each tenth may greet it, and the first.
    assert len(looks) >= 25 and 2 <= len(deaf.to_deaf) <= 4


def test_one_whose_answer_to_a_greeting_is_lost_is_greeted_again(tmp_path, monkeypatch):
    """It was killed and is back under its number before anybody saw that it was away."""
    monkeypatch.setattr("hf_fedmoe.deployment.roster.PATIENCE_SECONDS", 0.2)

    class Lossy(MessageLink):
        pause = 0.01

        def receive(self):
            return [answer for answer in super().receive() if answer.message_id != "2"]

    link = Lossy(link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)).answers)
    server = start(tmp_path, link, min_clients=3, rounds=1)
    server.train()
    # Three greetings, one of them again, and three tasks.
    assert server.rounds[0].refused == {} and link.sent == 7


def unnumbered(link, answer):
    def answered(packed):
        link.lines -= {name for name, (_, waiting) in link.waiting.items() if waiting is packed}
        return answer(packed)

    return answered


def test_a_round_that_has_too_few_uploads_asks_again_for_what_was_lost(tmp_path, uninterrupted):
    link, lost = link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)), []

    def lose(packed, answer):
        (name,) = (name for name, (_, waiting) in link.waiting.items() if waiting is packed)
        lost.append(link.waiting.pop(name)[0])  # on its way to the node, which knows nothing of it

    for node in (101, 102):
        plain = link.answers[node]
        losing = in_train(1, lose)(plain)
        link.answers[node] = lambda packed, node=node, losing=losing, plain=plain: (plain if node in lost else losing)(
            packed
        )
    server = start(tmp_path, link, min_clients=3, round_timeout=0.3)
    server.train()
    assert lost == [101, 102] and [report.refused for report in server.rounds] == [{}, {}, {}]
    assert_equal_states(state(server.model), state(uninterrupted.model))


def test_one_that_comes_back_under_its_old_number_is_asked_again(tmp_path, uninterrupted):
    # So Flower knows a node by its key.
    link, away = link_to(nodes_of(tmp_path, "fedavg_top_k", **KEEPS)), []
    plain = link.answers[101]

    def die(packed, answer):
        if not away:
            away.append(link.answers.pop(101))
            link.waiting = {name: each for name, each in link.waiting.items() if each[0] != 101}
            return None
        return plain(packed)

    link.answers[101], looks = in_train(1, die)(plain), []

    def nodes():
        if away and 101 not in link.answers:
            looks.append(None)
            if len(looks) > 3:
                link.answers[101] = plain
        return set(link.answers)

    link.nodes = nodes
    server = start(tmp_path, link, min_clients=3)
    server.train()
    assert len(looks) > 3 and [report.refused for report in server.rounds] == [{}, {}, {}]
    assert_equal_states(state(server.model), state(uninterrupted.model))
