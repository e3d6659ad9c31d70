"""Two processes as launchers start them, and end them."""

import sys

import pytest
from safetensors.torch import load_file

from tests.invariants.test_two_processes import run_by_name
from tests.tiny_federation import assert_equal_states, state
from tests.two_processes import PROCESSES, ROOT, run_to_its_end


pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
from hf_fedmoe.federation import server_step
from tests.invariants.test_two_processes import fedmoe_sums, run_by_name, trainer
from tests.two_processes import index_of_this_process
from transformers import TrainerCallback

if sys.argv[1] == "sound":
    run = run_by_name("fedavg", sys.argv[2])
    run.save_model(sys.argv[2] + "/final")
    print(f"{run.args.world_size} processes")
elif sys.argv[1].isdigit():
    if index_of_this_process() == int(sys.argv[1]):
        server_step.fuse_ = None
    fedmoe_sums(Path(sys.argv[2]))
else:
    class Breaks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if index_of_this_process():
                raise OSError("no callback")

    run = trainer("fedavg", sys.argv[2])
    run.add_callback(Breaks())
    run.train()
"""


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launchers(launcher, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    config = ROOT / "recipes" / "accelerate_configs" / "cpu_2.yaml"
    modules = {
        "accelerate": ["accelerate.commands.launch", "--config_file", str(config)],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    }
    command = [sys.executable, "-m", *modules[launcher], str(script)]
    code, output = run_to_its_end([*command, "sound", str(tmp_path / "two")])
    assert code == 0 and output.count("2 processes") == 2, output
    alone = run_by_name("fedavg", tmp_path / "alone")
    assert_equal_states(load_file(tmp_path / "two" / "final" / "model.safetensors"), state(alone.model))
    # Here one process leaves where no other can know of it: the launcher ends the rest.
    code, output = run_to_its_end([*command, "broken", str(tmp_path / "broken")])
    assert code != 0 and "OSError: no callback" in output


@pytest.mark.parametrize("index", range(PROCESSES))
def test_what_all_do_at_once_and_breaks_off_in_one_process_ends_the_run(index, tmp_path):
    """Nobody can tell the others, which are in a collective: the launcher ends them."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    code, output = run_to_its_end([*command, str(index), str(tmp_path / "run")])
    assert code != 0 and "BrokenOffError: Fusion failed, TypeError" in output, output
