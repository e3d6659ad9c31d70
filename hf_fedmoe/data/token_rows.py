"""Rows of tokens for language models, of texts (packed), conversations (by a template), prompts and completions."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


# A label of this value does not count in the loss.
IGNORED = -100
# Columns of a dataset of conversations, and of one of prompts and completions, as TRL calls them.
MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"

# Tokens, and whether they are to be learned.
Part = tuple[list[int], bool]


def token_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, text_column: str = "text"
) -> Dataset:
    """
    Makes rows of tokens of whatever text a dataset has: of conversations in a column `messages` (roles and contents;
    what the assistant says is learned), of columns `prompt` and `completion` (the completion is learned), or of a
    column of texts, which are packed (all is learned).

    Args:
        dataset (`datasets.Dataset`): The texts.
        tokenizer (`PreTrainedTokenizerBase`): The model's; conversations need its `chat_template`.
        sequence_length (`int`): Tokens of a row, at most; packed texts have exactly as many.
        text_column (`str`, *optional*, defaults to `"text"`): Column of texts, where there are no others.

    Returns:
        `datasets.Dataset`: With `input_ids` and `labels`, of which -100 does not count in the loss.

    Raises:
        `ValueError`: If there is no such column, or no row has anything to learn; names the remedy.
    """
    columns = dataset.column_names
    if MESSAGES in columns:
        rows = [_row(conversation_parts(tokenizer, messages), sequence_length) for messages in dataset[MESSAGES]]
    elif PROMPT in columns and COMPLETION in columns:
        pairs = zip(dataset[PROMPT], dataset[COMPLETION], strict=True)
        rows = [_row(completion_parts(tokenizer, *pair), sequence_length) for pair in pairs]
    elif text_column in columns:
        packed = pack(tokenizer, dataset[text_column], sequence_length)
        return Dataset.from_dict({"input_ids": packed, "labels": packed})
    else:
        raise ValueError(
            f"The dataset has the columns {columns}: give it {MESSAGES!r}, or {PROMPT!r} and {COMPLETION!r}, or name "
            f"its column of texts as `text_column`, which is {text_column!r}."
        )
    # Where the answer begins behind the cut there is nothing to learn.
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    if not rows:
        raise ValueError(
            f"No row of {len(dataset)} has anything to learn within `sequence_length` = {sequence_length} tokens: "
            "raise it, or look for answers that are empty."
        )
    return Dataset.from_list(rows)


def pack(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], sequence_length: int) -> list[list[int]]:
    """
    Cuts texts into sequences of one length: their tokens one after the other, an end between two texts. What is left
    over at the end is dropped.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The base's.
        texts (`Sequence[str]`): The texts.
        sequence_length (`int`): Tokens of a sequence.

    Raises:
        `ValueError`: If there are fewer tokens than a sequence has.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Longer texts than the model reads at once are what is cut here, and no reason to warn.
    tokens = [token for ids in tokenizer(list(texts), verbose=False)["input_ids"] for token in [*ids, *end]]
    if len(tokens) < sequence_length:
        raise ValueError(
            f"`text` has {len(tokens)} tokens, and `sequence_length` is {sequence_length}: bring more text, or lower "
            "`sequence_length`."
        )
    return [tokens[i : i + sequence_length] for i in range(0, len(tokens) - sequence_length + 1, sequence_length)]


def conversation_parts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]
) -> Iterator[tuple[list[int], bool]]:
    """
    Gives the tokens of a conversation up to the assistant's last message, by the tokenizer's template. A prompt ends
    where the model begins to generate, so that it is read in training as it is in use.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a `chat_template`.
        messages (`Sequence[dict[str, str]]`): With `role` and `content` each.

    Raises:
        `ValueError`: If there is no template, or it changes what it has written of earlier messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no `chat_template`, by which conversations become text: set it, or take the tokenizer "
            "of a model that is instruction-tuned."
        )

    def written(count: int, **how: Any) -> str:
        text = tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, **how)
        assert isinstance(text, str)
        return text

    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = written(place, add_generation_prompt=True) if place else ""
        for text, learned in ((prompt, False), (written(place + 1), True)):
            if not text.startswith(done):
                raise ValueError(
                    f"The tokenizer's `chat_template` writes message {place} so that what came before is no longer "
                    "its beginning, and no token can be told to be the assistant's: take a template that appends."
                )
            yield tokenizer(text[len(done) :], add_special_tokens=False, verbose=False)["input_ids"], learned
            done = text


def completion_parts(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[Part]:
    """
    Returns the tokens of a prompt and of its completion, with an end.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompt (`str`): Not learned.
        completion (`str`): Learned.

    Raises:
        `ValueError`: If one of them is no text.
    """
    for name, text in ((PROMPT, prompt), (COMPLETION, completion)):
        if not isinstance(text, str):
            raise ValueError(f"`{name}` is {text!r}: give texts, or conversations in a column {MESSAGES!r}.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    return [(tokenizer(prompt, verbose=False)["input_ids"], False), ([*answer, *end], True)]


def _row(parts: Iterator[Part] | list[Part], sequence_length: int) -> dict[str, list[int]]:
    """Joins parts to a row of `sequence_length` tokens at most."""
    input_ids: list[int] = []
    labels: list[int] = []
    for ids, learned in parts:
        input_ids += ids
        labels += ids if learned else [IGNORED] * len(ids)
    return {"input_ids": input_ids[:sequence_length], "labels": labels[:sequence_length]}
