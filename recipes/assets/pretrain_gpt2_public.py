"""Pretrain the small GPT-2 that owners of text have in common, on public text of many kinds.

    python recipes/assets/pretrain_gpt2_public.py SOURCE --out hf_fedmoe/assets/gpt2-public

SOURCE is a parquet file with the columns owner, split and text; the owner public_masc is taken. One run makes the
tokenizer and the weights. Same seed, thread count and torch build: same weights.
"""

import argparse
import math
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from pretrain_gpt2_reviews import perplexity, save, train_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup, set_seed


OWNER = "public_masc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="parquet file with the columns owner, split and text")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    sizes = {"vocab_size": 4096, "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 128}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--stop_after", type=int, default=1, help="epochs of these after which training ends")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)

    table = pq.read_table(args.source, columns=["text", "split"], filters=[("owner", "==", OWNER)])
    texts = {split: [] for split in ("train", "reserved", "test")}
    for row in table.to_pylist():
        texts[row["split"]].append(row["text"])
    tokenizer = train_tokenizer(texts["train"], args.vocab_size, args.n_positions)
    tokens = {}
    for split in ("train", "reserved"):
        joined = [token for ids in tokenizer(texts[split])["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
        tokens[split] = torch.tensor(joined)
    held_out_rows = tokens["reserved"].split(args.n_positions)[:200]
    config = GPT2Config(
        **{name: vars(args)[name] for name in sizes},
        # The same function as GPT-2's "gelu_new" in one fused kernel; in few epochs dropout only slows the fit.
        activation_function="gelu_pytorch_tanh",
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    print(f"{model.num_parameters()} parameters, {len(tokens['train'])} training tokens an epoch", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    T = args.n_positions
    steps = args.epochs * ((len(tokens["train"]) - T) // T // args.batch_size)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator, start = torch.Generator().manual_seed(args.seed), time.perf_counter()
    for epoch in range(1, args.stop_after + 1):
        # Rows begin elsewhere in each epoch.
        first = int(torch.randint(0, T, (), generator=generator))
        rows_NT = tokens["train"][first : first + (len(tokens["train"]) - T) // T * T].view(-1, T)
        for batch in torch.randperm(len(rows_NT), generator=generator).split(args.batch_size):
            if len(batch) < args.batch_size:
                continue
            ids_BT = rows_NT[batch]
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        loss = math.log(perplexity(model, [row.tolist() for row in held_out_rows], args.batch_size))
        seconds = time.perf_counter() - start
        print(f"epoch {epoch}: held-out loss a token {loss:.3f}; {seconds:.0f} s", flush=True)
        save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
