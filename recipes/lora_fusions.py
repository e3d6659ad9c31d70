"""
Adapters beside whole models, and the ways to fuse them: `python recipes/lora_fusions.py sent140_bert --seeds 0 1 2`.

FedAvg and Fed-MoE with equal clients, reserved sets and draws. A finished run is kept in the output folder and not run
again. Any setting of the recipe can follow.
"""

import argparse
from pathlib import Path

import numpy as np
from controls import run_all


VARIANTS: dict[str, list[str]] = {
    "whole models": [],
    "LoRA, svd": ["--peft", "lora"],
    "LoRA, ffa": ["--peft", "lora", "--lora_fusion", "ffa"],
    "LoRA, factors": ["--peft", "lora", "--lora_fusion", "factors"],
}
END = "fedavg, fine-tuned on the reserved set at the end"
# Row of a run's results: its name in the table.
ROWS = {
    "fedavg": {"fedavg": "FedAvg", END: "FedAvg tuned at the end"},
    "fedmoe": {"fedmoe": "Fed-MoE", "fedmoe: main_expert": "its main expert", "fedmoe: oracle_expert": "oracle"},
}


def spread(values: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    percent = 100 * np.array(values)
    return f"{percent.mean():.1f}" + (f" ± {percent.std(ddof=1):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["yelp_gpt2", "sent140_bert"], help="A YAML beside this file.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="Runs side by side.")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=None, help="Folder of the results.")
    options, settings = parser.parse_known_args()
    out = options.out or Path("runs", "lora_fusions", options.recipe)
    files = {
        (variant, method, seed): out / f"{variant.replace(', ', '-').replace(' ', '-')}-{method}-{seed}.json"
        for seed in options.seeds
        for variant in options.variants
        for method in ROWS
    }
    jobs = {
        file: (options.recipe, [*settings, *VARIANTS[variant]], method, seed)
        for (variant, method, seed), file in files.items()
    }
    results = run_all(jobs, options.jobs)
    names = [name for rows in ROWS.values() for name in rows.values()]
    print(f"\n{options.recipe}, seeds {options.seeds}, {' '.join(settings)}: accuracy / macro-F1 in per cent\n")
    print(f"| | {' | '.join(names)} | bytes up in a round |\n|---|{'---|' * (len(names) + 1)}")
    for variant in options.variants:
        cells = []
        for method, rows in ROWS.items():
            seeds = [results[files[variant, method, seed]] for seed in options.seeds]
            for row in rows:
                cells.append(" / ".join(spread([seed[row][m] for seed in seeds]) for m in ("accuracy", "macro_f1")))
        bytes_up = np.mean([results[files[variant, "fedmoe", seed]]["fedmoe"]["bytes_up"] for seed in options.seeds])
        print(f"| {variant} | {' | '.join(cells)} | {bytes_up:,.0f} |")


if __name__ == "__main__":
    main()
