"""Classifiers and batches small enough for tests."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_fedmoe.models import CharLSTMConfig, CharLSTMForSequenceClassification


VOCAB_SIZE = 40
PAD_TOKEN_ID = 1
EOS_TOKEN_ID = 39


def tiny_gpt2(num_labels: int = 4, **config) -> GPT2ForSequenceClassification:
    """A GPT-2 without a padding token, as GPT-2 is."""
    defaults = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB_SIZE}
    defaults |= {"bos_token_id": EOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID, "num_labels": num_labels}
    return GPT2ForSequenceClassification(GPT2Config(**defaults | config)).eval()


def tiny_llama(num_labels: int = 4, **config) -> LlamaForSequenceClassification:
    defaults = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    defaults |= {"intermediate_size": 24, "max_position_embeddings": 32, "vocab_size": VOCAB_SIZE}
    defaults |= {"pad_token_id": PAD_TOKEN_ID, "num_labels": num_labels}
    return LlamaForSequenceClassification(LlamaConfig(**defaults | config)).eval()


def tiny_bert(num_labels: int = 4, **config) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**_encoder_config(num_labels) | config)).eval()


def tiny_roberta(num_labels: int = 4, **config) -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(RobertaConfig(**_encoder_config(num_labels) | config)).eval()


def tiny_distilbert(num_labels: int = 4, **config) -> DistilBertForSequenceClassification:
    defaults = {"n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40}
    defaults |= {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD_TOKEN_ID, "num_labels": num_labels}
    return DistilBertForSequenceClassification(DistilBertConfig(**defaults | config)).eval()


def tiny_char_lstm(num_labels: int = 4, **config) -> CharLSTMForSequenceClassification:
    defaults = {"vocab_size": VOCAB_SIZE, "embedding_size": 4, "hidden_size": 16, "pad_token_id": PAD_TOKEN_ID}
    return CharLSTMForSequenceClassification(CharLSTMConfig(**defaults | {"num_labels": num_labels} | config)).eval()


def _encoder_config(num_labels: int) -> dict:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    tokens = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 40, "pad_token_id": PAD_TOKEN_ID}
    return sizes | tokens | {"num_labels": num_labels}


TEXT_FAMILIES = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "distilbert": tiny_distilbert,
    "char_lstm": tiny_char_lstm,
}


@torch.no_grad()
def make_different(model: PreTrainedModel, scale: float = 0.1, seed: int = 0) -> PreTrainedModel:
    """Adds noise to every parameter in place, so that experts differ and the gate has an opinion."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def text_batch(size: int = 6, length: int = 8, pad_token_id: int | None = PAD_TOKEN_ID, seed: int = 0) -> dict:
    """Right-padded token ids of unequal lengths, with their mask; unpadded with `pad_token_id=None`."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, EOS_TOKEN_ID, (size, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if pad_token_id is not None:
        for row in range(size):
            mask[row, length - row % 4 :] = 0
        input_ids = input_ids.masked_fill(mask == 0, pad_token_id)
    return {"input_ids": input_ids, "attention_mask": mask}


# Files that travel with every mixture, for machines without this package.
CODE_OF_A_MIXTURE = {
    *("adapters_fedmoe.py", "building_fedmoe.py", "classification_head.py", "configuration_adapted.py"),
    *("configuration_checks.py", "configuration_fedmoe.py", "mixture_fedmoe.py", "modeling_adapted.py"),
    *("modeling_fedmoe.py", "precision_fedmoe.py"),
}
