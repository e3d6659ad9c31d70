"""Experiments from settings: recipes, and comparisons of methods over seeds."""

from ..lazy_names import lazy_names


# What each name is of. A module is imported with the first of its names: a process of `side_by_side` is there at once,
# and imports what its tasks need.
_MODULES = {
    "method_names": "named_strategies",
    "CharacterExperiment": "characters",
    "Experiment": "experiment",
    "FailedRunsError": "run_comparison",
    "ImageExperiment": "images",
    "LanguageExperiment": "language_experiment",
    "TextExperiment": "texts",
    "compare": "run_comparison",
    "diagnose_own": "own_differences",
    "evaluate_saved": "saved_models",
    "find_model": "experiment",
    "main": "recipe",
    "make_trainer": "methods",
    "owners_main": "language_owners",
    "parse": "recipe",
    "parse_settings": "settings",
    "predict_saved": "saved_models",
    "read_preset": "settings",
    "read_words": "settings",
    "train_own": "own_run",
    "training_arguments": "settings",
}

__all__ = list(_MODULES)

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
