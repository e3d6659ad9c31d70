"""Clients trained by DeepSpeed, ZeRO 1 to 3, in two processes end like those of one process without it."""

import pytest

from tests.every_method import trainer
from tests.invariants.test_shared_batches import (
    assert_like_one_process,
    settings,
)
from tests.invariants.test_two_processes import join_group, launch, record


pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

CASES = {
    **{f"fedavg-{stage}": {"stage": stage} for stage in (1, 2, 3)},
    "fedavg-offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "fedprox-2": {"stage": 2},
    "fedprox-3": {"stage": 3},
    "fedmoe-3": {"stage": 3},
}


def run(name, output_dir, **changes):
    method = name.split("-")[0]
    run = trainer(method, output_dir, **{**settings(method), "client_parallelism": None, "rounds": 3} | changes)
    run.train()
    run.save_model(str(output_dir / "saved"))
    return run


def engine(zero, **more):
    return {"deepspeed": {"zero_optimization": zero, "train_batch_size": "auto", "gradient_clipping": "auto"} | more}


def process(index, port, folder, names):
    join_group(index, port)
    for name in names:
        record(run(name, folder / name, **engine(CASES[name])), folder / f"{name}-{index}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    launch(process, folder, list(CASES))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_zero_ends_like_one_process(name, folder, tmp_path):
    record(run(name, tmp_path / name), tmp_path / "alone")
    assert_like_one_process(name.split("-")[0], folder / name, tmp_path / "alone")
