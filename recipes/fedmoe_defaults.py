"""
What each default of Fed-MoE is worth: `python recipes/fedmoe_defaults.py --seeds 0 1 2`.

Each variant changes the quick preset of recipes/yelp_gpt2.yaml in one setting; the paper's letter changes all of them.
A finished run is kept in the output folder and not run again. Any setting of the recipe can follow.
"""

import argparse
from pathlib import Path

import numpy as np
from controls import run_all


VARIANTS: dict[str, list[str]] = {
    "default": [],
    "correlation: centered": ["--correlation", "centered"],
    "correlation: sum": ["--correlation", "sum"],
    "correlation: mean": ["--correlation", "mean"],
    "fusion rate 1, no memory": ["--fusion_rate", "1.0"],
    "no balance term": ["--balance_weight", "0.0"],
    "clients start from their last mixture": ["--synchronisation", "download_mixture"],
    "clients synchronised after their round": ["--synchronisation", "after_round"],
    "experts never fine-tuned": ["--final_expert_epochs", "0"],
    "experts fine-tuned every round instead": ["--final_expert_epochs", "0", "--expert_epochs", "1"],
    "paper's letter": ["--preset_of_method", "paper"],
}
ROWS = ("top_1", "dense", "main_expert", "best_expert", "uniform_ensemble", "weight_average", "oracle_expert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="Runs side by side.")
    parser.add_argument("--recipe", default="yelp_gpt2", help="Name of a YAML beside this file, without its ending.")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs", "fedmoe_defaults"), help="Folder of the results.")
    options, settings = parser.parse_known_args()
    files = {(v, s): options.out / f"{v.replace(' ', '-')}-{s}.json" for s in options.seeds for v in options.variants}
    jobs = {file: (options.recipe, [*settings, *VARIANTS[v]], "fedmoe", s) for (v, s), file in files.items()}
    results = run_all(jobs, options.jobs)
    print(f"\n{options.recipe}, seeds {options.seeds}, {' '.join(settings)}: accuracy / macro-F1 in per cent\n")
    print(f"| | {' | '.join(ROWS)} | disagreement |\n|---|{'---|' * (len(ROWS) + 1)}")
    for variant in options.variants:
        seeds = [results[files[variant, seed]] for seed in options.seeds]
        cells = []
        for row in ROWS:
            accuracy, macro_f1 = (
                100 * np.array([seed[f"fedmoe: {row}"][name] for seed in seeds]) for name in ("accuracy", "macro_f1")
            )
            cells.append(f"{accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f} / {macro_f1.mean():.1f}")
        disagreement = np.mean([seed["fedmoe: disagreement"]["accuracy"] for seed in seeds])
        print(f"| {variant} | {' | '.join(cells)} | {100 * disagreement:.0f} |")


if __name__ == "__main__":
    main()
