"""Pretrain the small GPT-2 that ships with hf_fedmoe, on the training part of the shipped reviews.

    python recipes/assets/pretrain_gpt2_reviews.py hf_fedmoe/assets/reviews/train.parquet \
        --out hf_fedmoe/assets/gpt2-reviews

One run makes the tokenizer and the weights. The folder is written after every epoch, so a run that is stopped leaves
the model of its last full epoch. Same seed, thread count and torch build: same weights.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, get_cosine_schedule_with_warmup, set_seed


EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> GPT2Tokenizer:
    """
    Learns a GPT-2 style byte-level BPE whose id 0 begins and ends a text and whose id 1 pads.

    Args:
        texts (`list[str]`): Texts to learn the merges from.
        vocab_size (`int`): Entries in all, the two special tokens among them.
        max_length (`int`): Length that `truncation=True` cuts to.

    Returns:
        `GPT2Tokenizer`: The tokenizer, padding on the right.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS, "pad_token": PAD}
    return GPT2Tokenizer(tokenizer_object=bpe, padding_side="right", model_max_length=max_length, **special)


def make_batches(rows: list[list[int]], batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Groups row numbers by length, so that little is padded, in a random order of batches."""
    order = rng.permutation(len(rows))
    order = order[np.argsort([len(rows[i]) for i in order], kind="stable")]
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(rows: list[list[int]], batch: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """Pads the chosen rows on the right; labels are -100 on the padding."""
    tensors = [torch.tensor(rows[i]) for i in batch]
    ids_BT = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    mask_BT = ids_BT != pad_id
    labels_BT = ids_BT.masked_fill(~mask_BT, -100)
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "labels": labels_BT}


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, rows: list[list[int]], batch_size: int) -> float:
    """Returns exp(mean loss per predicted token) of a model in eval mode."""
    loss_sum, tokens = 0.0, 0
    for batch in make_batches(rows, batch_size, np.random.default_rng(0)):
        inputs = collate(rows, batch, model.config.pad_token_id)
        count = int((inputs["labels"][:, 1:] != -100).sum())
        loss_sum += float(model(**inputs).loss) * count
        tokens += count
    return math.exp(loss_sum / tokens)


def save(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, out: Path) -> None:
    """Writes float16 weights with a config that says float32, so that they load as float32 by default."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(out)
    half.config.dtype = torch.float32
    half.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_file", type=Path, help="parquet file with a column text")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    sizes = {"vocab_size": 4096, "n_layer": 3, "n_embd": 96, "n_head": 4, "n_positions": 128}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--held_out", type=int, default=500, help="last rows of the file, kept for the perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)

    texts = pq.read_table(args.train_file, columns=["text"])["text"].to_pylist()
    tokenizer = train_tokenizer(texts[: -args.held_out], args.vocab_size, args.n_positions)
    # Cut by hand: `truncation=True` would be saved with the tokenizer.
    rows = [[*ids[: args.n_positions - 1], tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    train_rows, held_out_rows = rows[: -args.held_out], rows[-args.held_out :]
    config = GPT2Config(
        **{name: vars(args)[name] for name in sizes},
        # The same function as GPT-2's "gelu_new" in one fused kernel; dropout of attention weights is slow on a CPU.
        activation_function="gelu_pytorch_tanh",
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    print(f"{model.num_parameters()} parameters, {sum(map(len, train_rows))} training tokens an epoch", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    steps = args.epochs * math.ceil(len(train_rows) / args.batch_size)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    rng, start = np.random.default_rng(args.seed), time.perf_counter()
    # No dropout: in so few epochs it only slows the fit. The config keeps GPT-2's rates for fine-tuning.
    model.eval()
    for epoch in range(1, args.epochs + 1):
        for batch in make_batches(train_rows, args.batch_size, rng):
            model(**collate(train_rows, batch, config.pad_token_id)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        train_ppl = perplexity(model, train_rows[:1000], args.batch_size)
        held_out_ppl = perplexity(model, held_out_rows, args.batch_size)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch}: perplexity train {train_ppl:.1f}, held out {held_out_ppl:.1f}; {seconds:.0f} s",
            flush=True,
        )
        save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
