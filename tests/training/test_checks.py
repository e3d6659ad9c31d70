"""Bad input is refused before any training, in words that name the field, the value and the remedy."""

import importlib.util
from dataclasses import dataclass

import datasets
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.strategies import FedAvg, FedMix, FedMoE, FedRep
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments, FedMoETrainer, FedMoETrainingArguments
from hf_fedmoe.training.deepspeed_config import engine_config
from tests.tiny_federation import (
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_gated_experts,
    tiny_mixture,
    tiny_pfedmoe,
    tiny_rows,
)
from tests.tiny_images import tiny_image_federation, tiny_processor, tiny_resnet
from tests.tiny_models import tiny_bert


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "`rounds` is 0: give at least 1"),
        ({"rounds": 1.5}, "`rounds` is 1.5: give a whole number"),
        ({"clients_per_round": None}, "`clients_per_round` is None: give a whole number"),
        ({"per_device_train_batch_size": 1.5}, "`per_device_train_batch_size` is 1.5: give a whole number"),
        ({"learning_rate": "1e-3"}, "`learning_rate` is '1e-3': give a number"),
        ({"max_grad_norm": float("nan")}, "`max_grad_norm` is nan: give a number"),
        ({"download_epochs": 1.5}, "`download_epochs` is 1.5: give a whole number"),
        ({"keep_client_optimizer": "no"}, "`keep_client_optimizer` is 'no', a text: give True or False"),
        ({"adam_epsilon": 0.0}, "`adam_epsilon` is 0.0: give more than 0"),
        ({"seed": None}, "`seed` is None: give a whole number"),
        ({"seed": -1}, "`seed` is -1: give a whole number from 0 to 4294967295"),
        ({"clients_per_round": 0}, "`clients_per_round` is 0"),
        ({"max_steps": 5}, "`max_steps` is 5.*set `rounds`"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0"),
        ({"lr_scheduler_scope": "epoch"}, '`lr_scheduler_scope` is \'epoch\': choose "round" or "run"'),
        ({"client_parallelism": "rows"}, '`client_parallelism` is \'rows\': choose "clients", "sums" or "data"'),
        ({"preset": "best"}, "`preset` is 'best': choose one of 'default', 'paper'"),
        ({"correlation": "max"}, "`correlation` is 'max': choose one of 'relevance'"),
        ({"synchronisation": "never"}, "`synchronisation` is 'never': choose one of 'download_main'"),
        ({"fusion_rate": 0.0}, "`fusion_rate` is 0.0: a moving average needs 0 < rate <= 1"),
        ({"main_fusion_rate": 1.5}, "`main_fusion_rate` is 1.5"),
        ({"server_iterations": 0}, "`server_iterations` is 0"),
        ({"download_epochs": -1}, "`download_epochs` is -1: give 0 or more"),
        (
            {"download_epochs": 1, "preset": "paper"},
            "`download_epochs` is 1, but with.*'after_round'",
        ),
        ({"entropy_weight": -1.0}, "`entropy_weight` is -1.0: give 0 or more"),
        ({"gate_learning_rate": 0.0}, "`gate_learning_rate` is 0.0: give more than 0"),
    ],
)
def test_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_args(tmp_path, **changes)


def test_paper_preset_is_the_papers_letter_and_single_settings_override_it(tmp_path):
    args = FedMoETrainingArguments(output_dir=str(tmp_path), preset="paper", fusion_rate=0.4)
    assert (args.correlation, args.synchronisation, args.main_fusion_rate) == ("sum", "after_round", 0.1)
    assert args.fusion_rate == 0.4 and args.balance_weight == 0.0 and args.gate_epochs == 1


def test_more_clients_per_round_than_clients(tmp_path):
    with pytest.raises(ValueError, match="`clients_per_round` is 9, but there are 4 clients: lower it"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path, clients_per_round=9), tiny_federation())


@pytest.mark.parametrize("names", [[], ["stars"]])
def test_labels_by_another_name_than_batches_have(tmp_path, names):
    with pytest.raises(ValueError, match=r"`label_names` is \[.*but batches have their classes as 'labels', whatever"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path, label_names=names), tiny_federation())


def test_a_best_metric_that_no_evaluation_has(tmp_path):
    settings = {"eval_strategy": "steps", "save_strategy": "best", "metric_for_best_model": "acuracy", "rounds": 1}

    def run(metric, **parts):
        args = tiny_args(tmp_path, **settings | {"metric_for_best_model": metric})
        return FederatedTrainer(tiny_expert(), args, tiny_federation(), **parts)

    rows = tiny_rows(6)
    with pytest.raises(ValueError, match=r"`metric_for_best_model` is 'acuracy': an evaluation has loss, .*accuracy"):
        run("acuracy", eval_dataset=rows).train()
    with pytest.raises(ValueError, match=r"is 'accuracy': an evaluation has a_loss, .*b_accuracy"):
        run("accuracy", eval_dataset={"a": rows, "b": rows}).train()
    with pytest.raises(ValueError, match=r"`metric_for_best_model` is 'accuracy': an evaluation has loss, .* mine"):
        run("accuracy", eval_dataset=rows, compute_metrics=lambda prediction: {"mine": 1.0}).train()
    trainer = run("eval_macro_f1", eval_dataset=rows)
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_macro_f1"])


def test_fed_moe_without_reserved_set(tmp_path):
    rows = tiny_rows(20)
    with pytest.raises(ValueError, match=r"`train_dataset.reserved` is None.*reserved_size=500"):
        FedMoETrainer(
            tiny_mixture(), tiny_args(tmp_path, clients_per_round=1), train_dataset=FederatedDataset(rows, [range(20)])
        )


def test_fed_moe_of_a_model_that_is_no_mixture(tmp_path):
    with pytest.raises(ValueError, match=r"`model` is a BertForSequenceClassification: build one .*from_expert"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), strategy=FedMoE())


def test_sums_of_uploads_that_do_not_suffice(tmp_path):
    args = tiny_args(tmp_path, client_parallelism="sums", preset="paper")
    with pytest.raises(ValueError, match=r"is 'sums', but 'fedmoe' does more with uploads than add them up: choose"):
        FedMoETrainer(tiny_mixture(), args, train_dataset=tiny_federation())
    with pytest.raises(ValueError, match=r"'sums' and `lora_fusion` is 'svd', which needs all uploads at once"):
        FederatedTrainer(tiny_expert(), args, tiny_federation(), peft_config=LoraConfig(r=2))


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (tiny_expert, tiny_pfedmoe, r"but clients of 'pfedmoe' have other architectures.*choose \"clients\""),
        (
            lambda: tiny_gated_experts(balance_weight=0.1),
            FedMix,
            "the `balance_weight` 0.1 of .*set it to 0",
        ),
    ],
)
def test_clients_whose_batches_cannot_be_shared(tmp_path, model, strategy, message):
    args = tiny_args(tmp_path, client_parallelism="data")
    with pytest.raises(ValueError, match=message):
        FederatedTrainer(model(), args, tiny_federation(), strategy())


def test_batches_of_a_model_with_batchnorm_cannot_be_shared(tmp_path):
    args, data = tiny_args(tmp_path, client_parallelism="data"), tiny_image_federation()
    with pytest.raises(ValueError, match=r"'data', but `resnet.*running_mean` of the model is a statistic of whole"):
        FederatedTrainer(tiny_resnet(), args, data, processing_class=tiny_processor())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "`zero_optimization.stage` is 0: choose 1, 2 or 3"),
        ({}, "`zero_optimization.stage` is 0"),
        ({"optimizer": {"type": "AdamW"}}, "has `optimizer`, but each client has a fresh one"),
        ({"scheduler": {"type": "WarmupLR"}}, "has `scheduler`"),
        ({"train_micro_batch_size_per_gpu": 4}, '`train_micro_batch_size_per_gpu` is 4.*set it to "auto"'),
        ({"gradient_clipping": 0.5}, "`gradient_clipping` is 0.5, in the training arguments it is 1.0"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` is 2, .* it is 1"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "take `bf16`"),
    ],
)
def test_configurations_of_deepspeed_that_rounds_do_not_honour(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        engine_config(config, tiny_args(tmp_path), "no")
    with pytest.raises(ValueError, match="`fp16` would carry its loss scale"):
        engine_config({"zero_optimization": {"stage": 1}}, tiny_args(tmp_path), "fp16")


def test_configuration_of_deepspeeds_engine(tmp_path):
    config = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    found = engine_config(config, tiny_args(tmp_path, gradient_accumulation_steps=2), "bf16")
    assert found["zero_optimization"] == {"stage": 3, "overlap_comm": True} and "train_batch_size" not in found
    assert (found["gradient_clipping"], found["gradient_accumulation_steps"]) == (1.0, 2)
    assert found["bf16"] == {"enabled": True}


@pytest.fixture
def with_deepspeed(monkeypatch):
    """As if it were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name if name == "deepspeed" else find(name, *rest)
    )


class OwnLoss(FedAvg):
    def loss(self, model, batch, received):
        return model(**batch).loss


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        (FedRep, {}, "those of 'fedrep' do more than train one model by its own loss: leave DeepSpeed out"),
        (OwnLoss, {}, "those of 'fedavg' do more than"),
        (FedAvg, {"keep_client_optimizer": True}, "`keep_client_optimizer` is True"),
        (FedAvg, {"torch_compile": True}, "`torch_compile` is True"),
    ],
)
def test_clients_that_deepspeed_cannot_train(tmp_path, with_deepspeed, strategy, changes, message):
    args = tiny_args(tmp_path, deepspeed={"zero_optimization": {"stage": 2}}, **changes)
    assert args.client_parallelism == "data"
    with pytest.raises(ValueError, match=message):
        FederatedTrainer(tiny_expert(), args, tiny_federation(), strategy())


def test_models_under_deepspeed(tmp_path, with_deepspeed):
    args = tiny_args(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})
    for base in (tiny_expert(), tiny_expert().bfloat16()):
        run = FederatedTrainer(base, args, tiny_federation(), peft_config=LoraConfig(r=2))
        assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    with pytest.raises(ValueError, match="those of 'fedmix' train a whole mixture, which was never tried: leave"):
        FederatedTrainer(tiny_gated_experts(), args, tiny_federation(), FedMix())


def test_deepspeed_is_asked_for_by_an_argument_or_by_the_launcher(tmp_path, monkeypatch):
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else installed(name))
    with pytest.raises(ImportError, match=r"not installed: `pip install hf_fedmoe\[deepspeed\]`"):
        tiny_args(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ImportError, match="not installed"):
        tiny_args(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"is 'clients', but DeepSpeed shares each client out .*choose \"data\""):
        tiny_args(tmp_path, client_parallelism="clients", deepspeed='{"zero_optimization": {"stage": 2}}')
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    args = tiny_args(tmp_path, deepspeed=str(tmp_path / "zero.json"))
    assert args.deepspeed == {"zero_optimization": {"stage": 2}} and args.distributed_state.num_processes == 1


def test_processes_that_know_nothing_of_each_other(tmp_path, monkeypatch):
    args = tiny_args(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched, but none knows .* `use_cpu=True`"):
        FederatedTrainer(tiny_expert(), args, tiny_federation())


def test_dataset_that_is_not_federated(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` is a Dataset: a federated run needs its clients"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_rows(8))


def test_model_with_too_few_labels(tmp_path):
    with pytest.raises(ValueError, match=r"The data has 3 labels, the model 2 .*`num_labels=3`"):
        FederatedTrainer(tiny_bert(2), tiny_args(tmp_path), tiny_federation())


def test_tokenizer_without_pad_token(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), eos_token="a")
    with pytest.raises(ValueError, match=r"no pad token.*`tokenizer.pad_token = tokenizer.eos_token`"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), processing_class=tokenizer)


def test_decoder_expert_without_pad_token_id(tmp_path):
    model = GPT2ForSequenceClassification(
        GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=40, num_labels=3, bos_token_id=39, eos_token_id=39)
    )
    with pytest.raises(ValueError, match=r"`pad_token_id`.*None"):
        FederatedTrainer(model, tiny_args(tmp_path), tiny_federation())


def test_labels_out_of_range_and_overlap_and_empty_client_are_refused_by_the_dataset():
    rows = tiny_rows(12)
    with pytest.raises(ValueError, match=r"label.*2"):
        FederatedDataset(rows.cast_column("label", datasets.Value("int64")), [range(12)], num_labels=2)
    with pytest.raises(ValueError, match=r"client 0.*reserved|reserved.*client 0"):
        FederatedDataset(rows, [range(8)], reserved=range(6, 12))
    with pytest.raises(ValueError, match="client 1"):
        FederatedDataset(rows, [range(8), []])


def test_reserved_set_without_a_class_warns():
    rows = tiny_rows(40)
    only = [i for i, label in enumerate(rows["label"]) if label == 0]
    rest = [i for i, label in enumerate(rows["label"]) if label != 0]
    with pytest.warns(UserWarning, match="reserved"):
        FederatedDataset(rows, [rest], reserved=only)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, r"written with learning_rate = 0.01, this run has 0.001: resume with the settings"),
        ({"clients_per_round": 3}, r"clients_per_round = 2, this run has 3"),
        ({"fusion_rate": 0.5}, r"strategy_settings"),
    ],
)
def test_checkpoint_of_another_configuration(tmp_path, change, message):
    FedMoETrainer(
        tiny_mixture(), tiny_args(tmp_path, rounds=1, save_strategy="steps"), train_dataset=tiny_federation()
    ).train()
    other = FedMoETrainer(tiny_mixture(), tiny_args(tmp_path, rounds=2, **change), train_dataset=tiny_federation())
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)


def test_checkpoint_of_other_data_or_another_mixture(tmp_path):
    FedMoETrainer(
        tiny_mixture(), tiny_args(tmp_path, rounds=1, save_strategy="steps"), train_dataset=tiny_federation()
    ).train()
    other = FedMoETrainer(tiny_mixture(), tiny_args(tmp_path), train_dataset=tiny_federation(seed=5))
    with pytest.raises(ValueError, match="written with data = "):
        other.train(resume_from_checkpoint=True)
    other = FedMoETrainer(tiny_mixture(num_routed_experts=3), tiny_args(tmp_path), train_dataset=tiny_federation())
    with pytest.raises(ValueError, match="server_models = 3, this run has 4"):
        other.train(resume_from_checkpoint=True)


def test_resuming_from_nothing(tmp_path):
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation())
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"has no federation.json: it is not a checkpoint of a federated run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "model"))


def test_a_new_run_does_not_replace_the_checkpoints_of_an_earlier_one(tmp_path):
    def trainer(**changes):
        args = tiny_args(tmp_path, rounds=1, **changes)
        return FederatedTrainer(tiny_expert(), args, tiny_federation())

    trainer(save_strategy="steps").train()
    with pytest.raises(ValueError, match=r"`output_dir` .* holds the checkpoints of an earlier run"):
        trainer(save_strategy="steps").train()
    trainer(save_strategy="no").train()  # writes nothing, replaces nothing
    assert (tmp_path / "checkpoint-1" / "federation.json").is_file()


@dataclass
class OfOnesOwn(FedAvg):
    """One whose author has not looked at its setting."""

    mu: float = 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": FedAvg}, r"`strategy` is the class FedAvg: give an instance, `FedAvg\(\)`"),
        ({"strategy": "fedavg"}, "`strategy` is 'fedavg', a str: give an instance"),
        ({"strategy": OfOnesOwn(mu=float("nan"))}, "`mu` is nan: give a number"),
        ({"model": "gpt2"}, "`model` is a str: load a classifier"),
        ({"model": None}, "`model` is a NoneType: load a classifier"),
        ({"model": torch.nn.Linear(2, 2)}, "`model` is a Linear: load a classifier"),
        ({"processing_class": "gpt2"}, "`processing_class` is 'gpt2': load it, `AutoTokenizer.from_pretrained"),
        ({"args": "runs"}, "`args` is a str: a federated run takes its settings from `FederatedTrainingArguments`"),
    ],
)
def test_parts_of_another_kind(tmp_path, changes, message):
    parts = {"model": tiny_expert(), "args": tiny_args(tmp_path), "train_dataset": tiny_federation()}
    with pytest.raises(ValueError, match=message):
        FederatedTrainer(**(parts | {"strategy": FedAvg()} | changes))


def test_parts_of_another_kind_for_fedmoe(tmp_path):
    args, data = tiny_args(tmp_path), tiny_federation()
    with pytest.raises(ValueError, match="`args` is a TrainingArguments"):
        FedMoETrainer(tiny_mixture(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=data)
    with pytest.raises(ValueError, match="which has no settings of Fed-MoE: make it a `FedMoETrainingArguments`"):
        FedMoETrainer(tiny_mixture(), FederatedTrainingArguments(str(tmp_path), use_cpu=True), train_dataset=data)
    with pytest.raises(TypeError, match="fusion_rate"):
        FederatedTrainingArguments(str(tmp_path), use_cpu=True, fusion_rate=0.4)
    with pytest.raises(ValueError, match="a `FedMoETrainer` trains by Fed-MoE: leave it out"):
        FedMoETrainer(tiny_mixture(), args, train_dataset=data, strategy=FedAvg())


def test_models_for_something_else_than_one_class_of_a_row(tmp_path):
    args, data, model = tiny_args(tmp_path), tiny_federation(), tiny_expert()
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel, which gives no row one class"):
        FederatedTrainer(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=8)), args, data)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="`problem_type` 'multi_label_classification', but a row"):
        FederatedTrainer(model, args, data)


def test_models_without_weights_that_can_be_trained(tmp_path):
    args, data = tiny_args(tmp_path), tiny_federation()
    compiled = torch.compile(tiny_expert())
    with pytest.raises(ValueError, match=r"`model` is what `torch.compile` returned: give the model itself"):
        FederatedTrainer(compiled, args, data)
    with torch.device("meta"):
        empty = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=8))
    with pytest.raises(ValueError, match="`model` has no weights, it is on the device 'meta'"):
        FederatedTrainer(empty, args, data)
    with pytest.raises(ValueError, match=r"`main\[0\]` has no weights, it is on the device 'meta'"):
        FedMoEForSequenceClassification.from_expert(empty, num_routed_experts=2)
    quantised = tiny_expert()
    quantised.score = torch.ao.nn.quantized.Linear(4, 3)
    with pytest.raises(ValueError, match=r"`model` holds at `score.*where there should be weights, as quantised"):
        FederatedTrainer(quantised, args, data)


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "dangling", "x" * 300):
        args = tiny_args(tmp_path / name)
        with pytest.raises(ValueError, match=r"`output_dir` is '.*', where no folder can be made: .*\. Choose"):
            FederatedTrainer(tiny_expert(), args, tiny_federation())
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path / "run"), tiny_federation())
    with pytest.raises(ValueError, match="where no folder can be made: File exists"):
        trainer.save_model(tmp_path / "file")


def test_no_memory_is_pinned_for_a_cpu(tmp_path):
    assert not FederatedTrainingArguments(str(tmp_path), use_cpu=True).dataloader_pin_memory
    args = FederatedTrainingArguments(str(tmp_path), dataloader_pin_memory=True)
    assert args.dataloader_pin_memory == (args.device.type != "cpu")
