"""Owners of text who train experts of one base in rounds."""

import shutil

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_fedmoe import FederatedTexts, FederatedTrainer, FedMoEForCausalLM, Owners, text_statistics, token_rows
from hf_fedmoe.strategies import FedAvg
from hf_fedmoe.training import FederatedTrainingArguments, FedMoETrainer
from tests.tiny_decoders import tiny_decoder
from tests.tiny_federation import assert_equal_states, state, tiny_expert, tiny_federation
from tests.tiny_owners import text_of
from tests.tiny_tokenizer import tiny_tokenizer


CLIENTS = ("north", "south", "press")
OWNERS = [{"name": "courts", "members": ["north", "south"]}, {"name": "press"}]
LENGTH = 16


def rows_of(name: str, words: int = 400) -> datasets.Dataset:
    return token_rows(datasets.Dataset.from_dict({"text": [text_of(name, words)]}), tiny_tokenizer(), LENGTH)


def texts() -> FederatedTexts:
    # Of different sizes.
    return FederatedTexts.from_clients({name: rows_of(name, 200 + 100 * k) for k, name in enumerate(CLIENTS)})


def mixture(family: str = "gpt2", owners=OWNERS) -> FedMoEForCausalLM:
    torch.manual_seed(5)
    model = FedMoEForCausalLM.from_base(tiny_decoder(family), owners=owners, lora_rank=4, lora_alpha=8)
    public = rows_of("public")["input_ids"]
    model.set_statistics("base", text_statistics(model.get_input_embeddings(), public))
    return model


def arguments(folder, **changes) -> FederatedTrainingArguments:
    fields = {"rounds": 2, "clients_per_round": 3, "learning_rate": 0.05, "per_device_train_batch_size": 8}
    fields |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "seed": 3}
    return FederatedTrainingArguments(output_dir=str(folder), **fields | changes)


def trainer(folder, model=None, strategy=None, data=None, **changes) -> FederatedTrainer:
    model, data = model or mixture(), data or texts()
    return FederatedTrainer(model, arguments(folder, **changes), data, strategy or Owners.by_name(model, data))


def losses(model: FedMoEForCausalLM, name: str, **how) -> float:
    ids = torch.tensor(rows_of(name, 500)["input_ids"])
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids, **how).loss.item()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_experts_learn_their_own_text_and_the_router_knows_it(family, tmp_path):
    run = trainer(tmp_path, mixture(family))
    run.train()
    model = run.model
    assert not run.rounds[0].refused
    assert model.config.router_names == ["base", "courts", "press"]
    for client, owner, other in (("north", "courts", "press"), ("press", "press", "courts")):
        own = losses(model, client, expert=owner)
        assert own < losses(model, client, expert=other) and own < losses(model, client, expert="base")
        ids = torch.tensor(rows_of(client)["input_ids"])
        weights = model.route(ids)[:, -1].mean(0)
        assert weights.argmax() == model.config.expert_index(owner)
    assert run.rounds[0].metrics == {"owner_0_clients": 2.0, "owner_1_clients": 1.0}


def test_sums_are_those_of_the_owners_texts(tmp_path):
    run = trainer(tmp_path, rounds=1)
    run.train()
    embed = run.model.get_input_embeddings()
    grams = {name: text_statistics(embed, texts().client(name)["input_ids"]) for name in CLIENTS}
    courts = grams["north"] + grams["south"]
    torch.testing.assert_close(run.model.statistics_of("courts").gram_DD, courts.gram_DD)
    assert torch.equal(run.model.statistics_of("press").gram_DD, grams["press"].gram_DD)


def test_statistics_travel_once(tmp_path):
    run = trainer(tmp_path, rounds=2)
    run.train()
    D = 33
    first, second = run.rounds
    assert first.bytes_up - second.bytes_up == 3 * D * D * 8
    assert first.bytes_down - second.bytes_down == 3 * 4


def test_one_owner_alone_is_federated_averaging_of_its_clients(tmp_path):
    """At one owner the mean of adapters is that of FedAvg, from the same start."""
    model, data = mixture(owners=["all"]), texts()
    alone = trainer(tmp_path / "owners", model, Owners([0, 0, 0]), data)
    start = mixture(owners=["all"])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=start.target_names, fan_in_fan_out=True)
    peft_model = get_peft_model(tiny_decoder("gpt2"), config)
    tensors = dict(peft_model.named_parameters())
    for layer, module in start.expert_layers().items():
        tensors[f"base_model.model.{layer}.lora_A.default.weight"].data.copy_(module.owners.lora_A)
    average = FederatedTrainer(peft_model, arguments(tmp_path / "fedavg"), data, FedAvg())
    alone.train()
    average.train()
    for layer, module in alone.model.expert_layers().items():
        for matrix, found in (("A", module.owners.lora_A), ("B", module.owners.lora_B.T)):
            theirs = tensors[f"base_model.model.{layer}.lora_{matrix}.default.weight"]
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def test_an_owner_who_does_not_take_part_keeps_its_expert(tmp_path):
    """Draws clients 0 and 1 each round, never the press."""

    class Courts(Owners):
        needs, compressible, keeps_optimizer = "fusion", True, True

        def participants(self, server, drawn, round_index):
            return [0, 1]

    model = mixture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(tmp_path, model, Courts([0, 0, 1]), rounds=1).train()
    for name, tensor in model.state_dict().items():
        if "owners" in name.split("."):
            assert torch.equal(tensor[4:], before[name][4:]) and not torch.equal(tensor[:4], before[name][:4])
    assert model.config.router_names == ["base", "courts"]
    assert model.route(torch.arange(3, 19)[None])[..., 2].max() == 0


def test_the_base_is_never_changed(tmp_path):
    model = mixture()
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items() if "owners" not in name}
    trainer(tmp_path, model).train()
    after = model.base.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("changes", [{}, {"keep_client_optimizer": True, "upload_compression": "int8"}])
def test_a_resumed_run_ends_with_the_same_bits(changes, tmp_path):
    class Copy(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 1:
                shutil.copytree(args.output_dir, tmp_path / "resumed")

    changes = {"rounds": 3, "clients_per_round": 2, "save_strategy": "epoch"} | changes
    whole = trainer(tmp_path / "whole", **changes)
    whole.add_callback(Copy())
    whole.train()
    resumed = trainer(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))
    assert resumed.model.config.router_names == whole.model.config.router_names


def test_what_is_saved_is_a_mixture_that_writes(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    run.create_model_card(folder=tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "`owners`" in card and "courts" in card and "CausalLM" in card
    loaded = FedMoEForCausalLM.from_pretrained(tmp_path / "saved")
    assert_equal_states(state(loaded), state(run.model))
    ids = torch.arange(3, 11)[None]
    written = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, run.model.eval().generate(ids, max_new_tokens=4, do_sample=False))


def test_evaluation_is_by_domain(tmp_path):
    model, data = mixture(), texts()
    domains = {name: rows_of(name, 500) for name in CLIENTS}
    run = FederatedTrainer(model, arguments(tmp_path), data, Owners.by_name(model, data), eval_dataset=domains)
    run.train()
    metrics = run.evaluate()
    for name in CLIENTS:
        assert metrics[f"eval_{name}_loss"] == pytest.approx(losses(model, name), rel=1e-5)


def test_of_completions_of_any_length_the_answers_are_learned(tmp_path):
    """Batches are padded; what is padding or prompt does not count."""
    rows = [{"prompt": " ".join(["w3"] * k), "completion": " ".join(["w9"] * (k % 3 + 1))} for k in range(1, 13)]
    answers = token_rows(datasets.Dataset.from_list(rows), tiny_tokenizer(), LENGTH)
    data = FederatedTexts.from_clients({"north": answers, "south": answers, "press": rows_of("press")})
    model = mixture()
    run = FederatedTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=12),
        data,
        Owners.by_name(model, data),
        eval_dataset=answers,
        processing_class=tiny_tokenizer(),
    )
    run.train()
    assert not run.rounds[0].refused
    total = count = 0
    for row in answers:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=labels).loss.item()
        counted = (labels[:, 1:] != -100).sum().item()
        total, count = total + loss * counted, count + counted
    assert run.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_personal_models_are_the_owners_experts(tmp_path):
    run = trainer(tmp_path)
    run.train()
    ids = torch.tensor(rows_of("press")["input_ids"])
    with torch.no_grad():
        own = run.personalize("press")(input_ids=ids).logits
        torch.testing.assert_close(own, run.model.eval()(input_ids=ids, expert="press").logits, rtol=1e-4, atol=1e-5)


def test_a_client_whose_statistics_no_text_has_is_refused(tmp_path):
    class Hostile(Owners):
        needs, compressible, keeps_optimizer = "fusion", True, True

        def train_client(self, local, task):
            payload, retained = super().train_client(local, task)
            if task.client == 2 and payload.tensors:
                gram = payload.tensors["gram_DD"] * 1e6
                gram[-1, -1] = 100.0
                payload.tensors["gram_DD"] = gram
            return payload, retained

    model = mixture()
    run = trainer(tmp_path, model, Hostile([0, 0, 1]), rounds=1)
    run.train()
    assert "no embedding of the base has more" in run.rounds[0].refused[2]
    assert model.config.router_names == ["base", "courts"]


def test_what_does_not_fit_is_refused_before(tmp_path):
    with pytest.raises(ValueError, match=r"The client 'south' belongs to \[\]: name it as one owner"):
        Owners.by_name(mixture(owners=["north", "press"]), texts())
    run = trainer(tmp_path, strategy=Owners([0, 0, 0]))
    with pytest.raises(ValueError, match="`owner_of` is \\[0, 0, 0\\], for 3 clients and 2 owners"):
        run.train()
    with pytest.raises(ValueError, match="`model` is a BertForSequenceClassification, and the rows of a"):
        FederatedTrainer(tiny_expert(), arguments(tmp_path), texts())
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel, which gives no row one class"):
        FederatedTrainer(tiny_decoder("gpt2"), arguments(tmp_path), tiny_federation())
    with pytest.raises(ValueError, match=r"take a `FederatedTrainer\(model, args, data, strategy=Owners"):
        FedMoETrainer(mixture(), arguments(tmp_path), train_dataset=texts())
    with pytest.raises(ValueError, match=r"`owners` is \[\]"):
        FederatedTrainer(mixture(owners=()), arguments(tmp_path), texts(), Owners())
