"""The names of `_MODULES`, for type checkers, which do not run `__getattr__`."""

from .characters import CharacterExperiment as CharacterExperiment
from .experiment import Experiment as Experiment
from .experiment import find_model as find_model
from .images import ImageExperiment as ImageExperiment
from .language_experiment import LanguageExperiment as LanguageExperiment
from .language_owners import owners_main as owners_main
from .methods import make_trainer as make_trainer
from .named_strategies import method_names as method_names
from .own_differences import diagnose_own as diagnose_own
from .own_run import train_own as train_own
from .recipe import main as main
from .recipe import parse as parse
from .run_comparison import FailedRunsError as FailedRunsError
from .run_comparison import compare as compare
from .saved_models import evaluate_saved as evaluate_saved
from .saved_models import predict_saved as predict_saved
from .settings import parse_settings as parse_settings
from .settings import read_preset as read_preset
from .settings import read_words as read_words
from .settings import training_arguments as training_arguments
from .texts import TextExperiment as TextExperiment
