"""A recipe: one seed of one experiment, the methods side by side, and a model on disk."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from accelerate import PartialState
from transformers.utils import logging

from ..data.counted import counted
from ..reporting import plot_clients, plot_gate
from ..training import FedMoETrainingArguments
from .classifier_experiment import ClassifierExperiment
from .cores import use_all_cores
from .experiment import find_model
from .folders import check_writable
from .library_warnings import without_library_warnings
from .methods import (
    analyse,
    check_method,
    has_begun,
    leave_as_it_is,
    majority_scores,
    make_trainer,
    metrics_of_tests,
    train_or_go_on,
)
from .recipe_help import recipe_help
from .rehearsal import rehearse
from .settings import parse_settings, read_preset, read_words


def parse(
    experiment_class: type[ClassifierExperiment], settings_file: Path, argv: list[str]
) -> tuple[ClassifierExperiment, FedMoETrainingArguments]:
    """
    One preset of a recipe's YAML (`--preset quick` unless told), overridden by the rest of the command line. Fed-MoE's
    own `preset` argument is `--preset_of_method` there.
    """
    told = read_words(argv)
    preset = str(told.pop("preset", "quick"))
    if "preset_of_method" in told:
        told["preset"] = told.pop("preset_of_method")
    settings = {"disable_tqdm": False, **read_preset(settings_file, preset)}  # whose default follows the log level
    return parse_settings(experiment_class, settings, told)


def table(results: dict[str, dict[str, float]]) -> str:
    """Accuracy and macro-F1 in per cent."""
    lines = [f"{'':24s}{'accuracy':>10s}{'macro-F1':>10s}"]
    for name, score in results.items():
        lines.append(f"{name:24s}{100 * score['accuracy']:10.1f}{100 * score['macro_f1']:10.1f}")
    return "\n".join(lines)


def main(experiment_class: type[ClassifierExperiment], settings_file: Path) -> None:
    """
    Runs the recipe as `accelerate launch` calls it; of several processes the main one prints and writes. A setting
    that is wrong ends it with one line and exit code 2.
    """
    try:
        with without_library_warnings():
            _run(experiment_class, settings_file, sys.argv[1:])
    except KeyboardInterrupt:
        print(f"\n{settings_file.stem}: stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _in_one_line(settings_file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print(f"{settings_file.stem}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _run(experiment_class: type[ClassifierExperiment], settings_file: Path, argv: list[str]) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving weights; rounds keep theirs
    with _in_one_line(settings_file):
        if help_words := {"-h", "--help", "--help-all", "--help_all"}.intersection(argv):
            told = read_words([word for word in argv if word not in help_words])
            everything = not help_words <= {"-h", "--help"}
            print(recipe_help(experiment_class, settings_file, str(told.get("preset", "quick")), everything))
            return
        experiment, args = parse(experiment_class, settings_file, argv)
        use_all_cores()
        if args.resume_from_checkpoint:
            raise ValueError(
                f"`resume_from_checkpoint` is {args.resume_from_checkpoint!r}: leave it out, a recipe goes on from "
                "the last checkpoints in its `output_dir`."
            )
        for method in experiment.compare:
            check_method(method, experiment, args)
        assert args.output_dir is not None  # `TrainingArguments` have one by now
        output_dir, model_name = Path(args.output_dir), find_model(experiment.model)
        check_writable(output_dir, "output_dir")
        is_main = PartialState().is_main_process
        say = print if is_main else lambda *words: None
        if not is_main:
            datasets.disable_progress_bars()  # the main one's are enough
        processor = experiment.load_processor()
        dataset_name, data = experiment.load_data(processor, args.seed)
        title = f"{settings_file.stem}, preset {experiment.preset_name}"
        say(f"\n{title}: {dataset_name}, experts {Path(model_name).name}")
        say(data.summary())
        for method in experiment.compare:
            args.output_dir = str(output_dir / method)
            make_trainer(method, experiment, args, data, processor, train_first=leave_as_it_is)
        for method in experiment.compare if experiment.rehearse else ():
            args.output_dir = str(output_dir / method)
            if has_begun(args.output_dir):
                continue
            say(f"\n{method}: rehearsing two rounds of few local steps ...")
            say(f"{method} takes {rehearse(method, experiment, args, data, processor)}.")
    if is_main:
        data.plot(output_dir / "clients.png")
    assert data.test is not None
    results, client_tables = {"majority_class": majority_scores(data)}, {}
    for method in experiment.compare:
        clients = counted(data.num_clients, "client")
        say(f"\n{method}: {counted(args.rounds, 'round')} of {args.clients_per_round} of {clients}")
        args.output_dir = str(output_dir / method)
        trainer = make_trainer(method, experiment, args, data, processor)
        try:
            # Called again, the recipe goes on where it stopped; with other settings it asks for another folder.
            train_or_go_on(trainer)
        except ValueError:
            if trainer.rounds:
                raise
            with _in_one_line(settings_file):
                raise
        results[method] = metrics_of_tests(trainer, data)
        if trainer.client_table:
            client_tables[method] = trainer.client_table
    gate_share_KC = None
    if experiment.compare[-1] == "fedmoe":
        say("\nTaking the mixture apart, expert by expert ...")  # which runs each of them on the test
        analysis = analyse(trainer, data, args.eval_batch_size)
        if is_main:
            plot_gate(analysis.share_KC, data.label_names, output_dir / "gate.png")
        results |= {f"  {name}": analysis.scores[name] for name in ("dense", "best_expert", "uniform_ensemble")}
        results["  oracle_expert"] = analysis.scores["oracle_expert"]
        gate_share_KC = analysis.share_KC
    if is_main:
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    say(f"\nOn {len(data.test)} test examples:\n{table(results)}")
    if client_tables and is_main:
        plot_clients(client_tables, output_dir / "client_accuracies.png")
        served = {
            method: {"accuracy": results[method]["clients_accuracy"], "macro_f1": results[method]["clients_macro_f1"]}
            for method in client_tables
        }
        say(f"\nClients' own models on their own test examples:\n{table(served)}")

    trainer.save_model(str(output_dir / "model"))
    trainer.create_model_card(
        model_name=f"{settings_file.stem}-{experiment.compare[-1]}",
        dataset=dataset_name,
        folder=output_dir / "model",
        comparison={
            name.replace("  ", "fedmoe: "): {
                metric: score[metric] for metric in ("accuracy", "macro_f1", "auc") if metric in score
            }
            for name, score in results.items()
        },
        gate_share_KC=gate_share_KC,
    )
    if is_main:
        print(f"\nLoaded back from {output_dir / 'model'}:")
        experiment.show(output_dir / "model", data, processor)
