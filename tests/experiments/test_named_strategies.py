"""A method in a user's own file, by its name in recipes and comparisons."""

from unittest import mock

import pytest
import yaml

from hf_fedmoe.experiments import ImageExperiment, compare, make_trainer, method_names, parse_settings
from hf_fedmoe.experiments.comparison import read_comparison
from hf_fedmoe.experiments.methods import check_method
from hf_fedmoe.experiments.named_strategies import STRATEGIES, _load, load_plugin
from hf_fedmoe.training import FedMoETrainingArguments
from tests.experiments.test_run_comparison import SETTINGS, written


HALF = '''
from dataclasses import dataclass

from hf_fedmoe import Strategy


@dataclass
class HalfAverage(Strategy):
    """Goes a share of the way to the mean."""

    share: float = 0.5
    name = "half_average"
    needs = "mean"

    def update(self, server, uploads, step):
        before_P = server.bank_SP[0].clone()
        uploads.average_into_(server)
        server.bank_SP[0].lerp_(before_P, 1 - self.share)
        return {}
'''


@pytest.fixture(autouse=True)
def own_methods():
    """Forgets at the end what a test has loaded."""
    with mock.patch.dict(STRATEGIES):
        yield
    _load.cache_clear()


def plugin(tmp_path, text=HALF):
    path = tmp_path / "my_method.py"
    path.write_text(text)
    return str(path)


def test_its_strategy_becomes_a_method_with_its_settings(tmp_path):
    settings = SETTINGS | {"plugin": plugin(tmp_path), "method_settings": {"half_average": {"share": 0.25}}}
    experiment, args = parse_settings(ImageExperiment, settings | {"output_dir": str(tmp_path)})
    assert "half_average" in method_names()
    processor = experiment.load_processor()
    _, data = experiment.load_data(processor, args.seed)
    trainer = make_trainer("half_average", experiment, args, data, processor)
    assert type(trainer.strategy).__name__ == "HalfAverage" and trainer.strategy.share == 0.25
    load_plugin(settings["plugin"])  # once more is no second method of that name


def test_a_comparison_has_it_in_a_row(tmp_path, warm_processes):
    rows = {"whole": {"method": "half_average", "share": 1.0}, "none": {"method": "half_average", "share": 1e-9}}
    file = plugin(tmp_path)
    one = written(
        tmp_path, methods=rows | {"FedAvg": "fedavg"}, settings=SETTINGS | {"plugin": file, "learning_rate": 0.05}
    )
    table = compare(one, tmp_path / "one")
    whole, none, fedavg = ([cell.strip() for cell in line.split("|")[2:5]] for line in table.splitlines()[2:])
    assert whole == fedavg != none
    plugin(tmp_path, HALF.replace("1 - self.share", "self.share"))
    with pytest.raises(ValueError, match="has a finished run with another plugin_sha256"):
        compare(one, tmp_path / "one")
    plugin(tmp_path)
    other = written(tmp_path, methods=rows)
    with pytest.raises(ValueError, match="There is no method 'half_average'"), mock.patch.dict(STRATEGIES):
        del STRATEGIES["half_average"]
        compare(other, tmp_path / "other")
    assert compare(other, tmp_path / "other", rows=["none"], overrides={"plugin": file}).splitlines()[2].count("|") > 3


def test_a_comparison_finds_the_one_that_its_recipe_names(tmp_path):
    presets = {"quick": SETTINGS | {"plugin": plugin(tmp_path)}, "other": SETTINGS | {"plugin": "is_not_there.py"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(presets))
    path = written(tmp_path, methods={"Half": "half_average"}, recipe="recipe.yaml")
    assert read_comparison(path).methods == {"Half": {"method": "half_average"}}


def test_methods_may_have_a_base_in_common_that_is_none(tmp_path):
    base = HALF.replace('    name = "half_average"\n', "")
    load_plugin(plugin(tmp_path, base + '\n\nclass Mine(HalfAverage):\n    name = "mine"\n'))
    assert "mine" in method_names()


def test_a_plugin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plugin(tmp_path, HALF.replace("half_average", "of_home"))
    load_plugin("~/my_method.py")
    assert "of_home" in method_names()


def test_a_model_that_nobody_knows_is_told(tmp_path):
    load_plugin(plugin(tmp_path, HALF.replace("    name =", '    trains = ["classifier"]\n    name =')))
    with pytest.raises(ValueError, match=r"`trains` \['classifier'\]: write one of classifier, "):
        check_method("half_average", ImageExperiment(["digits"], ["small_cnn"]), FedMoETrainingArguments("unused"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "my_method.py': give a Python file that is there"),
        ("1 / 0", "my_method.py', which cannot be run. It says: ZeroDivisionError"),
        ("x = 1", "my_method.py', which has no subclass of `Strategy`"),
        ("from hf_fedmoe import FedAvg", "which has no subclass of `Strategy`"),
        ("from hf_fedmoe import FedAvg\n\n\nclass Mine(FedAvg):\n    pass", "whose Mine has no name: write"),
        (HALF.replace("half_average", "fedavg"), "whose HalfAverage is named 'fedavg', as another method is"),
        (HALF.replace("half_average", "majority_class"), "is named 'majority_class', as another method is"),
        (HALF.replace('"half_average"', "3"), "whose HalfAverage is named 3: take letters"),
        (HALF + HALF.replace("HalfAverage", "Twice"), "whose Twice is named 'half_average', as another method is"),
        ("import sys\n\nsys.exit(3)", "which cannot be run. It says: SystemExit"),
    ],
)
def test_files_that_have_no_method(tmp_path, text, message):
    file = plugin(tmp_path, text) if text is not None else str(tmp_path / "my_method.py")
    before = method_names()
    with pytest.raises(ValueError, match=message):
        load_plugin(file)
    assert method_names() == before
