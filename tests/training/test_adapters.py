"""Federated runs in which clients train and send adapters of one frozen base."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from hf_fedmoe.federation import Stream, seed_of
from hf_fedmoe.models import FedMoEForSequenceClassification, as_expert
from hf_fedmoe.strategies import FedAvg
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from hf_fedmoe.training.adapters import add_adapter
from hf_fedmoe.weights import StateLayout
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation, tiny_mixture


RANK, LAYERS, WIDTH, CLASSES = 4, 2, 16, 3
LORA = LoraConfig(r=RANK, lora_alpha=8)
HEAD = CLASSES * (WIDTH + 1)
FACTORS = LAYERS * 2 * 2 * RANK * WIDTH  # query and value, A and B


def fedavg(output_dir, peft_config=LORA, data=None, **changes) -> FederatedTrainer:
    trainer = FederatedTrainer(
        tiny_expert(), tiny_args(output_dir, **changes), data or tiny_federation(), FedAvg(), peft_config=peft_config
    )
    trainer.train()
    return trainer


def fedmoe(output_dir, peft_config=LORA, gate="main_features", **changes) -> FedMoETrainer:
    model = tiny_mixture(peft_config=peft_config, gate=gate)
    trainer = FedMoETrainer(model, tiny_args(output_dir, **changes), train_dataset=tiny_federation())
    trainer.train()
    return trainer


def base_state(trainer) -> dict[str, torch.Tensor]:
    """The base's tensors under their own names."""
    peft_model = trainer.model if isinstance(trainer.model, PeftModel) else trainer.model.base
    found = {}
    for name, tensor in peft_model.get_base_model().state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            found[name.replace("base_layer.", "").replace("original_module.", "")] = tensor
    return found


def logits(model, data) -> torch.Tensor:
    rows = data.validation.with_format("torch")
    with torch.no_grad():
        return model.eval()(input_ids=rows["input_ids"][:], attention_mask=rows["attention_mask"][:]).logits


@pytest.mark.parametrize("lora_fusion", ["svd", "ffa", "factors"])
@pytest.mark.parametrize("run", [fedavg, fedmoe])
def test_adapters_learn_and_the_base_stays_as_it_was(tmp_path, run, lora_fusion):
    trainer = run(tmp_path, lora_fusion=lora_fusion, rounds=6, num_train_epochs=3, learning_rate=0.1)
    assert_equal_states(base_state(trainer), state(tiny_expert()))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    logged = trainer.state.log_history[0]
    names = (
        {"discarded_energy"}
        if run is fedavg
        else {f"{n}_discarded_energy" for n in ("main_0", "expert_0", "expert_1")}
    )
    found = {name: value for name, value in logged.items() if name.endswith("discarded_energy")}
    assert found.keys() == (names if lora_fusion == "svd" else set())
    assert all(0 <= value < 0.5 for value in found.values())


@pytest.mark.parametrize(
    "changes, elements",
    [
        ({}, HEAD + FACTORS),
        ({"lora_fusion": "factors"}, HEAD + FACTORS),
        ({"lora_fusion": "ffa"}, HEAD + FACTORS // 2),
        ({"client_ranks": [1]}, HEAD + FACTORS // RANK),
    ],
)
def test_clients_send_adapters_and_heads_only(tmp_path, changes, elements):
    for trainer in (fedavg(tmp_path / "a", rounds=1, **changes), fedmoe(tmp_path / "b", rounds=1, **changes)):
        [report] = trainer.rounds
        assert report.bytes_up == report.bytes_down == 2 * 4 * elements


def test_ffa_keeps_the_common_a(tmp_path):
    start = tiny_mixture(peft_config=LORA).experts
    torch.manual_seed(7)
    model = tiny_mixture(peft_config=LORA)
    started = {name: p.detach().clone() for name, p in model.experts[0].named_parameters() if ".lora_A." in name}
    assert started and len(start) == 3
    trainer = FedMoETrainer(model, tiny_args(tmp_path, lora_fusion="ffa"), train_dataset=tiny_federation())
    trainer.train()
    for expert in trainer.model.experts:
        parameters = dict(expert.named_parameters())
        assert all(torch.equal(parameters[name], A) for name, A in started.items())
        assert any(p.any() for name, p in parameters.items() if ".lora_B." in name)


def test_clients_of_a_smaller_rank_upload_it(tmp_path):
    ranks = []

    class Watch(FedAvg):
        def update(self, server, uploads, *rest):
            for client, row_P in zip(uploads.clients, uploads.rows_mP, strict=True):
                views = server.layout.views(row_P)
                ranks.extend(
                    (client, int(torch.linalg.matrix_rank(views[B.name] @ views[A.name])))
                    for A, B in server.layout.lora
                )
            return super().update(server, uploads, *rest)

    args = tiny_args(tmp_path, client_ranks=[4, 2], rounds=3, clients_per_round=4)
    trainer = FederatedTrainer(tiny_expert(), args, tiny_federation(), Watch(), peft_config=LORA)
    trainer.train()
    assert {rank for client, rank in ranks if client % 2} == {2}
    assert {rank for client, rank in ranks if client % 2 == 0} == {4}


def test_one_client_and_one_round_equal_local_training(tmp_path):
    data = tiny_federation(num_clients=1, client_size=14)
    federated = fedavg(tmp_path, data=data, rounds=1, clients_per_round=1)
    model = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, clients_per_round=1), data, peft_config=LORA).model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(seed_of(11, Stream.LOCAL_TRAINING, 0, 0)))
    rows, model = data.client(0).with_format("torch"), model.train()
    for step, batch in enumerate(order.split(4)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 4)
        columns = {name: rows[name][:][batch] for name in ("input_ids", "attention_mask")}
        loss = model(**columns, labels=rows["label"][:][batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(logits(federated.model, data), logits(model, data), atol=1e-5, rtol=0)


def test_a_trained_adapter_is_a_plain_peft_checkpoint(tmp_path):
    trainer = fedavg(tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 4 * (HEAD + FACTORS) + 4096
    loaded = PeftModel.from_pretrained(tiny_expert(), tmp_path / "saved")
    data = tiny_federation()
    assert torch.equal(logits(loaded, data), logits(trainer.model, data))


@pytest.mark.parametrize("gate", ["main_features", "adapter"])
@pytest.mark.parametrize("peft_config", [LORA, IA3Config()])
def test_a_trained_mixture_with_its_base_by_name(tmp_path, peft_config, gate):
    tiny_expert().save_pretrained(tmp_path / "base")
    model = FedMoEForSequenceClassification.from_expert(
        tmp_path / "base", gate=gate, num_routed_experts=2, peft_config=peft_config
    )
    trainer = FedMoETrainer(model, tiny_args(tmp_path / "run"), train_dataset=tiny_federation())
    before = [p.detach().clone() for p in model.gate_parameters()]
    trainer.train()
    changed = [not torch.equal(p, old) for p, old in zip(model.gate_parameters(), before, strict=True)]
    # A of a query, behind a B that has just left zero, gets next to no gradient.
    assert changed[:2] == [True, True] and sum(changed) >= 0.7 * len(changed)
    trainer.save_model(str(tmp_path / "saved"))
    assert not any("embeddings" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    data = tiny_federation()
    assert torch.equal(logits(loaded, data), logits(trainer.model, data))


def test_what_stays_with_a_client_is_an_adapter(tmp_path):
    fedmoe(tmp_path, preset="paper", save_strategy="steps", rounds=2)
    files = list((tmp_path / "_clients").glob("client-*.safetensors"))
    assert 2 <= len(files) <= 4
    assert all(path.stat().st_size < 4 * 1.2 * (HEAD + FACTORS) + 512 for path in files)


def test_the_server_and_its_clients_share_one_base(tmp_path):
    found = []

    class Watch(FedAvg):
        def setup(self, server, num_clients):
            found.append(server)

    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), Watch(), peft_config=LORA)
    trainer.train()
    [server] = found
    frozen = [p for p in server.worker.peft_model.parameters() if not p.requires_grad]
    theirs = {p.data_ptr() for p in trainer.model.parameters() if not p.requires_grad}
    assert len(frozen) > 20 and all(p.data_ptr() in theirs for p in frozen)
    assert not any(p.data_ptr() in theirs for p in server.worker.parameters())


@pytest.mark.parametrize("peft_config", [LORA, IA3Config()])
def test_adapters_are_not_resumed_on_another_base(tmp_path, peft_config):
    def trainer(base):
        args = tiny_args(tmp_path, save_strategy="steps", rounds=2)
        return FederatedTrainer(base, args, tiny_federation(), peft_config=peft_config)

    trainer(tiny_expert()).train()
    trainer(tiny_expert()).train(resume_from_checkpoint=True)
    other = tiny_expert()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[5, 3] += 1e-6
    with pytest.raises(ValueError, match=r"was written with base = .*, this run has .*resume with the settings"):
        trainer(other).train(resume_from_checkpoint=True)


def test_bad_settings(tmp_path):
    data = tiny_federation()

    def refused(message, model, peft_config=None, **changes):
        with pytest.raises(ValueError, match=message):
            FederatedTrainer(model, tiny_args(tmp_path, **changes), data, peft_config=peft_config)

    refused("`lora_fusion` is 'mean': choose one of 'svd', 'ffa', 'factors'", tiny_expert(), lora_fusion="mean")
    refused(r"`client_ranks` is \[0\]: give ranks of at least 1", tiny_expert(), LORA, client_ranks=[0])
    refused(r"`client_ranks` is \[2\], but `lora_fusion` is 'ffa'", None, client_ranks=[2], lora_fusion="ffa")
    refused("only one of them at a time", None, client_ranks=[2], upload_compression="int8")
    refused("`max_update_norm` is 1.0: only one of them at a time", None, client_ranks=[2], max_update_norm=1.0)
    refused("server's adapters have rank 4: build them with `LoraConfig.r=8.`", tiny_expert(), LORA, client_ranks=[8])
    refused("clients train whole models: pass `peft_config", tiny_expert(), client_ranks=[2])
    refused("clients train a whole mixture of adapters", tiny_mixture(peft_config=LORA), lora_fusion="ffa")
    refused("server's adapters have rank None", tiny_expert(), IA3Config(), client_ranks=[2])
    refused("`lora_fusion` is 'ffa', but the adapters are no LoRA", tiny_expert(), IA3Config(), lora_fusion="ffa")
    refused("`model` is a mixture: build it with `from_expert", tiny_mixture(), LORA)
    refused("`peft_config.use_dora` is True", tiny_expert(), LoraConfig(use_dora=True))
    refused(
        r"`peft_config.target_modules` has \['nowhere'\], and the BertForSequenceClassification has no such layers; "
        "among its linear layers are .*'query'",
        tiny_expert(),
        LoraConfig(target_modules=["query", "nowhere"]),
    )
    adapted = fedavg(tmp_path / "run", rounds=1).model
    refused("which has its adapter: leave `peft_config` out", adapted, LORA)
    mixture = tiny_mixture(peft_config=LORA)
    with torch.no_grad():
        next(p for name, p in mixture.experts[1].named_parameters() if ".lora_A." in name).add_(1.0)
    with pytest.raises(ValueError, match="A of the adapter 'routed_0' is another than that of 'main_0'"):
        FedMoETrainer(mixture, tiny_args(tmp_path, lora_fusion="ffa"), train_dataset=data)


def test_a_thousand_clients_of_gpt2_fit_on_a_small_disk():
    with torch.device("meta"):
        base = GPT2ForSequenceClassification(GPT2Config(num_labels=5))
    expert = as_expert(add_adapter(base, LoraConfig(r=8, fan_in_fan_out=True)))
    layout = StateLayout.of(expert, lora_products=True)
    assert layout.num_elements == 12 * 8 * (768 + 3 * 768) + 5 * 768
    # Row, and both moments of Adam when clients keep their optimizer.
    assert 1000 * 3 * layout.size * 4 < 4e9
