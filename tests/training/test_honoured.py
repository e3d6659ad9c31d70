"""Rounds call or read what they honour of `Trainer`, and whatever else a user sets or overrides is refused by name."""

import collections
import inspect
import sys

import pytest
import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import tests.tiny_federation
from hf_fedmoe.strategies import APFL, FedAvg, FedAvgReserved, FedMoE, FedMoEGroups, FedMoESettings, FedProx, PFedMe
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer, FedMoETrainingArguments
from hf_fedmoe.training.honoured import (
    HONOURED_ARGUMENTS,
    HONOURED_HOOKS,
    INIT_REMEDIES,
    check_arguments,
    check_hooks,
    overridden_hooks,
)
from tests.every_method import METHODS
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
)


def names(listed):
    return set(" ".join(listed.values()).split())


ARGUMENTS, HOOKS = names(HONOURED_ARGUMENTS), names(HONOURED_HOOKS)
# What no run of a test calls: the Hub's, and what is for users.
UNCALLED = {*HONOURED_HOOKS["users only"].split(), "init_hf_repo", "push_to_hub", "_get_collator_with_removed_columns"}


def make_trainer(folder, kind=FederatedTrainer, strategy=None, model=tiny_expert, **changes):
    given = {name: changes.pop(name) for name in ("optimizer_cls_and_kwargs", "callbacks") if name in changes}
    args = tiny_args(folder, **{"rounds": 1, "clients_per_round": 1} | changes)
    return kind(model(), args, tiny_federation(client_size=4), strategy=strategy, **given)


# Arguments


@pytest.mark.parametrize("name", TrainingArguments.__dataclass_fields__)
def test_every_argument_is_honoured_or_refused(name, tmp_path):
    """One that a later Transformers adds is refused until it is looked at."""
    args = tiny_args(tmp_path)
    check_arguments(args)
    setattr(args, name, "something else")
    if name in ARGUMENTS - {"hub_strategy"}:
        return check_arguments(args)
    with pytest.raises(ValueError, match=f"`{name}` is 'something else', which rounds do not honour: "):
        check_arguments(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is 5.0, which rounds do not honour: leave it out"),
        ({"data_seed": 3}, "`data_seed` is 3, .*: the order of a client's data follows from `seed`, set that"),
        ({"hub_strategy": "all_checkpoints"}, 'all_checkpoints.*choose "every_save" or "end"'),
        ({"accelerator_config": {"split_batches": True}}, "`accelerator_config` is AcceleratorConfig"),
        ({"include_num_input_tokens_seen": "all"}, "`include_num_input_tokens_seen` is 'all'"),
    ],
)
def test_arguments_that_rounds_would_ignore(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)


def test_arguments_of_the_trainer(tmp_path):
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (FederatedTrainer, Trainer))
    assert set(theirs) - set(ours) == set(INIT_REMEDIES)
    given = (torch.optim.SGD([torch.zeros(1)], lr=1.0), None)
    for kind in (FederatedTrainer, FedMoETrainer):
        model = tiny_expert() if kind is FederatedTrainer else tiny_mixture()
        with pytest.raises(
            ValueError, match=r"`optimizers` is given, .*give `optimizer_cls_and_kwargs=\(torch.optim.SGD"
        ):
            kind(model, tiny_args(tmp_path), train_dataset=tiny_federation(), optimizers=given)
    with pytest.raises(ValueError, match=r"`model_init` is given, .*all clients start from one model: give `model`"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), model_init=tiny_expert)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), tokenizer=None)
    FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), optimizers=(None, None), model_init=None)


def test_what_is_honoured_is_read_and_called(tmp_path, monkeypatch):
    """A run with checkpoints, evaluations and a resume, every hook and every argument of which is watched."""
    called, read = set(), set()

    class Watched(FedMoETrainingArguments):
        def __getattribute__(self, name):
            reader = sys._getframe(1).f_code.co_name
            if reader not in ("to_dict", "check_arguments"):
                read.add(name)
            return super().__getattribute__(name)

    def watch(name):
        method = getattr(FederatedTrainer, name)

        def watched(*args, **kwargs):
            called.add(name)
            return method(*args, **kwargs)

        static = isinstance(inspect.getattr_static(FederatedTrainer, name), staticmethod)
        return staticmethod(watched) if static else watched

    kind = type("Everything", (FederatedTrainer,), {name: watch(name) for name in HOOKS})
    monkeypatch.setattr(tests.tiny_federation, "FedMoETrainingArguments", Watched)
    every = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    run = make_trainer(tmp_path, kind, **every, metric_for_best_model="loss")
    assert set(overridden_hooks(run, FederatedTrainer)) == HOOKS
    run.train()
    run.evaluate(), run.predict(run.eval_dataset), run.save_model(), run.create_model_card()
    run = make_trainer(tmp_path, kind, **every, metric_for_best_model="loss", rounds=2)
    run.train(resume_from_checkpoint=True)
    assert called == HOOKS - UNCALLED
    assert read >= ARGUMENTS


# Hooks


@pytest.mark.parametrize("name", [name for name in dir(Trainer) if not name.startswith("__") and name not in HOOKS])
def test_every_other_hook_is_refused(name, tmp_path, shared):
    shared.__class__ = type("Mine", (FederatedTrainer,), {name: lambda self, *args, **kwargs: None})
    expected = f"`{name}` of Mine is overridden, but rounds do not honour it: "
    if name == "loss_is_scaled_for_ga":
        shared.__class__ = type("Mine", (FederatedTrainer,), {name: False})
        check_hooks(shared, FederatedTrainer)
        shared.__class__ = type("Mine", (FederatedTrainer,), {name: True})
    with pytest.raises(ValueError, match=expected):
        check_hooks(shared, FederatedTrainer)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("shared"))


def test_hooks_of_a_mixin_or_of_the_object_are_found_too(tmp_path):
    class Mixin(Trainer):
        def training_step(self, *args, **kwargs):
            raise AssertionError

    class Mixed(FederatedTrainer, Mixin):
        pass

    with pytest.raises(
        ValueError, match=r"`training_step` of Mixed is overridden, .*override `compute_loss` for another"
    ):
        make_trainer(tmp_path, Mixed).train()
    run = make_trainer(tmp_path)
    run.get_train_dataloader = lambda: None
    with pytest.raises(ValueError, match="`get_train_dataloader` of FederatedTrainer is overridden"):
        run.train()


class Weighted(FederatedTrainer):
    """The class weights of `Trainer`'s own documentation."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        type(self).calls += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([0.1, 0.1, 1.0])
        loss = nn.functional.cross_entropy(outputs.logits.view(-1, self.model.config.num_labels), labels, weight)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_of_ones_own_in_every_method(name, tmp_path):
    """Clients train by it, or the method is refused by name."""
    strategy = METHODS[name].strategy()
    if name == "fedmoe":
        strategy = FedMoE(FedMoESettings(final_expert_epochs=0))
    if name == "fedmoe_groups":
        with pytest.raises(ValueError, match="with `final_expert_epochs` = 5 the server fine-tunes experts"):
            make_trainer(tmp_path, Weighted, strategy, METHODS[name].model).train()
        strategy = FedMoEGroups(final_expert_epochs=0)
    Weighted.calls = 0
    run = make_trainer(tmp_path, Weighted, strategy, METHODS[name].model)
    if name in ("fedavg_adjusted", "fedjets", "fedem", "pfedmm"):
        message = f"`compute_loss` gives the loss, but clients of '{name}' are trained by a loss of that method"
        with pytest.raises(ValueError, match=message):
            run.train()
        return
    run.train()
    assert not run.rounds[0].refused
    assert Weighted.calls > len(run.rounds[0].clients)  # that of the trial


@pytest.mark.parametrize(
    ("of_doubled", "of_faster"),
    [
        (FedAvg, FedAvg),
        (APFL, APFL),
        # Their terms that pull to what was received are not doubled.
        (lambda: FedProx(mu=2.0), lambda: FedProx(mu=1.0)),
        (lambda: PFedMe(penalty=2.0, outer_rate=0.1), lambda: PFedMe(penalty=1.0, outer_rate=0.2)),
        (lambda: FedAvgReserved(learning_rate=0.0), lambda: FedAvgReserved(learning_rate=0.0)),
    ],
    ids=["fedavg", "apfl", "fedprox", "pfedme", "reserved"],
)
def test_a_loss_of_ones_own_is_that_of_training(of_doubled, of_faster, tmp_path):
    """Twice the model's loss is twice the gradient, on clients and on the server; for SGD, twice the rate."""

    class Doubled(FederatedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss

    def run(kind, strategy, rate):
        settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": rate, "clients_per_round": 2}
        trainer = make_trainer(tmp_path / kind.__name__, kind, strategy, **settings)
        trainer.train()
        return trainer

    doubled, faster = run(Doubled, of_doubled(), 0.05), run(FederatedTrainer, of_faster(), 0.1)
    assert_equal_states(state(doubled.model), state(faster.model), atol=1e-6, rtol=1e-5)
    if "reserved_loss" in faster.rounds[0].metrics:
        reports = [trainer.rounds[0].metrics["reserved_loss"] for trainer in (doubled, faster)]
        assert reports[0] == pytest.approx(2 * reports[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "strategy", "message"),
    [
        (
            {"clients_at_once": 2},
            FedAvg,
            "but `clients_at_once` is 2, for which there is the model's own: set it to 1",
        ),
        ({"client_parallelism": "data"}, FedAvg, "but `client_parallelism` is 'data', and a loss of one's own may be"),
        ({}, FedMoE, "but with `final_expert_epochs` = 5 the server fine-tunes experts .*: set it to 0"),
        ({}, lambda: FedMoE(FedMoESettings("paper", expert_epochs=2)), "but with `expert_epochs` = 2"),
    ],
)
def test_who_cannot_train_by_a_loss_of_ones_own(changes, strategy, message, tmp_path):
    model = tiny_expert if strategy is FedAvg else tiny_mixture
    with pytest.raises(ValueError, match=f"`compute_loss` gives the loss, {message}"):
        make_trainer(tmp_path, Weighted, strategy(), model, **changes).train()
    if strategy is FedAvg:
        with pytest.raises(ValueError, match=f"`label_smoothing_factor` gives the loss, {message}"):
            make_trainer(tmp_path, label_smoothing_factor=0.1, **changes).train()


class OwnLoss(FedAvg):
    def loss(self, model, batch, received):
        return model(**batch).loss


def test_a_loss_of_the_trainer_and_one_of_the_strategy(tmp_path):
    with pytest.raises(
        ValueError, match="`compute_loss` gives the loss, but clients of 'fedavg' are trained by a loss of"
    ):
        make_trainer(tmp_path, Weighted, OwnLoss()).train()
    make_trainer(tmp_path, strategy=OwnLoss()).train()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs: None, "The loss of `compute_loss` is None, where a number is wanted"),
        (lambda outputs: outputs.logits.mean(1), r"The loss of `compute_loss` has the shape \(2,\)"),
        (lambda outputs: 1 / 0, r"The loss of `compute_loss` cannot be computed on row 0 of .*ZeroDivisionError"),
    ],
)
def test_losses_of_ones_own_that_fail_are_told_so(loss, message, tmp_path):
    class Failing(FederatedTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return loss(model(**inputs))

    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, Failing).train()


# Optimizers and schedules


def test_optimizers_of_another_model_than_the_clients(tmp_path):
    class OfTheServer(FederatedTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    class WithoutArgument(FederatedTrainer):
        def create_optimizer(self):
            return super().create_optimizer()

    message = r"`create_optimizer\(model\)` of OfTheServer makes one of other parameters .*use `model` there"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, OfTheServer).train()
    with pytest.raises(
        ValueError, match=r"`create_optimizer\(model\)` of WithoutArgument can make no optimizer.*positional"
    ):
        make_trainer(tmp_path, WithoutArgument).train()


def test_schedules_of_another_optimizer_or_of_no_single_round(tmp_path):
    class Stepped(FederatedTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            chosen = self.optimizer if self.args.run_name == "own" else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(chosen, 1)
            return self.lr_scheduler

    run = make_trainer(tmp_path, Stepped)
    run.train()
    assert run.lr_scheduler is None and not run.never_accepted
    with pytest.raises(ValueError, match="it is that of another optimizer than `create_scheduler` gets"):
        make_trainer(tmp_path, Stepped, run_name="own").train()
    with pytest.raises(ValueError, match="`lr_scheduler_scope` is 'run', but a schedule that is no `LambdaLR`"):
        make_trainer(tmp_path, Stepped, lr_scheduler_scope="run").train()
    for changes in ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}):
        kind = FederatedTrainer if changes else Stepped
        with pytest.raises(ValueError, match=r"`clients_at_once` is 2, but `.*` may make what cannot train several"):
            make_trainer(tmp_path, kind, clients_at_once=2, **changes).train()


KWARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1},
}
NEED_METRICS = ("reduce_lr_on_plateau", "greedy")


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_runs_or_is_refused_by_name(kind, shared):
    """As it is, with what it needs, and with what nobody knows."""
    args, shared.__class__ = shared.args, FederatedTrainer
    args.lr_scheduler_type, args.lr_scheduler_scope = SchedulerType(kind), "round"
    refused = (
        f"`lr_scheduler_type` is '{kind}' and `lr_scheduler_kwargs` .*, of which there is no schedule for the 1 local"
    )
    for kwargs in ({}, KWARGS.get(kind, {}), {"unheard_of": 1}):
        args.lr_scheduler_kwargs = kwargs
        runs = kind not in NEED_METRICS and kwargs == KWARGS.get(kind, {})
        if runs or (kwargs and kind in ("constant", "constant_with_warmup")):  # which take no notice of them
            shared._check_schedule()
            continue
        with pytest.raises(ValueError, match=refused) as caught:
            shared._check_schedule()
        missing = {"cosine_with_min_lr": "min_lr", "warmup_stable_decay": "num_decay_steps"}
        if not kwargs and (kind in NEED_METRICS or kind in missing):
            assert missing.get(kind, "metrics") in str(caught.value)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy", "cosine_with_min_lr", "warmup_stable_decay"])
def test_schedules_are_asked_before_the_first_round(kind, tmp_path):
    with pytest.raises(ValueError, match=f"`lr_scheduler_type` is '{kind}'"):
        make_trainer(tmp_path, lr_scheduler_type=kind, eval_strategy="steps", eval_steps=1).train()


IN_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


@pytest.mark.parametrize("kind", [kind.value for kind in OptimizerNames])
def test_every_optimizer_is_made_or_refused_by_name(kind, shared):
    shared.__class__ = FederatedTrainer
    shared.args.optim, shared.args.optim_args, shared.args.optim_target_modules = OptimizerNames(kind), None, None
    if kind in IN_TORCH:
        assert shared._make_optimizer(tiny_expert())
        return
    with pytest.raises(ValueError, match=f"`optim` is '{kind}', but .* can make no optimizer. It says: "):
        shared._make_optimizer(tiny_expert())


def test_arguments_of_optimizers_that_make_no_difference(tmp_path):
    make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.9").train()
    for changes in ({"optim_args": "momentum=0.9"}, {"optim_target_modules": "all-linear"}):
        (name,) = changes
        with pytest.raises(ValueError, match=f"`{name}` is '.*', of which the optimizer 'adamw_torch' takes nothing"):
            make_trainer(tmp_path, optim="adamw_torch", **changes).train()
    with pytest.raises(ValueError, match="`optim_args` is 'momentum': write name=value"):
        make_trainer(tmp_path, optim="sgd", optim_args="momentum").train()


def test_optimizers_that_take_no_step(tmp_path):
    class Closed(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("call `train` first")

    message = (
        r"`optim` is .*, whose optimizer clients cannot take a step with. It says: RuntimeError: call `train` first"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, optimizer_cls_and_kwargs=(Closed, {"lr": 0.1})).train()


# Callbacks, and who was never accepted


def test_callbacks_that_wait_for_what_no_round_has(tmp_path, caplog, monkeypatch):
    told = collections.Counter()
    monkeypatch.setattr("hf_fedmoe.training.honoured.logger.warning", lambda message: told.update([message]))

    class EveryStep(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            raise AssertionError

    make_trainer(tmp_path, callbacks=[EveryStep()]).train()
    assert told == {"`on_optimizer_step` of EveryStep is never called: a step of the trainer is a round.": 1}


def test_clients_that_were_never_accepted_are_told_at_the_end(tmp_path, monkeypatch):
    class Failing(FedAvg):
        def train_client(self, local, task):
            if task.client == 2 or (task.client == 3 and task.round_index == 0):
                raise OSError(f"battery empty in round {task.round_index}")
            return super().train_client(local, task)

    told = []
    monkeypatch.setattr("hf_fedmoe.training.client_training.logger.warning", told.append)
    run = make_trainer(tmp_path, strategy=Failing(), rounds=2, clients_per_round=4)
    run.train()
    assert [list(report.refused) for report in run.rounds] == [[2, 3], [2]]
    assert run.never_accepted == {2: "OSError: battery empty in round 1"}
    assert told == ["Took part in rounds 1 to 2 and never accepted: client 2: OSError: battery empty in round 1."]
