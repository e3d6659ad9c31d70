"""The command `hf-fedmoe` answers before torch is imported."""

import os
import resource
import subprocess
import sys

import pytest

from hf_fedmoe import __version__


# What the installed script does, and what it has imported when it ends.
SCRIPT = """
import sys
sys.argv[0] = "/bin/hf-fedmoe"
try:
    from hf_fedmoe.cli import main
    main()
finally:
    heavy = {"torch", "transformers", "datasets", "numpy", "yaml"} & sys.modules.keys()
    print("imported:", *sorted(heavy))
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "methods side by side over seeds, from one YAML"),
        (["train", "--help"], 0, "a file of each client; NAME=FILE names one"),
        (
            ["train", "--clients", "x.csv", "--images", "x"],
            2,
            "train: give either --clients, a file of each",
        ),
        (["predict", "runs/mine"], 2, "hf-fedmoe predict: the following arguments are required: file"),
        (["compare", "--help"], 0, "train only these rows"),
        (["--version"], 0, f"hf_fedmoe {__version__}"),
        (["comapre"], 2, "hf-fedmoe: argument COMMAND: invalid choice: 'comapre' (choose from"),
        ([], 2, "hf-fedmoe: the following arguments are required: COMMAND"),
        (["compare"], 2, "hf-fedmoe compare: the following arguments are required: file"),
        (["expert", "--help"], 0, "a mixture without an owner"),
        (["expert", "train", "--name", "court"], 2, "expert train: the following arguments are required: --base"),
        (["compare", "x.yaml", "--jobs", "many"], 2, "argument --jobs: invalid int value: 'many'"),
    ],
)
def test_help_and_typing_errors_take_less_than_a_second_of_processor_time(words, code, said):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert done.stdout.strip().split("\n")[-1] == "imported:"
    assert done.stderr.count("\n") == (1 if code else 0)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_import_registers_the_architectures_everywhere_else():
    script = "import hf_fedmoe; from transformers import AutoConfig; print(AutoConfig.for_model('fedmoe').model_type)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "fedmoe", done.stderr
