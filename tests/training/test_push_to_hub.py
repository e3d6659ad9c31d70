"""Models travel to the Hub, and back; the Hub is played by a server on 127.0.0.1."""

import json
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard

from tests.loopback_hub import loopback_hub
from tests.tiny_models import CODE_OF_A_MIXTURE


# In a process of its own, because the address of the Hub is read when huggingface_hub is imported.
PUSH_AND_LOAD = """
import json
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification

from hf_fedmoe.training import FedMoETrainer
from tests.tiny_federation import tiny_args, tiny_federation, tiny_mixture

data = tiny_federation()
args = tiny_args(sys.argv[1], rounds=1, hub_model_id="user/model", **json.loads(sys.argv[2]))
trainer = FedMoETrainer(tiny_mixture(), args, train_dataset=data)
trainer.train()
trainer.evaluate(data.validation, metric_key_prefix="test")
trainer.push_to_hub(dataset="toy rows", license="cc0-1.0")

folder = snapshot_download("user/model", cache_dir=sys.argv[1] + "/cache")
assert (Path(folder) / "README.md").is_file()
for name in ("user/model", folder):
    loaded = AutoModelForSequenceClassification.from_pretrained(name, cache_dir=sys.argv[1] + "/cache2")
    own, pushed = trainer.model.state_dict(), loaded.state_dict()
    assert own.keys() == pushed.keys()
    assert all(torch.equal(own[key], pushed[key]) for key in own)
print("bit-equal")
"""


def push_and_load(tmp_path, **arguments):
    """Runs the script above with further training arguments; the files that the Hub then has."""
    repository = Path(__file__).parents[2]
    with loopback_hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(repository),
        }
        result = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD, str(tmp_path / "run"), json.dumps(arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("bit-equal")
    return hub.files


def test_push_sends_model_code_and_card_and_comes_back_bit_equal(tmp_path):
    files = push_and_load(tmp_path)
    assert CODE_OF_A_MIXTURE | {"config.json", "model.safetensors", "README.md", "training_args.json"} <= files.keys()
    assert_nothing_private(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.license == "cc0-1.0"
    assert card.data.model_name == "model" and "fedmoe" in card.data.tags
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert 'model="user/model"' in card.text


def test_pushing_every_checkpoint_sends_neither_pickles_nor_the_clients_models(tmp_path):
    """The paper's Stage C leaves a model with each participant, beside the checkpoints."""
    kept = {"preset": "paper", "keep_client_optimizer": True, "save_strategy": "steps", "push_to_hub": True}
    files = push_and_load(tmp_path, **kept)
    assert list((tmp_path / "run").glob("_clients/*.safetensors"))
    assert {"modeling_fedmoe.py", "model.safetensors", "README.md"} <= files.keys()
    assert_nothing_private(files)


def assert_nothing_private(files):
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl")) or "/" in name]
