"""The imports of the fork server of `warm_processes`: all that a run needs, once for all the processes of a module."""

import gc

import hf_fedmoe.experiments.run_comparison
import hf_fedmoe.experiments.runs
import hf_fedmoe.experiments.side_by_side  # noqa: F401


gc.collect()
gc.freeze()  # as in conftest.py: collections need not look through what was imported
