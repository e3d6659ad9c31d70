"""Rows of tokens for language models, from texts, conversations, prompts and completions."""

import numpy as np
import pytest
from datasets import Dataset

from hf_fedmoe.data import FederatedTexts, iid, pack, token_rows
from tests.tiny_tokenizer import tiny_tokenizer


TEMPLATE = (
    "{% for message in messages %}{{ 'w3' if message.role == 'user' else 'w4' }} {{ message.content }} w5 {% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)
IGNORED = -100


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def ending_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "w12"
    return tokenizer


def ids(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_texts_are_packed_and_all_is_learned():
    tokenizer = ending_tokenizer()
    texts = ["w3 w4 w5 w6", "w7 w8"]
    rows = token_rows(Dataset.from_dict({"body": texts}), tokenizer, 3, text_column="body")
    end = tokenizer.eos_token_id
    stream = [*tokenizer("w3 w4 w5 w6")["input_ids"], end, *tokenizer("w7 w8")["input_ids"], end]
    assert stream == ids("w3 w4 w5 w6 w12 w7 w8 w12") and rows["input_ids"] == [stream[0:3], stream[3:6]]
    assert rows["labels"] == rows["input_ids"] == pack(tokenizer, texts, 3)


def test_of_a_conversation_the_answers_are_learned():
    talk = said(("user", "w6"), ("assistant", "w7 w8"), ("user", "w9"), ("assistant", "w10"), ("user", "w11"))
    [row] = token_rows(Dataset.from_dict({"messages": [talk]}), chat_tokenizer(), 64)
    # What follows the last answer is left out; a prompt ends where generation begins.
    assert row["input_ids"] == ids("w3 w6 w5 w4 w7 w8 w5 w3 w9 w5 w4 w10 w5")
    learned = [label for label in row["labels"] if label != IGNORED]
    assert learned == ids("w7 w8 w5 w10 w5")
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORED)


def test_of_a_prompt_the_completion_is_learned():
    tokenizer = ending_tokenizer()
    [row] = token_rows(Dataset.from_dict({"prompt": ["w3 w4"], "completion": ["w5"]}), tokenizer, 64)
    prompt, answer = tokenizer("w3 w4")["input_ids"], [*ids("w5"), tokenizer.eos_token_id]
    assert row == {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def test_rows_are_cut_and_those_without_an_answer_left_out():
    data = Dataset.from_dict({"prompt": ["w3 w4 w5", "w3"], "completion": ["w6", "w7 w8"]})
    rows = token_rows(data, tiny_tokenizer(), 3)
    assert len(rows) == 1 and len(rows[0]["input_ids"]) == 3 and rows[0]["labels"][1:] == ids("w7 w8")


@pytest.mark.parametrize(
    ("columns", "tokenizer", "message"),
    [
        ({"body": ["w3"]}, tiny_tokenizer(), r"has the columns \['body'\]: give it 'messages', or 'prompt'"),
        ({"messages": [said(("assistant", "w3"))]}, tiny_tokenizer(), "has no `chat_template`"),
        ({"messages": [said(("user", "w3"))]}, chat_tokenizer(), "No row of 1 has anything to learn within"),
        ({"prompt": [said(("user", "w3"))], "completion": ["w3"]}, tiny_tokenizer(), "`prompt` is .*: give texts"),
        ({"text": ["w3"]}, tiny_tokenizer(), "`text` has . tokens, and `sequence_length` is 4"),
    ],
)
def test_what_makes_no_rows_is_told(columns, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        token_rows(Dataset.from_dict(columns), tokenizer, 4)


def test_a_template_that_rewrites_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {% for message in messages %}{{ message.content }} {% endfor %}"
    talk = said(("user", "w6"), ("assistant", "w7"))
    with pytest.raises(ValueError, match="writes message 1 so that what came before"):
        token_rows(Dataset.from_dict({"messages": [talk]}), tokenizer, 64)


def test_federated_texts_have_clients_and_no_classes():
    rows = Dataset.from_dict({"input_ids": [[3, 4], [5, 6], [7, 8]], "labels": [[3, 4], [5, 6], [7, 8]]})
    data = FederatedTexts.from_clients({"court": rows.select([0, 1]), "press": rows.select([2])})
    assert data.client_names == ["court", "press"] and data.client("press")["input_ids"] == [[7, 8]]
    assert not data.has_classes and np.array_equal(data.label_counts(), [[2], [1]])
    divided = FederatedTexts.split(
        rows, lambda each: iid(len(each), num_clients=2), label_column="labels", stratify=False
    )
    assert divided.client_sizes.sum() == 3
    with pytest.raises(ValueError, match="label_column is 'labels', but client court has only the columns"):
        FederatedTexts.from_clients({"court": rows.remove_columns("labels")})
    with pytest.raises(ValueError, match=r"without \['input_ids'\]: make rows of tokens"):
        FederatedTexts.from_clients({"court": rows.remove_columns("input_ids")})
