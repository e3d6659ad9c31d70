"""A strategy that breaks a promise, an upload that cannot be, a server that is not sound: each is told by name."""

import dataclasses
from pathlib import Path

import pytest
import torch

from hf_fedmoe.federation import BrokenPromiseError, EachItsOwn, check_start
from hf_fedmoe.strategies import FedAvg, FedAvgReserved, FedMoE, FedProx, Strategy
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.weights import Payload
from tests.tiny_federation import state, tiny_args, tiny_expert, tiny_federation, tiny_mixture
from tests.tiny_images import tiny_image_federation, tiny_processor, tiny_resnet


def trainer(folder, strategy, model=None, **changes) -> FederatedTrainer:
    args = tiny_args(folder, **{"rounds": 1, "clients_per_round": 4, "num_train_epochs": 0.3} | changes)
    return FederatedTrainer(model or tiny_expert(), args, tiny_federation(), strategy)


def overriding(base=FedAvg, /, **members) -> Strategy:
    """A strategy of a class of its own."""
    return type("Own", (base,), members)()


def after_training(change):
    """A `train_client` that changes what is sent and what stays."""

    def train_client(self, local, task):
        payload, kept = FedAvg().train_client(local, task)
        return change(task, payload, kept) or (payload, kept)

    return train_client


def setting(name, value):
    return after_training(lambda task, payload, kept: setattr(payload, name, value))


# What a strategy does that it must not


def half_a_row(self, local, task):
    views = local.layout.views(task.received_P)
    for name, view in local.layout.views(task.out_P).items():
        if not name.startswith("classifier"):
            view.copy_(views[name])
    return Payload(task.out_P, {}, 1, {"loss": 1.0}), {}


def probes(*shapes):
    """Lists the faults of one upload after another."""
    left = [torch.zeros(shape) for shape in shapes]
    return lambda self, server, row_P, reserved: left.pop(0)


PROMISES = {
    "no row": (
        dict(train_client=lambda self, local, task: (Payload(task.out_P, {}, 1, {"loss": 1.0}), {})),
        r"client 0 leaves `bert.embeddings.word_embeddings.weight` and 40 more of `task.out_P` unwritten",
    ),
    "half a row": (dict(train_client=half_a_row), "leaves `classifier.weight` and 1 more of `task.out_P` unwritten"),
    "another row": (
        dict(train_client=after_training(lambda t, p, k: setattr(p, "row_P", p.row_P.clone()))),
        "sends another row than `task.out_P`",
    ),
    "the bank": (
        dict(train_client=after_training(lambda t, p, k: setattr(p, "row_P", t.received_P))),
        "sends another row than `task.out_P`",
    ),
    "no pair": (dict(train_client=lambda self, local, task: None), "returns a NoneType, where a `Payload` and what"),
    "examples nan": (dict(train_client=setting("num_examples", float("nan"))), "reports num_examples = nan, where"),
    "examples in part": (dict(train_client=setting("num_examples", 2.5)), "reports num_examples = 2.5"),
    "no loss": (dict(train_client=setting("metrics", {"steps": 2})), r"reports the metrics \['steps'\], without a"),
    "loss as a tensor": (
        dict(train_client=setting("metrics", {"loss": torch.tensor(1.0)})),
        "gives 'loss' as metrics a Tensor, where a number is due",
    ),
    "a view stays": (
        dict(train_client=after_training(lambda t, p, k: (p, {"mine": p.row_P[:4]}))),
        "leaves `mine` with the client, a view of a row that is used again: clone it",
    ),
    "a number stays": (dict(train_client=after_training(lambda t, p, k: (p, {"mine": 3}))), "else with the client"),
    "a taken name stays": (
        dict(train_client=after_training(lambda t, p, k: (p, {"optimizer.0.x": torch.ones(1)}))),
        "leaves `optimizer.0.x` with the client, a name that belongs to the federation",
    ),
    "twice": (dict(participants=lambda self, server, drawn, r: [1, 1]), r"`participants` gives \[1, 1\], where some"),
    "unknown": (dict(participants=lambda self, server, drawn, r: [0, 4]), r"gives \[0, 4\].* the clients 0 to 3,"),
    "nobody": (dict(participants=lambda self, server, drawn, r: []), r"`participants` gives \[\]"),
    "shared": (dict(shared=lambda self, server, r: {"head.weight"}), "`shared` names `head.weight`, which is no"),
    "download's shape": (
        dict(download=lambda self, server, client, kept_P: server.bank_SP),
        r"`download` gives client 0 \(1, \d+\) of torch.float32, where a row \(\d+,\) of torch.float32 is due",
    ),
    "download's type": (dict(download=lambda self, server, client, kept_P: server.bank_SP[0].double()), "float64, wh"),
    "download not finite": (
        dict(download=lambda self, server, client, kept_P: server.bank_SP[0] * float("inf")),
        "`download` gives client 0 a row that is not finite",
    ),
    "download beside the model": (
        dict(download_tensors=lambda self, server, client: {"c": 1.0}),
        r"`download_tensors` gives client 0 {'c': 'float'}, where a dict from names to tensors is due",
    ),
    "a taken name beside the model": (
        dict(download_tensors=lambda self, server, client: {"classifier.bias": torch.zeros(2)}),
        "`download_tensors` gives client 0 `classifier.bias`, a name that a tensor of the model has",
    ),
    "upload beside the model": (
        dict(upload_tensors=lambda self, server, client: torch.zeros(2)),
        "`upload_tensors` gives a Tensor, where a dict from names to tensors is due",
    ),
    "nothing beside the model": (
        dict(upload_tensors=lambda self, server, client: {"c": torch.zeros(2)}),
        r"client 0 sends {} beside the model, where `upload_tensors` promises {'c': \(\(2,\), torch.float32\)}",
    ),
    "another shape beside the model": (
        dict(
            upload_tensors=lambda self, server, client: {"c": torch.zeros(2)},
            train_client=after_training(lambda t, p, k: p.tensors.update(c=torch.zeros(3))),
        ),
        r"client 0 sends {'c': \(\(3,\), torch.float32\)} beside the model, where",
    ),
    "single tensors of a mean": (
        dict(
            upload_tensors=lambda self, server, client: {"c": torch.zeros(2)},
            train_client=after_training(lambda t, p, k: p.tensors.update(c=torch.zeros(2))),
            update=lambda self, server, uploads, step: {"c": uploads.tensors[0]["c"][0].item()},
            needs="mean",
        ),
        "`needs` is 'mean', but `update` does more with the uploads: `uploads.tensors` is there for methods",
    ),
    "another bank": (
        dict(update=lambda self, server, uploads, step: setattr(server, "bank_SP", server.bank_SP + 1) or {}),
        r"`update` puts another tensor in the place of `server.bank_SP`, .*: change it in place",
    ),
    "update without a report": (dict(update=lambda self, *_: None), "`update` gives a NoneType as its report"),
    "update with a tensor": (dict(update=lambda self, *_: {"x": torch.ones(())}), "gives 'x' as its report a Tensor"),
    "a number on the server": (
        dict(setup=lambda self, server, n: server.tensors.update(best=0.0)),
        r"`server.tensors\['best'\]` is a float, where a tensor is due",
    ),
    "a view on the server": (
        dict(setup=lambda self, server, n: server.tensors.update(start=server.bank_SP[0])),
        r"`server.tensors\['start'\]` is a view of the bank, which no checkpoint would know",
    ),
    "integers": (
        dict(update=lambda self, server, *_: server.integers.__setitem__(0, {"count": torch.tensor(1)}) or {}),
        r"`server.integers` has \['count'\], where \[\] is due",
    ),
    "probes": (dict(probe=probes(2, 3, 2, 2)), "`probe` gives different things for different uploads"),
    "probe": (dict(probe=lambda self, *_: 1.0), "`probe` gives a float, where a tensor is due"),
    "kept for a stranger": (
        dict(synchronise=lambda self, server, uploads: {7: server.bank_SP[0]}),
        r"`synchronise` gives rows for \[7\], and the round accepted uploads of \[0, 1, 2, 3\]",
    ),
    "kept and not finite": (
        dict(synchronise=lambda self, server, uploads: {1: server.bank_SP[0] / 0}),
        "`synchronise` gives rows that are not finite",
    ),
    "kept and no row": (dict(synchronise=lambda self, server, uploads: {1: torch.ones(2)}), "gives client 1 .2,. of"),
}


# Used before another trainer takes over the state of the process.
@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("promises"), FedAvg())
    return run._federation()


def run_round(federation, strategy):
    """The first round of a run with that strategy, in a federation that others have used."""
    server, start_SP = federation.server, federation.server.bank_SP.clone()
    federation.local_trainer.strategy = strategy
    participants = dataclasses.replace(federation.participants, strategy=strategy)
    federation = dataclasses.replace(federation, engine=EachItsOwn(participants, federation.processes))
    try:
        strategy.setup(server, federation.num_clients)
        check_start(strategy, server)
        return federation.run_round(0, 4)
    finally:
        server.bank_SP.copy_(start_SP)
        server.tensors, server.integers = {}, [{}]


@pytest.mark.parametrize("name", PROMISES)
def test_a_promise_that_is_broken_is_told_in_the_strategys_name(federation, name):
    members, message = PROMISES[name]
    with pytest.raises(BrokenPromiseError, match=rf"^The strategy 'fedavg' \(Own\) does not keep.*{message}"):
        run_round(federation, overriding(**members))
    assert not run_round(federation, FedAvg()).refused


def of_client_1(change):
    return after_training(lambda task, payload, kept: change(payload) if task.client == 1 else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda payload: setattr(payload, "num_examples", 10**9), "reports num_examples = 1000000000, and is registe"),
        (lambda payload: payload.metrics.update(loss=float("nan")), "reports loss = nan"),
    ],
)
def test_reports_that_cannot_be_are_refused_by_name(federation, change, message):
    report = run_round(federation, overriding(train_client=of_client_1(change)))
    assert message in report.refused[1] and list(report.refused) == [1]
    assert report.loss == report.loss and report.num_examples == 36


def test_a_promise_that_is_broken_ends_the_run(tmp_path):
    members, message = PROMISES["examples nan"]
    run = trainer(tmp_path, overriding(**members))
    with pytest.raises(BrokenPromiseError, match=message):
        run.train()
    assert run.rounds == []


def test_flags_hold_for_the_hooks_that_they_were_made_for():
    def hook(self, *_):
        pass

    assert FedAvg.needs == "mean" and FedAvg.compressible and FedAvg.keeps_optimizer and FedAvg.shares_batches
    assert type("Own", (FedAvg,), {"finish": hook}).needs == "mean"
    assert type("Own", (FedAvg,), {"update": hook}).needs == "rows"
    assert type("Own", (FedAvgReserved,), {"synchronise": hook}).needs == "rows"
    assert type("Own", (FedAvg,), {"update": hook, "needs": "fusion"}).needs == "fusion"
    assert type("Own", (FedMoE,), {"update": hook}).needs == "rows" and isinstance(FedMoE.needs, property)
    assert not type("Own", (FedAvg,), {"download": hook}).compressible
    assert not type("Own", (FedProx,), {"loss": hook}).shares_batches and FedProx.shares_batches
    trains = type("Own", (FedAvg,), {"train_client": hook})
    assert not trains.keeps_optimizer and not trains.shares_batches and trains.needs == "mean"
    # Whoever brings the hook: a class beside, or one in between.
    assert type("Own", (type("Mixin", (), {"update": hook}), FedAvg), {}).needs == "rows"
    assert not type("Own", (trains,), {}).keeps_optimizer


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        ("update", {"client_parallelism": "sums"}, "'fedavg' does more with uploads than add them up.*by `needs`"),
        ("train_client", {"keep_client_optimizer": True}, r"does not promise to go on.*\(`keeps_optimizer`\)"),
        ("train_client", {"client_parallelism": "data"}, "says so by `shares_batches`"),
        ("download", {"upload_compression": "int8"}, "no receiver knows the model"),
    ],
)
def test_a_flag_that_is_not_said_again_is_not_promised(tmp_path, members, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, overriding(**{members: lambda self, *_: None}), **changes)


def test_flags_that_are_not_kept(tmp_path):
    def median(self, server, uploads, *_):
        server.bank_SP[0] = uploads.rows_mP.median(0).values
        return {}

    trainer(tmp_path / "rows", overriding(needs="rows", update=median)).train()
    message = "`needs` is 'mean', but `update` does more with the uploads: `uploads.rows_mP` is there"
    for parallelism in ("clients", "sums"):
        folder, settings = tmp_path / parallelism, {"client_parallelism": parallelism}
        with pytest.raises(BrokenPromiseError, match=message):
            trainer(folder / "mean", overriding(needs="mean", update=median), **settings).train()
        with pytest.raises(BrokenPromiseError, match=r"`needs` is 'fusion', but `update` does more"):
            trainer(
                folder / "fusion", overriding(FedMoE, needs="fusion", update=median), tiny_mixture(), **settings
            ).train()
    own = overriding(needs="mean", update=lambda self, server, uploads, step: uploads.fuse_into_(server, None, None))
    with pytest.raises(BrokenPromiseError, match=r"`uploads.fuse_into_` is there for methods that say `needs"):
        trainer(tmp_path / "fuses", own).train()
    own = overriding(needs="mean", synchronise=lambda self, server, uploads: {0: uploads.rows_mP[0]})
    with pytest.raises(BrokenPromiseError, match="but `synchronise` does more with the uploads"):
        trainer(tmp_path / "stays", own).train()
    with pytest.raises(ValueError, match=r"`needs` of 'fedavg' is 'average': say \"rows\", \"fusion\" or \"mean\""):
        trainer(tmp_path / "unknown", overriding(needs="average"))

    def forgetful(self, local, task):
        return local.train(task.dataset, task.received_P, task.integers, task.out_P, task.seed), {}

    own = overriding(train_client=forgetful, keeps_optimizer=True)
    with pytest.raises(BrokenPromiseError, match=r"say `keeps_optimizer = False`"):
        trainer(tmp_path / "optimizer", own, rounds=2, keep_client_optimizer=True).train()


# Uploads that cannot be


def huge(payload):
    payload.row_P[5] = 1e30


@pytest.mark.parametrize("changes", [{}, {"client_parallelism": "sums"}, {"upload_compression": "bf16"}])
def test_a_finite_but_impossible_weight_is_refused_by_name(tmp_path, changes):
    run = trainer(tmp_path, overriding(train_client=of_client_1(huge)), **changes)
    run.train()
    [report] = run.rounds
    assert report.refused.keys() == {1} and "`bert.embeddings.word_embeddings.weight` holds 1e+30" in report.refused[1]
    assert all(tensor.abs().max() < 10 for tensor in state(run.model).values())


def test_a_negative_variance_and_a_negative_count_are_refused_by_name(tmp_path):
    def broken(self, local, task):
        payload, kept = FedAvg().train_client(local, task)
        if task.client == 1:
            local.layout.views(payload.row_P)["resnet.embedder.embedder.normalization.running_var"][0] = -1.0
        if task.client == 2:
            payload.integers["resnet.embedder.embedder.normalization.num_batches_tracked"] -= 100
        return payload, kept

    args = tiny_args(tmp_path, rounds=1, clients_per_round=4)
    own = overriding(train_client=broken)
    run = FederatedTrainer(tiny_resnet(), args, tiny_image_federation(), own, processing_class=tiny_processor())
    run.train()
    assert run.rounds[0].refused == {
        1: "`resnet.embedder.embedder.normalization.running_var` holds -1, and no variance is below 0",
        2: "`resnet.embedder.embedder.normalization.num_batches_tracked` is -97, which is no count of batches",
    }


# Three factors that are each sound; their product is not.
FACTORS = ("embeddings.LayerNorm.weight", "self.value.weight", "attention.output.dense.weight")


def overflowing(layout, row_P):
    for name, view in layout.views(row_P).items():
        if name.endswith(FACTORS):
            view.fill_(1e16)


def overflows(self, local, task):
    payload, kept = FedAvg().train_client(local, task)
    if task.client == 1:
        overflowing(local.layout, payload.row_P)
    return payload, kept


def test_a_model_that_computes_nothing_finite_is_refused_where_the_server_asks_it(tmp_path):
    own = overriding(FedMoE, train_client=overflows)
    run = trainer(tmp_path, own, tiny_mixture())
    run.train()
    assert run.rounds[0].refused == {1: "what its model computes of the reserved set is not finite"}
    assert all(tensor.isfinite().all() for tensor in state(run.model).values())


def test_a_mean_that_computes_nothing_finite_ends_the_run_and_names_the_client(tmp_path):
    run = trainer(tmp_path, overriding(train_client=overflows))
    message = (
        r"^The server is not sound after its step of round 1, in which the clients \[0, 1, 2, 3\] took part: what its "
        r"model computes of known rows is not finite. So are the models that \[1\] sent."
    )
    with pytest.raises(RuntimeError, match=message):
        run.train()
    # In sums no process has the uploads, so that nobody can be named.
    with pytest.raises(RuntimeError, match=r"of known rows is not finite\. Nothing of it was saved"):
        trainer(tmp_path, overriding(train_client=overflows), client_parallelism="sums").train()


# A server that is not sound


def ruin(change):
    """An `update` of FedAvg after which the second round's server is changed."""

    def update(self, server, uploads, step):
        report = FedAvg().update(server, uploads, step)
        if step.round_index == 1:
            change(server)
        return report

    return update


def ruin_bank(server):
    server.layout.views(server.bank_SP[0])["classifier.bias"][1] = float("nan")


def ruin_tensors(server):
    server.tensors["momentum_P"] = server.bank_SP[0] / 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ruin_bank, "`classifier.bias` of its model 0 holds values that are not finite"),
        (ruin_tensors, r"`server.tensors\['momentum_P'\]` holds values that are not finite"),
    ],
)
def test_a_server_that_is_not_sound_ends_the_run_before_a_checkpoint(tmp_path, change, message):
    changes = {"rounds": 4, "save_strategy": "steps", "clients_per_round": 2}
    sound = trainer(tmp_path / "sound", FedAvg(), **changes | {"rounds": 1})
    sound.train()
    run = trainer(tmp_path / "unsound", overriding(update=ruin(change)), **changes)
    when = r"after its step of round 2, in which the clients \[\d, \d\] took part: "
    with pytest.raises(RuntimeError, match=when + message):
        run.train()
    assert [path.name for path in Path(tmp_path / "unsound").glob("checkpoint-*")] == ["checkpoint-1"]
    first, second = (tmp_path / name / "checkpoint-1" / "model.safetensors" for name in ("sound", "unsound"))
    assert first.read_bytes() == second.read_bytes()
    assert len(run.rounds) == 1


def test_a_gate_that_is_not_finite_ends_the_run(tmp_path):
    class RuinedGate(FedMoE):
        def update(self, server, *rest):
            report = super().update(server, *rest)
            with torch.no_grad():
                server.model.alpha_logit.fill_(float("nan"))
            return report

    with pytest.raises(RuntimeError, match="`alpha_logit` holds values that are not finite"):
        trainer(tmp_path, RuinedGate(), tiny_mixture()).train()


def test_a_negative_variance_of_the_server_ends_the_run(tmp_path):
    class Momentum(FedAvg):
        """docs/strategies.md warns of it."""

        def update(self, server, *rest):
            server.layout.views(server.bank_SP[0])["resnet.embedder.embedder.normalization.running_var"][1] = -0.25
            return {}

    args = tiny_args(tmp_path, rounds=1)
    run = FederatedTrainer(tiny_resnet(), args, tiny_image_federation(), Momentum(), processing_class=tiny_processor())
    with pytest.raises(RuntimeError, match=r"normalization.running_var` holds -0.25, and no variance is below 0"):
        run.train()


def test_what_a_strategy_does_last_is_checked_too(tmp_path):
    own = overriding(finish=lambda self, server, step: server.bank_SP.fill_(float("inf")))
    with pytest.raises(RuntimeError, match=r"not sound after what 'fedavg' does last: `bert.embeddings.word_embedd"):
        trainer(tmp_path, own).train()


def test_a_model_that_holds_nan_is_refused_before_the_first_round(tmp_path):
    model = tiny_expert()
    model.classifier.bias.data[0] = float("nan")
    run = trainer(tmp_path, FedAvg(), model)
    with pytest.raises(ValueError, match=r"`model` cannot be trained: `classifier.bias` of its model 0 holds values"):
        run.train()
    assert run.rounds == []


def test_the_check_changes_no_bit(tmp_path):
    """Runs with rows that the server knows, and without."""
    data = tiny_federation()
    alone = type(data)(data.pool, data.client_indices)
    runs = [FederatedTrainer(tiny_expert(), tiny_args(tmp_path, rounds=2), d, FedAvg()) for d in (data, alone)]
    for run in runs:
        run.train()
    first, second = (state(run.model) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
