"""A run that was stopped and resumed ends with the bits of one that was not."""

import multiprocessing
import random
import signal
import time

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_fedmoe.data import hold_out_client_tests
from hf_fedmoe.strategies import (
    AFL,
    APFL,
    L2SGD,
    QFFL,
    ClusteredFL,
    Decentralised,
    FedAvg,
    FedAvgMovingAverage,
    FedAvgPlus,
    FedAvgReserved,
    FedEM,
    FedJETs,
    FedMix,
    FedProx,
    FedRep,
    FedRolex,
    HeteroFL,
    Local,
    PFedMe,
    PFedMM,
    freeze_common_expert,
)
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    timeless,
    tiny_args,
    tiny_ensemble,
    tiny_expert,
    tiny_federation,
    tiny_gated_experts,
    tiny_mixture,
    tiny_multi_head,
    tiny_pfedmoe,
    tiny_rows,
)


RUNS = {
    "fedavg": (FedAvg, {}),
    "fedavg_client_optimizer": (FedAvg, {"keep_client_optimizer": True}),
    "fedavg_reserved": (FedAvgReserved, {}),
    "fedavg_reserved_end": (lambda: FedAvgReserved(when="end"), {}),
    "fedavg_moving_average": (FedAvgMovingAverage, {}),
    "fedavg_top_k": (FedAvg, {"upload_compression": "top_k", "top_k_share": 0.1, "keep_client_optimizer": True}),
    "fedprox": (FedProx, {"lr_scheduler_scope": "run"}),
    "local": (Local, {"keep_client_optimizer": True}),
    "fedavg_plus": (FedAvgPlus, {}),
    "fedrep": (FedRep, {"keep_client_optimizer": True, "upload_compression": "top_k"}),
    "pfedme": (PFedMe, {}),
    "apfl": (lambda: APFL(adapt=True), {"upload_compression": "top_k"}),
    "l2sgd": (L2SGD, {"keep_client_optimizer": True}),
    "fedem": (FedEM, {"keep_client_optimizer": True, "upload_compression": "top_k"}),
    "pfedmm": (PFedMM, {"keep_client_optimizer": True, "upload_compression": "top_k"}),
    "pfedmm_absent": (lambda: PFedMM(include_absent=True), {}),
    "pfedmoe": (tiny_pfedmoe, {"upload_compression": "top_k"}),
    "qffl": (QFFL, {}),
    "afl": (AFL, {}),
    "clustered": (lambda: ClusteredFL(eps1=100.0, eps2=0.0, min_size=1), {}),
    "decentralised": (Decentralised, {}),
    "fedmix": (FedMix, {"keep_client_optimizer": True, "upload_compression": "top_k"}),
    "fedjets": (lambda: FedJETs(experts_per_client=1), {"keep_client_optimizer": True, "clients_per_round": 3}),
    "fedrolex": (lambda: FedRolex((1.0, 0.5)), {}),
    "heterofl": (lambda: HeteroFL((0.5, 1.0)), {}),
    "fedmoe": (None, {}),
    "fedmoe_paper": (None, {"preset": "paper", "keep_client_optimizer": True}),
    "fedmoe_paper_top_k": (None, {"preset": "paper", "upload_compression": "top_k"}),
    "fedmoe_download_mixture": (None, {"synchronisation": "download_mixture", "server_iterations": 2}),
    "fedmoe_expert_epochs": (None, {"expert_epochs": 1}),
    "fedmoe_download_epochs": (None, {"download_epochs": 1}),
}
PERSONAL_RUNS = (
    "local",
    "fedem",
    "pfedmm",
    "pfedmm_absent",
    "pfedmoe",
    "fedavg_plus",
    "fedrep",
    "pfedme",
    "apfl",
    "l2sgd",
    "clustered",
    "decentralised",
    "fedrolex",
    "heterofl",
)
# What is trained, where that is not one classifier.
MODELS = {
    "fedem": tiny_ensemble,
    "pfedmm": tiny_multi_head,
    "pfedmm_absent": tiny_multi_head,
    "fedmix": tiny_gated_experts,
    "fedjets": lambda: freeze_common_expert(tiny_mixture(num_routed_experts=3)),
}
# The same with adapters in the place of whole models.
LORA_RUNS = {
    "lora_fedavg": (FedAvg, {"client_ranks": [4, 2], "keep_client_optimizer": True}),
    "lora_fedavg_ffa": (FedAvg, {"lora_fusion": "ffa"}),
    "lora_fedprox_factors": (FedProx, {"lora_fusion": "factors", "upload_compression": "int8"}),
    "lora_moving_average": (FedAvgMovingAverage, {}),
    "lora_fedmoe": (None, {"server_iterations": 2}),
    "lora_fedmoe_paper": (None, {"preset": "paper", "client_ranks": [4, 1]}),
    "lora_fedmoe_ffa_expert_epochs": (None, {"lora_fusion": "ffa", "expert_epochs": 1, "download_epochs": 1}),
    "lora_fedmoe_download_mixture": (None, {"synchronisation": "download_mixture"}),
}


def trainer(name, output_dir, **changes):
    strategy, settings = (RUNS | LORA_RUNS)[name]
    lora = LoraConfig(r=4, lora_dropout=0.1) if name in LORA_RUNS else None
    args = tiny_args(
        output_dir,
        **{"rounds": 4, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, **settings, **changes},
    )
    if strategy is None:
        return FedMoETrainer(tiny_mixture(peft_config=lora), args, train_dataset=tiny_federation())
    data = hold_out_client_tests(tiny_federation(), 0.3) if name in PERSONAL_RUNS else tiny_federation()
    model = MODELS.get(name, tiny_expert)()
    return FederatedTrainer(model, args, data, strategy=strategy(), peft_config=lora)


@pytest.mark.parametrize("name", [*RUNS, *LORA_RUNS])
def test_resumed_run_equals_uninterrupted_run_bitwise(name, tmp_path):
    whole = trainer(name, tmp_path / "whole")
    whole.train()

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    interrupted = trainer(name, tmp_path / "resumed")
    interrupted.add_callback(Stop())
    interrupted.strategy.finish = lambda *_: None  # a killed run never gets there
    interrupted.train()
    resumed = trainer(name, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
    if name in PERSONAL_RUNS:
        states = [[state(model) for model in personal_models(run)] for run in (resumed, whole)]
        for mine, theirs in zip(*states, strict=True):
            assert_equal_states(mine, theirs)
        assert resumed.evaluate_clients() == whole.evaluate_clients()
        newcomer = tiny_rows(10, seed=5)
        assert_equal_states(state(resumed.personalize(newcomer)), state(whole.personalize(newcomer)))


def personal_models(run):
    """Each in its turn: they may live in one worker."""
    federation = run._federation_of_the_last_round()
    return (federation.personal_model(client) for client in range(federation.num_clients))


ROUNDS_TO_BE_KILLED_IN = 1000


def _run_until_killed(name, output_dir):
    torch.set_num_threads(1)
    run = trainer(name, output_dir, rounds=ROUNDS_TO_BE_KILLED_IN)
    run.train(resume_from_checkpoint=get_last_checkpoint(str(output_dir)))


@pytest.mark.parametrize("name", ["fedmoe", "fedmoe_paper"])
def test_killed_at_twenty_random_moments_ends_with_the_same_bits(name, tmp_path):
    torch.set_num_threads(1)
    output_dir, rng, context = tmp_path / "killed", random.Random(3), multiprocessing.get_context("fork")
    output_dir.mkdir()
    for kill in range(20):
        before = get_last_checkpoint(str(output_dir))
        process = context.Process(target=_run_until_killed, args=(name, output_dir))
        process.start()
        # Every other run dies at any moment of its start or first rounds, the others some time after a checkpoint.
        if kill % 2:
            deadline = time.monotonic() + 60
            while get_last_checkpoint(str(output_dir)) == before:
                assert process.is_alive() and time.monotonic() < deadline
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    reached = int(get_last_checkpoint(str(output_dir)).split("-")[-1])
    assert reached >= 10
    whole, resumed = (trainer(name, folder, rounds=reached + 2) for folder in (tmp_path / "whole", output_dir))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
