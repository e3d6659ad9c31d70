"""Clients trained by DeepSpeed, ZeRO 1 to 3, in two processes end like those of one process without it."""

import json
import sys
from functools import partial

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_fedmoe.strategies import ZeroGateFit
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import METHODS, trainer
from tests.invariants.test_shared_batches import (
    TOLERANCE,
    BrokenRow,
    assert_equal_gate_reports,
    assert_like_one_process,
    recorded_rounds,
    settings,
    shared_gate,
)
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_decoder,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
)
from tests.two_processes import (
    PROCESSES,
    ROOT,
    assert_same,
    index_of_this_process,
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
    "fedavg_plus-1": {"stage": 1},
    "clustered-2": {"stage": 2},
    "decentralised-3": {"stage": 3},
}
STAGES = (1, 2, 3)


# Method, stage, adapter, and other settings. Of GPT-2's adapters every weight decays: the optimizer's group of those
# that do not is empty.
ADAPTERS = {
    "lora-1": ("fedavg", 1, LoraConfig(r=4), {}),
    "lora-2": ("fedavg", 2, LoraConfig(r=4), {"client_ranks": [4, 2]}),
    "lora-3": ("fedavg", 3, LoraConfig(r=4, target_modules=["query", "word_embeddings"]), {}),
    "lora-ffa-3": ("fedavg", 3, LoraConfig(r=4), {"lora_fusion": "ffa", "gradient_checkpointing": True}),
    "lora-fedprox-2": ("fedprox", 2, LoraConfig(r=4, fan_in_fan_out=True), {"base": tiny_decoder}),
    "lora-fedprox-3": ("fedprox", 3, LoraConfig(r=4), {"client_ranks": [4, 2]}),
    "ia3-3": ("fedavg", 3, IA3Config(), {}),
    "lora-fedmoe-1": ("fedmoe", 1, LoraConfig(r=4), {"lora_fusion": "ffa"}),
    "lora-fedmoe-3": ("fedmoe", 3, LoraConfig(r=4), {}),
}


def engine(stage, bf16=False):
    zero = stage if isinstance(stage, dict) else {"stage": stage}
    if zero["stage"] == 3:  # or it leaves parameters as small as these whole
        zero = zero | {"stage3_param_persistence_threshold": 0}
    return {"deepspeed": {"zero_optimization": zero, "bf16": {"enabled": bf16}, "gradient_clipping": "auto"}}


def changed_settings(method, changes):
    return {**settings(method), "client_parallelism": None, "rounds": 3} | changes


def run_by_name(name, output_dir, **changes):
    method = name.split("-")[0]
    run = trainer(method, output_dir, **changed_settings(method, changes))
    run.train()
    run.save_model(str(output_dir / "saved"))
    return run


def adapters(method, peft_config, output_dir, base=tiny_expert, **changes):
    """Without the dropout of those in `LORA_RUNS`."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    args = tiny_args(output_dir, **evaluation | changed_settings(method, changes))
    parts = (args, tiny_federation(), METHODS[method].strategy())
    if method == "fedmoe":
        return FederatedTrainer(tiny_mixture(peft_config=peft_config), *parts)
    return FederatedTrainer(base(), *parts, peft_config=peft_config)


def adapters_by_name(name, output_dir, **changes):
    method, _, peft_config, own = ADAPTERS[name]
    run = adapters(method, peft_config, output_dir, **own, **changes)
    run.train()
    run.save_model(str(output_dir / "saved"))
    return run


def plain(name):
    return lambda output_dir: run_by_name(name, output_dir, **engine(PLAIN[name]))


def plain_adapters(name):
    return lambda output_dir: adapters_by_name(name, output_dir, **engine(ADAPTERS[name][1]))


def bf16_base():
    base = tiny_expert().bfloat16()
    base.classifier.float()
    return base


# Kind of the gate and stage: an engine trains one that is a model of its own.
GATES = {**{f"gate_model-{stage}": ("model", stage) for stage in STAGES}, "gate_adapter-2": ("adapter", 2)}


def gate_by_name(name, output_dir):
    kind, stage = GATES[name]
    run = shared_gate(kind, output_dir, **engine(stage))
    assert isinstance(run._federation().gate_fit, ZeroGateFit) == (kind == "model")
    return run


# What each asks for bf16 by: DeepSpeed's configuration, the arguments, both.
BF16_ADAPTERS = {
    "lora-bf16-1": engine(1, bf16=True),
    "lora-bf16-2": engine(2, bf16="auto") | {"bf16": True},
    "lora-bf16-3": engine(3, bf16=True) | {"bf16": True},
    "lora-bf16-base-3": engine(3, bf16="auto") | {"bf16": True},
}


def bf16_adapters(name, output_dir, **changes):
    base = bf16_base if "base" in name else tiny_expert
    run = adapters("fedavg", LoraConfig(r=4), output_dir, base, **changes)
    run.train()
    return run


def held(stage):
    """Returns what a process holds of an adapter at the end of a round, beside the record."""

    def run(output_dir):
        run = adapters("fedavg", LoraConfig(r=4), output_dir, rounds=1, **engine(stage))

        class Look(TrainerCallback):
            def on_epoch_end(self, *args, **kwargs):
                zero, local = run._active_federation.engine.zero.zero, run._active_federation.local_trainer
                expert, optimizer = zero.engine.module, zero.engine.optimizer.optimizer
                frozen = [[p for p in e.parameters() if not p.requires_grad] for e in (expert.base, run.model)]
                facts = {
                    "adapter": sum(p.numel() for p in expert.parameters()),
                    "exp_avg": sum(state["exp_avg"].numel() for state in optimizer.state.values()),
                    "all": local.layout.num_elements,
                    "shares_base": all(a.data_ptr() == b.data_ptr() for a, b in zip(*frozen, strict=True)),
                }
                (output_dir / f"held-{run.args.process_index}.json").write_text(json.dumps(facts))

        run.add_callback(Look())
        run.train()
        return run

    return run


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
    """One process fails before, the other after a client's training."""
    args = tiny_args(output_dir, clients_per_round=4, rounds=1, **engine(2))
    run = FederatedTrainer(tiny_expert(), args, tiny_federation())
    federation = run._federation

    def failing():
        made = federation()
        fit = made.engine.zero.fit

        def fails(task):
            if task.client == 0 and index_of_this_process() == 0:
                raise OSError("before")
            found = fit(task)
            if task.client == 1 and index_of_this_process() == 1:
                raise OSError("after")
            return found

        made.engine.zero.fit = fails
        return made

    run._federation = failing
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
    **{name: plain_adapters(name) for name in ADAPTERS},
    **{name: partial(bf16_adapters, name, **changes) for name, changes in BF16_ADAPTERS.items()},
    **{
        f"{name}-without-learning": partial(bf16_adapters, name, learning_rate=0.0, **changes)
        for name, changes in BF16_ADAPTERS.items()
    },
    **{f"held-{stage}": held(stage) for stage in STAGES},
    **{name: partial(gate_by_name, name) for name in GATES},
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


@pytest.mark.parametrize("name", GATES)
def test_a_gate_that_reads_examples_ends_like_that_of_one_process(name, folder, tmp_path):
    record(shared_gate(GATES[name][0], tmp_path, client_parallelism=None), tmp_path / "alone")
    assert_equal_gate_reports(folder / f"{name}-0", tmp_path / "alone")
    assert_same(*(folder / f"{name}-{index}" for index in range(PROCESSES)))
    # Adam divides small gradients by themselves.
    states = (load_file(folder / f"{name}-0.safetensors"), load_file(tmp_path / "alone.safetensors"))
    assert_equal_states(*states, rtol=1e-3, atol=1e-3)
    rows = [(folder / name / f"gate_rows-{index}").read_text() for index in range(PROCESSES)]
    assert rows == [str(8 * 13), str(8 * 10)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_end_like_those_of_one_process(name, folder, tmp_path):
    method, _, _, own = ADAPTERS[name]
    alone = adapters_by_name(name, tmp_path / name)
    record(alone, tmp_path / "alone")
    assert_like_one_process(method, folder / name, tmp_path / "alone")
    path = folder / name / "saved"
    base = own.get("base", tiny_expert)()
    saved = type(alone.model).from_pretrained(*[path] if method == "fedmoe" else [base, path])
    assert_equal_states(state(saved), load_file(folder / f"{name}-0.safetensors"))


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("name", BF16_ADAPTERS)
def test_bf16_of_adapters_is_that_of_autocast(name, folder, tmp_path):
    alone = bf16_adapters(name, tmp_path / "alone", bf16=True)
    trained = load_file(folder / f"{name}-0.safetensors")
    assert_equal_states(trained, state(alone.model), rtol=0.0, atol=1e-3)
    adapter = [tensor for key, tensor in trained.items() if ".default." in key]
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapter)
    # While weights stay the same, losses tell bf16 from fp32.
    found = losses(json.loads((folder / f"{name}-without-learning-0.json").read_text())["log"])
    still = bf16_adapters(name, tmp_path / "bf16", bf16=True, learning_rate=0.0)
    assert found == pytest.approx(losses(still.state.log_history), rel=5e-7)
    if "base" not in name:
        fp32 = bf16_adapters(name, tmp_path / "fp32", learning_rate=0.0)
        assert found != pytest.approx(losses(fp32.state.log_history), rel=5e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_of_adapters_optimizer_and_weights_are_shared_out_and_the_base_is_the_servers(stage, folder):
    both = [json.loads((folder / f"held-{stage}" / f"held-{index}.json").read_text()) for index in range(PROCESSES)]
    for facts in both:
        size = facts["all"]
        assert facts["adapter"] == (0 if stage == 3 else size)
        assert size / PROCESSES <= facts["exp_avg"] < 0.6 * size
        assert facts["shares_base"]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_that_of_the_engine_alone(stage, folder, tmp_path):
    left = load_file(folder / f"bf16-without-learning-{stage}-1.safetensors")
    assert_equal_states(left, state(tiny_expert()))
    run = run_by_name("fedavg", tmp_path)
    expected = losses(run.state.log_history)
    found = losses(json.loads((folder / f"bf16-{stage}-0.json").read_text())["log"])
    assert found == pytest.approx(expected, rel=0.02) and found != expected
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
        run._active_federation.engine.zero.zero.engine.module.forward = None
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
        assert code != 0 and "BrokenOffError: DeepSpeed failed, TypeError" in output, output
