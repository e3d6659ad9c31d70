"""The datasets that `evaluate` and `predict` are given, and the rows of them that a model could not read."""

from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..data import FederatedDataset
from ..models.configuration_checks import class_names
from .checks import check_best_metric
from .columns import ModelColumns
from .metrics import classification_metrics, first_logits, try_metrics
from .readers import Part, Reader, scan_readers
from .trainer_of_rounds import client_model_of


class EvaluatedRows(ModelColumns):
    """Says in plain words what is wrong with a dataset, for [`FederatedTrainer`]."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Loads rows as [`~transformers.Trainer`] does, and says so of what is no dataset."""
        _check_is_dataset("eval_dataset", self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Loads rows as [`~transformers.Trainer`] does, and says so of what is no dataset."""
        _check_is_dataset("test_dataset", test_dataset)
        return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """
        Evaluates as [`~transformers.Trainer`] does. Where it fails, the rows are looked at, which every evaluation of
        a run would be too often: `ValueError` names those that no model can read.
        """
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        except Exception as error:
            dataset = dataloader.dataset
            if isinstance(dataset, datasets.Dataset) and (fault := self._fault(dataset)):
                raise ValueError(f"{fault} It says: {type(error).__name__}: {error}") from error
            raise

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Tells as [`~transformers.Trainer`] does; raises `ValueError` for a metric that the caller's do not have."""
        check_best_metric(self.args, [name.removeprefix("eval_") for name in metrics], ())
        return super()._determine_best_metric(metrics, trial)

    def _try_metrics(self) -> None:
        """Raises `ValueError` for a caller's `compute_metrics` that fails on as many rows and classes as there are."""
        args, compute = self.args, self.compute_metrics
        # The scores that others get are not known before the model gives them.
        plain = self.preprocess_logits_for_metrics is first_logits
        if args.prediction_loss_only or args.batch_eval_metrics or args.include_for_metrics or not plain:
            return
        if not args.eval_do_concat_batches:  # whoever wants lists of batches has made-up scores in none
            return
        if compute is None or compute is classification_metrics:
            return
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for rows in named.values():
            if isinstance(rows, datasets.Dataset):
                try_metrics(compute, len(class_names(self.model.config)), len(rows))

    def _fault(self, dataset: datasets.Dataset) -> str | None:
        """Says what is wrong with the rows, `None` if nothing is known to be."""
        client_model = client_model_of(self.strategy.server_models(self.model)[0])
        wanted = client_model.main_input_name
        if wanted not in dataset.column_names:
            return (
                f"Of the columns that the model takes the dataset has only {dataset.column_names}, no {wanted!r}: "
                "prepare it like the clients' data, by `data.map(...)`."
            )
        part = Part("the dataset", "dataset", np.arange(len(dataset)))
        reader = Reader(dataset, [part], self.data_collator, "data_collator", trains=False)
        if faults := scan_readers([reader], self._num_embeddings(), len(class_names(self.model.config))):
            return " ".join(faults)
        most = getattr(client_model.config, "max_position_embeddings", None)
        if most is not None and reader.scan.lengths_N is not None and reader.scan.lengths_N.max() > most:
            row = int(reader.scan.lengths_N.argmax())
            return (
                f"`{wanted}` of {reader.name(row)} has {reader.length(row)} tokens, but the model reads no more than "
                f"{most}: prepare the data with `truncation=True, max_length={most}`."
            )
        return None


def _check_is_dataset(name: str, dataset: Any) -> None:
    """Raises `ValueError` for what is known to be no rows to evaluate on."""
    if isinstance(dataset, FederatedDataset):
        raise ValueError(
            f"`{name}` is a FederatedDataset: give one of its splits, for example `data.test`; `evaluate_clients()` "
            "evaluates each client."
        )
    if isinstance(dataset, (list, tuple)):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}: give a dataset, `datasets.Dataset.from_list(rows)`."
        )
    if dataset is None and name == "test_dataset":
        raise ValueError(f"`{name}` is None: give a dataset, for example `data.test`.")
