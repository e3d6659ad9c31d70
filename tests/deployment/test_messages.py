"""Messages are files of safetensors, written in pieces and read where they lie."""

import json

import pytest
import safetensors.torch
import torch

from hf_fedmoe.deployment import Message, MessageError, messages
from tests.message_link import MessageLink, answering, tiny_node, tiny_server
from tests.tiny_federation import tiny_federation


TENSORS = {
    "row/half": torch.arange(5, dtype=torch.float16),
    "row/other order": torch.arange(12.0).view(3, 4).T,
    "row/long": torch.arange(100.0),
    "integers/count": torch.tensor(7),
    "row/none": torch.empty(0, 3),
    "beside/flags": torch.tensor([True, False, True]),
    "row/brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}


def test_messages_are_files_of_safetensors():
    message = Message("trained", {"round": 3}, TENSORS)
    theirs, ours = safetensors.torch.load(message.pack()), Message.unpack(message.pack())
    assert theirs.keys() == ours.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        for found in (theirs[name], ours.tensors[name]):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert (ours.kind, ours.facts) == ("trained", {"round": 3})
    facts = json.dumps({"protocol": 1, "kind": "trained", "round": 3})
    saved = safetensors.torch.save({name: t.contiguous() for name, t in TENSORS.items()}, {"hf_fedmoe": facts})
    assert Message.unpack(saved).facts == ours.facts
    assert all(torch.equal(t, TENSORS[name]) for name, t in Message.unpack(saved).tensors.items())


@pytest.mark.parametrize("dtype", messages.DTYPES.values())
def test_each_type_travels(dtype):
    tensor = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    found = Message.unpack(Message("trained", {}, {"row/x": tensor}).pack()).tensors["row/x"]
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("size", [1, 7, 64, 415, 10_000])
def test_pieces_are_of_one_size_and_alike_where_tensors_are(size, monkeypatch):
    """SuperLink keeps what is alike once: of clients who are sent the same model only headers differ."""
    monkeypatch.setattr(messages, "PIECE_BYTES", size)
    header, *pieces = Message("train", {"client": 1}, TENSORS).pieces()
    assert {len(piece) for piece in pieces[:-1]} <= {size} and 0 < len(pieces[-1]) <= size
    assert sum(map(len, pieces)) == sum(tensor.nbytes for tensor in TENSORS.values())
    other, *others = Message("train", {"client": 1_000_000}, TENSORS).pieces()
    assert others == pieces and other != header
    assert list(Message("hello").pieces()) == [Message("hello").pack()]


def test_tensors_are_views_of_what_came():
    packed = bytearray(Message("trained", {}, TENSORS).pack())
    tensors = Message.unpack(packed).tensors
    start = 8 + int.from_bytes(packed[:8], "little")
    places = sorted(tensor.data_ptr() for tensor in tensors.values() if tensor.numel())
    assert places[0] == torch.frombuffer(packed, dtype=torch.uint8).data_ptr() + start
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())


def test_a_task_and_an_upload_keep_no_part_of_the_message(tmp_path):
    """Or training would have the whole message beside it."""
    data = tiny_federation(1)
    node = tiny_node(tmp_path / "node", "scaffold", 0, data)
    server = tiny_server(
        tmp_path / "server", "scaffold", MessageLink({100: answering(node)}), data, clients_per_round=1
    )
    server.open()
    engine = server._federation().engine
    engine.strategy.setup(engine.server, 1)
    engine.refresh_sizes()
    asked = engine.prepare(0, 0, 0)
    message = Message.unpack(engine.message(asked).pack())
    message.tensors["integers/count"] = torch.tensor(3)
    client = node.trained_client(message.facts)
    came = {tensor.data_ptr() for tensor in message.tensors.values()}
    task = client.task(message, {})
    assert task.received.tensors and task.received.integers
    kept = [task.received_P, *task.received.tensors.values(), *task.received.integers.values()]
    assert not came & {tensor.data_ptr() for tensor in kept}


FORGED = {
    "a hole": ({"a": ("F32", [1], [4, 8])}, 8, "'a' lies at 4 to 8, and 4 bytes from 0 on are due"),
    "an overlap": ({"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [4, 8])}, 8, "'b' lies at 4 to 8, and 4 bytes from"),
    "the same memory": ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [0, 8])}, 8, "'b' lies at 0 to 8"),
    "too short": ({"a": ("F32", [2], [0, 8])}, 7, "'a' lies at 0 to 8"),
    "too long": ({"a": ("F32", [2], [0, 8])}, 9, "1 bytes follow the last tensor"),
    "another size": ({"a": ("F32", [3], [0, 8])}, 8, "and 12 bytes from 0 on are due"),
    "negative": ({"a": ("F32", [-2], [0, -8])}, 0, r"has the shape \[-2\] at 0"),
    "before the header's end": ({"a": ("F32", [2], [-8, 0])}, 0, r"has the shape \[2\] at -8"),
    "a truth as a number": ({"a": ("U8", [True], [0, 1])}, 1, r"has the shape \[True\] at 0"),
    "a fraction": ({"a": ("U8", [1.0], [0, 1])}, 1, r"has the shape \[1.0\] at 0"),
    "beyond all numbers": ({"a": ("U8", [0, 2**63], [0, 0])}, 0, "has the shape"),
    "many dimensions": ({"a": ("U8", [1] * 65, [0, 1])}, 1, "has the shape"),
    "not aligned": ({"a": ("U8", [1], [0, 1]), "b": ("F32", [1], [1, 5])}, 5, "'b' lies at 1 to 5"),
    "no type": ({"a": ("PICKLE", [1], [0, 1])}, 1, "KeyError: 'PICKLE'"),
    "no places": ({"a": ("U8", [1], 0)}, 1, "TypeError"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_headers_are_no_message(name):
    told, size, words = FORGED[name]
    header = {"__metadata__": {"hf_fedmoe": json.dumps({"protocol": 1, "kind": "trained"})}}
    header |= {key: dict(zip(("dtype", "shape", "data_offsets"), value, strict=True)) for key, value in told.items()}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with pytest.raises(MessageError, match=f"bytes are no message: .*{words}"):
        Message.unpack(len(written).to_bytes(8, "little") + written + bytes(size))
