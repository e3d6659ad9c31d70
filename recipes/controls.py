"""
Fed-MoE beside its fair controls, over several seeds: `python recipes/controls.py yelp_gpt2 --seeds 0 1 2 3 4`.

Every seed draws other clients, another reserved set and other initial heads, the same for all methods. A finished run
is kept in the output folder and not run again. Any setting of the recipe can follow, `--dataset yelp_reviews_5star`.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from character_federation import CharacterRecipe
from federated_recipe import RecipeArguments, analyse, averaging_strategies, majority_scores, make_trainer
from image_federation import ImageRecipe
from text_federation import TextRecipe
from transformers.utils import logging

from hf_fedmoe.data import ReservedSet
from hf_fedmoe.models import as_expert
from hf_fedmoe.strategies import FedAvgMovingAverage, Server


FOLDER = Path(__file__).parent
RECIPES: dict[str, type[RecipeArguments]] = {
    "yelp_gpt2": TextRecipe,
    "sent140_bert": TextRecipe,
    "femnist_cnn": ImageRecipe,
    "cifar10_resnet18": ImageRecipe,
    "shakespeare_lstm": CharacterRecipe,
}
NAMES_IN_TABLE = {
    "reserved_only": "the reserved set alone",
    "cent_moe": "the reserved set alone, a mixture",
    "fedavg_reserved": "fedavg, server trains on the reserved set every round",
}


class OneTrajectory(FedAvgMovingAverage):
    """FedAvg's clients and means, with the last mean kept for the controls that differ only in what follows it."""

    def finish(self, server: Server, reserved: ReservedSet | None, seed: int) -> None:
        self.reserved, self.seed = reserved, seed
        self.last_mean_P, self.layout = server.tensors["mean_P"].clone(), server.layout

    def needs_reserved_set(self) -> bool:
        return True


def run(recipe_name: str, settings: list[str], method: str, seed: int, threads: int) -> dict[str, dict[str, float]]:
    """
    One method on one seed: {row of the table: scores on the test set, and the bytes that clients send in a round}.

    Fed-MoE has a row for each of its parts. "fedavg" gives three rows from one training: the last mean, the moving
    average of all means, and the last mean fine-tuned on the reserved set.
    """
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    recipe, args = RECIPES[recipe_name].parse(
        FOLDER / f"{recipe_name}.yaml", [*settings, "--seed", str(seed), "--disable_tqdm", "True"]
    )
    args.eval_strategy, args.save_strategy, args.logging_strategy = "no", "no", "no"
    datasets.disable_progress_bars()
    processor = recipe.load_processor()
    _, data = recipe.load_data(processor, seed)
    if method == "majority_class":
        return {method: majority_scores(data)}
    trainer = make_trainer(method, recipe, args, data, processor)
    results = {}

    def score(row: str) -> None:
        scores = trainer.evaluate(data.test, metric_key_prefix="test")
        results[row] = {name: scores[f"test_{name}"] for name in ("accuracy", "macro_f1")}
        results[row]["bytes_up"] = float(np.mean([report.bytes_up for report in trainer.rounds]))

    if method == "fedavg":
        trainer.strategy = end = OneTrajectory(args.fusion_rate)
        trainer.train()
        score("fedavg, moving average of the server")
        end.layout.write(end.last_mean_P, as_expert(trainer.model))
        score("fedavg")
        tuned = averaging_strategies(args)["fedavg_tuned_at_end"]
        tuned.fine_tune(trainer.model, end.reserved, args.weight_decay, end.seed)
        score("fedavg, fine-tuned on the reserved set at the end")
    else:
        trainer.train()
        score(NAMES_IN_TABLE.get(method, method))
    if method == "fedmoe":
        analysis = analyse(trainer, data, args.eval_batch_size)
        results |= {f"fedmoe: {name}": scores for name, scores in analysis.scores.items()}
        others = ~np.eye(len(analysis.disagreement_SS), dtype=bool)
        disagreement = float(analysis.disagreement_SS[others].mean())
        results["fedmoe: disagreement"] = {"accuracy": disagreement, "macro_f1": float("nan")}
    return results


def run_all(
    jobs: dict[Path, tuple[str, list[str], str, int]], num_workers: int
) -> dict[Path, dict[str, dict[str, float]]]:
    """The results of all jobs {file: (recipe, settings, method, seed)}; those whose file is there are only read."""
    # Two processes that wait for one another's threads take many times as long.
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // num_workers)))
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        running = {file: pool.submit(run, *job, threads) for file, job in jobs.items() if not file.exists()}
        for file, result in running.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result.result(), indent=2) + "\n")
            print(f"{file.stem} done", flush=True)
    return {file: json.loads(file.read_text()) for file in jobs}


def markdown(results: list[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds, in per cent, and on how many seeds Fed-MoE was above the row."""
    lines = ["| | accuracy | macro-F1 | Fed-MoE above, of seeds |", "|---|---|---|---|"]
    for row in results[0]:
        cells = []
        for name in ("accuracy", "macro_f1"):
            values = 100 * np.array([seed[row][name] for seed in results])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append("" if np.isnan(values).any() else f"{values.mean():.1f}{spread}")
        wins = sum(seed["fedmoe"]["accuracy"] > seed[row]["accuracy"] for seed in results)
        compared = "" if row.startswith("fedmoe") else f"{wins} / {len(results)}"
        lines.append(f"| {row} | {cells[0]} | {cells[1]} | {compared} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(RECIPES), help="A YAML beside this file.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fedavg_reserved", "fedmoe"])
    parser.add_argument("--jobs", type=int, default=2, help="Runs side by side.")
    parser.add_argument("--out", type=Path, default=None, help="Folder of the results.")
    options, settings = parser.parse_known_args()
    out = options.out or Path("runs", "controls", options.recipe)
    methods = ["majority_class", *options.methods]
    jobs = {
        out / f"{method}-{seed}.json": (options.recipe, settings, method, seed)
        for seed in options.seeds
        for method in methods
    }
    results = run_all(jobs, options.jobs)
    by_seed = [
        {row: score for method in methods for row, score in results[out / f"{method}-{seed}.json"].items()}
        for seed in options.seeds
    ]
    print(f"\n{options.recipe}, seeds {options.seeds}, {' '.join(settings)}\n\n{markdown(by_seed)}")


if __name__ == "__main__":
    main()
