"""
Compares what a rehearsal says that a run takes with what it takes then, training and test, in the same process.
Clients have digits, and ten times as many local steps as in the rehearsal.
"""

import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from machine import add_device, benchmark_parser, pin_threads, print_table

from hf_fedmoe.experiments import ImageExperiment, make_trainer, parse_settings, read_preset
from hf_fedmoe.experiments.methods import metrics_of_tests
from hf_fedmoe.experiments.rehearsal import rehearse


RECIPE = Path(__file__).parent.parent / "recipes" / "femnist_cnn.yaml"
# Clients of some 150 rows: forty steps an epoch.
LONG = {"num_clients": 8, "per_device_train_batch_size": 4, "num_train_epochs": 5, "rounds": 5, "eval_steps": 1}
METHODS = ("fedavg", "fedmoe", "fedavg_tuned_at_end", "fedem", "apfl", "fedrep", "pfedme", "ifca")


def main() -> None:
    parser = benchmark_parser(__doc__.split("\n\n")[0])
    add_device(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="Names of methods.")
    args = parser.parse_args()
    clock, rows = pin_threads(args, args.device), []
    for method in args.methods[:1] if args.quick else args.methods:
        with tempfile.TemporaryDirectory() as folder:
            settings = {**read_preset(RECIPE, "quick"), **LONG, "use_cpu": args.device == "cpu", "output_dir": folder}
            settings |= {"disable_tqdm": True, "logging_strategy": "no"}
            if args.quick:
                settings |= {"num_train_epochs": 1, "rounds": 2}
            experiment, arguments = parse_settings(ImageExperiment, settings)
            processor = experiment.load_processor()
            _, data = experiment.load_data(processor, arguments.seed)
            # Rounds and rehearsals take the time by these.
            with patch.object(time, "perf_counter", clock), patch.object(time, "monotonic", clock):
                started = clock()
                said = rehearse(method, experiment, arguments, data, processor).seconds
                rehearsed = clock() - started
                trainer = make_trainer(method, experiment, arguments, data, processor)
                started = clock()
                trainer.train()
                metrics_of_tests(trainer, data)
                took = clock() - started
        rows.append([method, f"{said:.1f}", f"{took:.1f}", f"{said / took:.2f}", f"{rehearsed:.1f}"])
    print_table("A run in seconds", ["", "said before", "taken", "said / taken", "rehearsal"], rows)


if __name__ == "__main__":
    main()
