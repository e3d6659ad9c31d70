"""Clients trained by DeepSpeed, ZeRO 1 to 3, in two processes end like those of one process without it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_fedmoe.training import FederatedTrainer
from tests.every_method import trainer
from tests.invariants.test_shared_batches import (
    TOLERANCE,
    BrokenRow,
    FailsSomewhere,
    assert_like_one_process,
    recorded_rounds,
    settings,
)
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation
from tests.two_processes import (
    PROCESSES,
    ROOT,
    join_group,
    launch,
    record,
    run_to_its_end,
)


pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

PLAIN = {
    **{f"fedavg-{stage}": {"stage": stage} for stage in (1, 2, 3)},
    "fedavg-offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "fedprox-2": {"stage": 2},
    "fedprox-3": {"stage": 3},
    "fedmoe-3": {"stage": 3},
}
STAGES = (1, 2, 3)


def engine(stage, bf16=False):
    zero = stage if isinstance(stage, dict) else {"stage": stage}
    return {"deepspeed": {"zero_optimization": zero, "bf16": {"enabled": bf16}, "gradient_clipping": "auto"}}


def run_by_name(name, output_dir, **changes):
    method = name.split("-")[0]
    run = trainer(method, output_dir, **{**settings(method), "client_parallelism": None, "rounds": 3} | changes)
    run.train()
    run.save_model(str(output_dir / "saved"))
    return run


def plain(name):
    return lambda output_dir: run_by_name(name, output_dir, **engine(PLAIN[name]))


def bf16(stage):
    return lambda output_dir: run_by_name("fedavg", output_dir, **engine(stage, bf16=True))


def bf16_without_learning(stage):
    changes = {"learning_rate": 0.0, "clients_per_round": 1}
    return lambda output_dir: run_by_name("fedavg", output_dir, **engine(stage, bf16=True), **changes)


def loaded_beside(output_dir):
    """`from_pretrained` after a configuration with ZeRO-3 was read would give other integrations a part of a model."""
    args = tiny_args(output_dir, rounds=1, **engine(3))
    model = AutoModelForSequenceClassification.from_pretrained(output_dir.parent / "start")
    assert_equal_states(state(model), state(tiny_expert()))
    run = FederatedTrainer(model, args, tiny_federation())
    run.train()
    return run


def broken_row(output_dir):
    args = tiny_args(output_dir, clients_per_round=3, rounds=2, **engine(3))
    run = FederatedTrainer(tiny_expert(), args, tiny_federation())
    run.train_data_collator = BrokenRow(run.train_data_collator)
    run.train()
    return run


def fails_somewhere(output_dir):
    args = tiny_args(output_dir, clients_per_round=4, rounds=1, **engine(2))
    run = FederatedTrainer(tiny_expert(), args, tiny_federation(), FailsSomewhere())
    run.train()
    return run


def infinite(output_dir):
    """A client whose gradients are not finite, which DeepSpeed would pass over."""
    run = FederatedTrainer(tiny_expert(), tiny_args(output_dir, clients_per_round=4, **engine(3)), tiny_federation())
    federation = run._federation

    def broken():
        made = federation()
        download = made.strategy.download
        made.strategy.download = lambda server, client, kept_P: download(server, client, kept_P) / (client != 1)
        return made

    run._federation = broken
    run.train()
    return run


RUNS = {
    **{name: plain(name) for name in PLAIN},
    **{f"bf16-{stage}": bf16(stage) for stage in STAGES},
    **{f"bf16-without-learning-{stage}": bf16_without_learning(stage) for stage in STAGES},
    "loaded_beside": loaded_beside,
    "broken_row": broken_row,
    "fails_somewhere": fails_somewhere,
    "infinite": infinite,
}


def process(index, port, folder, names):
    join_group(index, port)
    for name in names:
        record(RUNS[name](folder / name), folder / f"{name}-{index}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    tiny_expert().save_pretrained(folder / "start")
    launch(process, folder, list(RUNS), seconds=900)
    return folder


@pytest.mark.parametrize("name", PLAIN)
def test_zero_ends_like_one_process(name, folder, tmp_path):
    alone = run_by_name(name, tmp_path / name)
    record(alone, tmp_path / "alone")
    assert_like_one_process(name.split("-")[0], folder / name, tmp_path / "alone")
    saved = type(alone.model).from_pretrained(folder / name / "saved")
    assert_equal_states(state(saved), load_file(folder / f"{name}-0.safetensors"))


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_that_of_the_engine_alone(stage, folder, tmp_path):
    left = load_file(folder / f"bf16-without-learning-{stage}-1.safetensors")
    assert_equal_states(left, state(tiny_expert()))
    run = run_by_name("fedavg", tmp_path)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    log = json.loads((folder / f"bf16-{stage}-0.json").read_text())["log"]
    found = [entry["loss"] for entry in log if "loss" in entry]
    assert found == pytest.approx(losses, rel=0.02) and found != losses
    trained = load_file(folder / f"bf16-{stage}-0.safetensors")
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())


def test_models_are_loaded_whole(folder, tmp_path):
    args = tiny_args(tmp_path, rounds=1)
    run = FederatedTrainer(tiny_expert(), args, tiny_federation())
    run.train()
    assert_equal_states(load_file(folder / "loaded_beside-1.safetensors"), state(run.model), **TOLERANCE)


@pytest.mark.parametrize("name", ["broken_row", "fails_somewhere"])
def test_a_client_that_fails_in_one_process_fails_in_all(name, folder):
    rounds = recorded_rounds(folder, name)
    if name == "broken_row":
        (clients, refused, _), (_, others, _) = rounds
        assert refused == {str(clients[place]): "OSError: bad sector" for place in (0, 2)} and not others
    else:
        assert rounds[0][1] == {"0": "OSError: before", "1": "OSError: after"}


def test_gradients_that_are_not_finite_refuse_their_client(folder):
    for _, refused, _ in recorded_rounds(folder, "infinite"):
        assert refused == {"1": "ValueError: a gradient is not finite"}


SCRIPT = """
import sys
from pathlib import Path

from tests.invariants.test_zero import process_of_a_launch

process_of_a_launch(sys.argv[1], Path(sys.argv[2]))
"""


def process_of_a_launch(name, output_dir):
    run = trainer("fedavg", output_dir, **settings("fedavg") | {"client_parallelism": None})
    print(f"{run.args.client_parallelism} {run.args.deepspeed['zero_optimization']['stage']}")
    if name == "broken":
        run.callback_handler.on_epoch_begin = lambda *args: _break(run, *args)
    run.train()
    run.save_model(str(output_dir / "final"))


def _break(run, args, state, control):
    """From the second round on the model of one process raises: there the others are in a collective."""
    if state.global_step and run.args.process_index:
        run._active_federation.local_trainer.engine.module.forward = None
    return control


@pytest.mark.parametrize("stage", STAGES)
def test_launchers_with_the_shipped_configurations(stage, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    config = ROOT / "recipes" / "accelerate_configs" / f"zero{stage}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    code, output = run_to_its_end([*command, "sound", str(tmp_path / "two")], seconds=600)
    assert code == 0 and output.count(f"data {stage}") == PROCESSES, output
    alone = trainer("fedavg", tmp_path / "alone", **settings("fedavg"))
    alone.train()
    found = load_file(tmp_path / "two" / "final" / "model.safetensors")
    assert_equal_states(found, state(alone.model), **TOLERANCE)
    if stage == 3:
        code, output = run_to_its_end([*command, "broken", str(tmp_path / "broken")], seconds=600)
        assert code != 0 and "EngineError: DeepSpeed failed, TypeError" in output, output
