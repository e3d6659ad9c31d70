"""A tokenizer for the tests' tiny models: the word `w7` is token 7."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import PAD_TOKEN_ID, VOCAB_SIZE


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = {0: "[UNK]", PAD_TOKEN_ID: "[PAD]"}
    words = {special.get(token, f"w{token}"): token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
