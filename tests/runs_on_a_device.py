"""Runs that end alike on a GPU and on the CPU but for rounding: what `tests/training/test_on_gpu.py` compares."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForSequenceClassification, default_data_collator

from hf_fedmoe.demo import explain
from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.reporting import analyse_experts, diagnose
from hf_fedmoe.strategies import FedAvgReserved, PFedMoE
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests import every_method
from tests.every_method import METHODS, PERSONAL_RUNS, RUNS, image_model, trainer
from tests.tiny_federation import (
    NUM_LABELS,
    tiny_args,
    tiny_decoder,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
    tiny_rows,
)
from tests.tiny_images import tiny_image_federation, tiny_processor
from tests.tiny_models import make_different, tiny_bert
from tests.training.test_owners_of_text import CLIENTS, rows_of
from tests.training.test_owners_of_text import trainer as owners_trainer


# Some gradients are 0 but for rounding, which Adam would divide by itself.
SETTINGS = {"rounds": 2, "adam_epsilon": 1e-3, "save_strategy": "no"}
Numbers = list[list[float]]


def trained(method: str, folder: Path, use_cpu: bool, lora: bool = False, **changes: Any) -> FederatedTrainer:
    """A finished run of Fed-MoE, of FedAvg or of one that is tuned at the end, with texts."""
    peft_config = LoraConfig(r=4) if lora else None
    args = tiny_args(folder, use_cpu=use_cpu, **SETTINGS | changes)
    if method in ("fedavg", "fedavg_tuned_at_end"):
        strategy = FedAvgReserved(when="end", epochs=4, learning_rate=1e-2) if method != "fedavg" else None
        run = FederatedTrainer(tiny_expert(), args, tiny_federation(), strategy, peft_config=peft_config)
    else:
        run = FedMoETrainer(tiny_mixture(peft_config=peft_config), args, train_dataset=tiny_federation())
    run.train()
    return run


def device_of(model: nn.Module) -> str:
    """The device of all parameters."""
    (device,) = {parameter.device.type for parameter in model.parameters()}
    return device


def losses(run: FederatedTrainer) -> list[float]:
    """Lists those of the clients in each round, and that of the server's model at the end."""
    # Krum refuses, which is what it is for.
    assert run.args.robust_fusion == "krum" or not any(report.refused for report in run.rounds)
    return [*(report.loss for report in run.rounds), run.evaluate()["eval_loss"]]


def text_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Texts that no run was trained on, where the model is."""
    rows = tiny_rows(20, seed=1).with_format("torch")
    return {name: rows[name][:].to(device_of(model)) for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def logits(model: nn.Module) -> Numbers:
    return model.eval()(**text_inputs(model)).logits.float().tolist()


def plain_run(folder: Path, use_cpu: bool, method: str, **changes: Any) -> dict[str, Any]:
    run = trained(method, folder, use_cpu, **changes)
    return {"device": device_of(run.model), "losses": losses(run), "logits": logits(run.model)}


def run_of_a_method(folder: Path, use_cpu: bool, name: str) -> dict[str, Any]:
    with without_dropout():
        run = trainer(name, folder, use_cpu=use_cpu, **SETTINGS)
        run.train()
    refused = [list(report.refused) for report in run.rounds]
    found = {"device": device_of(run.model), "losses": losses(run), "refused": refused}
    if name in PERSONAL_RUNS:
        found["names"] = sorted(run.evaluate_clients())
        found["logits"] = logits(run.personalize(0))
    return found


@contextmanager
def without_dropout() -> Iterator[None]:
    """Runs of other tests have dropout in adapters and in own models; its masks are other ones on each device."""

    def strategy() -> PFedMoE:
        bert = tiny_bert(NUM_LABELS, hidden_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return PFedMoE([bert.config, tiny_decoder().config], gate_hidden_size=5)

    with (
        mock.patch.object(every_method, "lora", lambda: LoraConfig(r=4)),
        mock.patch.object(RUNS["pfedmoe"], "strategy", strategy),
    ):
        yield


def image_run(folder: Path, use_cpu: bool, method: str, **changes: Any) -> dict[str, Any]:
    """A run with normalisation layers; what its rounds tell, and the losses of the server's model."""
    args = tiny_args(folder, use_cpu=use_cpu, **SETTINGS | changes)
    data, processor = tiny_image_federation(5), tiny_processor()
    strategy = (METHODS[method].image_strategy or METHODS[method].strategy)()
    run = FederatedTrainer(image_model(method), args, data, strategy, processing_class=processor)
    run.train()
    found = [report.loss for report in run.rounds] + [run.evaluate()["eval_loss"]]
    told = [(sorted(report.refused), report.metrics) for report in run.rounds]
    return {"device": device_of(run.model), "losses": found, "told": told}


def private_run(folder: Path, use_cpu: bool, **changes: Any) -> dict[str, Any]:
    """A run of texts whose noise follows from the seed; what clients tell of their losses is hidden from the log."""
    run = trained("fedavg", folder, use_cpu, noise_source="seed", clients_per_round=3, **changes)
    norm = torch.stack([parameter.detach().norm() for parameter in run.model.parameters()]).norm().item()
    return {"device": device_of(run.model), "loss": run.evaluate()["eval_loss"], "norm": norm}


def owners_run(folder: Path, use_cpu: bool, **changes: Any) -> dict[str, Any]:
    """Owners of texts in rounds: what the router makes of each one's text, what it costs, and a continuation."""
    run = owners_trainer(folder, use_cpu=use_cpu, adam_epsilon=1e-3, **changes)
    run.train()
    model, found = run.model.eval(), {"device": device_of(run.model), "losses": [r.loss for r in run.rounds]}
    with torch.no_grad():
        for client in CLIENTS:
            ids_NT = torch.tensor(rows_of(client)["input_ids"][:4]).to(model.device)
            found[client] = {
                "weights": model.route(ids_NT)[:, -1].tolist(),
                "by_likelihood": model.route_by_likelihood(ids_NT)[:, -1].tolist(),
                "loss": [model(input_ids=ids_NT, labels=ids_NT, **how).loss.item() for how in ({}, {"expert": 1})],
                "merged": model.merge("press")(input_ids=ids_NT, labels=ids_NT).loss.item(),
            }
    found["written"] = model.generate(ids_NT, max_new_tokens=6, do_sample=False)[:, -6:].tolist()
    return found


def told_of_clients(folder: Path, device: str) -> dict[str, Any]:
    """Returns the experts' scores on rows, in what clients differ, and the parts of an answer of a demo."""
    model, expert = mixture(lora=False).to(device), tiny_expert().to(device)
    analysed = analyse_experts(model, tiny_rows(40), default_data_collator, batch_size=7)
    differ = diagnose(tiny_federation(4, 40), expert, default_data_collator)
    inputs = {name: tensor[:1] for name, tensor in text_inputs(model).items()}
    shown = explain(model, inputs, [True, False, True, True])
    return {
        "analysed": [analysed.share_KC.tolist(), {name: own["accuracy"] for name, own in analysed.scores.items()}],
        "differ": [differ.groups, differ.shift_MM.tolist()],
        "shown": [shown.probabilities_C.tolist(), shown.weights_S.tolist()],
    }


def loaded_logits(folder: Path) -> Numbers:
    return logits(AutoModelForSequenceClassification.from_pretrained(folder))


def mixture(lora: bool) -> FedMoEForSequenceClassification:
    """Three experts that answer differently, and a gate that prefers each for some texts; the same every time."""
    model = tiny_mixture(3, peft_config=LoraConfig(r=4) if lora else None)
    for seed, expert in enumerate(model.experts):
        make_different(expert, 0.3, seed)
    make_different(model.gate, 3.0)
    with torch.no_grad():
        model.gate.bias -= model.eval()(**text_inputs(model), dense=True).gate_probs.log().mean(0)
    return model


@torch.no_grad()
def sparse_inference(device: str, lora: bool, top_l: int) -> dict[str, Any]:
    """
    Probabilities of the mixture, the experts that it chose and how clear the choice was; and the probabilities by
    hand (Eq. 10), of every expert run on every text.
    """
    model = mixture(lora).to(device)
    batch = text_inputs(model)
    output = model(**batch, top_l=top_l, dense=False)
    logits_BSC, features_BH = model.expert_outputs(batch)
    probs_BSC, gate_BK = logits_BSC.softmax(-1), model.gate_logits(features_BH, batch).softmax(-1)
    order_BK = gate_BK.argsort(descending=True)
    by_hand = []
    for probs_SC, gate_K, chosen_L in zip(probs_BSC, gate_BK, order_BK[:, :top_l], strict=True):
        mixed_C = (gate_K[chosen_L].softmax(-1)[:, None] * probs_SC[1:][chosen_L]).sum(0)
        by_hand.append(((1 - model.alpha) * probs_SC[0] + model.alpha * mixed_C).tolist())
    return {
        "probs": output.logits.softmax(-1).tolist(),
        "chosen": output.selected_experts.tolist(),
        "margin": gate_BK.gather(1, order_BK).diff(dim=1).abs().min().item(),
        "by_hand": by_hand,
        "chosen_by_hand": order_BK[:, :top_l].tolist(),
    }
