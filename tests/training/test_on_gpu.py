"""What runs on a GPU ends like what runs on the CPU, but for rounding: `pytest -m gpu`, on a machine that has one."""

import pytest
import torch
from peft import LoraConfig

from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.every_method import LORA_RUNS, PERSONAL_RUNS, RUNS, image_model, trainer
from tests.tiny_federation import (
    interrupted_and_resumed,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
    tiny_rows,
)
from tests.tiny_images import tiny_image_federation, tiny_processor


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

DEVICE = "cuda"
TOLERANCE = {"rtol": 0, "atol": 2e-3}
# Some gradients are 0 but for rounding, which Adam would divide by itself.
SETTINGS = {"rounds": 2, "adam_epsilon": 1e-3, "save_strategy": "no"}
METHODS = ("fedavg", "fedmoe")
WAYS = {
    "plain": {},
    "paper": {"preset": "paper"},
    "lora": {"lora": True},
    "sums": {"client_parallelism": "sums"},
    "at_once": {"clients_at_once": 2},
    "read_ahead": {"dataloader_num_workers": 2},
    "compiled": {"torch_compile": True},
}
# With a state of the optimizer, of the server or of the clients.
RESUMED = (
    *("fedavg_client_optimizer", "fedmoe_paper", "fedmoe_download_mixture"),
    *("afl", "apfl", "clustered", "decentralised", "fedrolex"),
)


def trained(method, output_dir, device, lora=False, **changes):
    peft_config = LoraConfig(r=4) if lora else None
    args = tiny_args(output_dir, use_cpu=device == "cpu", **SETTINGS | changes)
    if method == "fedavg":
        run = FederatedTrainer(tiny_expert(), args, tiny_federation(), peft_config=peft_config)
    else:
        run = FedMoETrainer(tiny_mixture(peft_config=peft_config), args, train_dataset=tiny_federation())
    run.train()
    return run


def losses(run):
    """Of the clients in each round, and of the server's model at the end."""
    assert not any(report.refused for report in run.rounds)
    return [*(report.loss for report in run.rounds), run.evaluate()["eval_loss"]]


@torch.no_grad()
def logits(model):
    rows = tiny_rows(20, seed=1).with_format("torch")
    device = next(model.parameters()).device
    assert device.type in (DEVICE, "cpu")
    return model.eval()(**{name: rows[name][:].to(device) for name in ("input_ids", "attention_mask")}).logits.cpu()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_like_on_the_cpu(method, way, tmp_path):
    found, expected = (trained(method, tmp_path / device, device, **WAYS[way]) for device in (DEVICE, "cpu"))
    assert next(found.model.parameters()).device.type == DEVICE
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3)
    torch.testing.assert_close(logits(found.model), logits(expected.model), **TOLERANCE)


@pytest.mark.parametrize("name", RUNS | LORA_RUNS)
def test_every_method_has_the_losses_of_the_cpu(name, tmp_path):
    runs = [trainer(name, tmp_path / device, use_cpu=device == "cpu", **SETTINGS) for device in (DEVICE, "cpu")]
    for run in runs:
        run.train()
    # Adapters have dropout here, whose masks are others.
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=0.1 if name in LORA_RUNS else 1e-2)
    if name in PERSONAL_RUNS:
        assert runs[0].evaluate_clients().keys() == runs[1].evaluate_clients().keys()
        torch.testing.assert_close(*(logits(run.personalize(0)) for run in runs), rtol=0, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_images_have_the_losses_of_the_cpu(method, tmp_path):
    def run(device):
        args = tiny_args(tmp_path / device, use_cpu=device == "cpu", **SETTINGS)
        data, processor, strategy = tiny_image_federation(), tiny_processor(), RUNS[method].strategy()
        run = FederatedTrainer(image_model(method), args, data, strategy, processing_class=processor)
        run.train()
        return run

    # Convolutions round more on a GPU.
    assert losses(run(DEVICE)) == pytest.approx(losses(run("cpu")), rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_has_nearly_the_losses_of_fp32(method, tmp_path):
    half, whole = (trained(method, tmp_path, DEVICE, bf16=bf16) for bf16 in (True, False))
    assert losses(half) == pytest.approx(losses(whole), rel=0.02) and losses(half) != losses(whole)
    assert any(not torch.equal(parameter, parameter.bfloat16().float()) for parameter in half.model.parameters())


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_like_one_that_was_never_interrupted(name, tmp_path):
    def run(folder):
        return trainer(name, tmp_path / folder, use_cpu=DEVICE == "cpu", adam_epsilon=1e-3)

    whole, resumed = run("whole"), interrupted_and_resumed(lambda: run("interrupted"))
    whole.train()
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), **TOLERANCE)
