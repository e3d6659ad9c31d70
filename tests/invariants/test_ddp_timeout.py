"""A process that waits for another no longer than `ddp_timeout`, on CPUs too."""

import json
import os
import time
from pathlib import Path

import pytest
from transformers import default_data_collator

from hf_fedmoe.federation import Processes
from hf_fedmoe.federation.processes import BrokenOffError
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation
from tests.two_processes import PROCESSES, index_of_this_process, join_group, launch


SECONDS = 5


def process(index, port, folder, parallelism):
    """One hangs in the collator until the other has given up."""
    join_group(index, port)
    main_is_through = Path(folder, "0.json")

    def collate(rows):
        while index_of_this_process() and not main_is_through.exists():
            time.sleep(0.1)
        return default_data_collator(rows)

    args = tiny_args(folder, ddp_timeout=SECONDS, client_parallelism=parallelism)
    trainer = FederatedTrainer(tiny_expert(), args, tiny_federation(), train_data_collator=collate)
    started = time.monotonic()
    try:
        trainer.train()
    except BaseException as error:
        told = [f"{type(error).__name__}: {error}", time.monotonic() - started]
        Path(folder, f"{index}.json").write_text(json.dumps(told))
    os._exit(0)


@pytest.mark.parametrize("parallelism", ["clients", pytest.param("data", marks=pytest.mark.slow)])
def test_a_process_that_hangs_ends_the_run_of_the_other_in_time(parallelism, tmp_path):
    launch(process, str(tmp_path), parallelism)
    (main, seconds), (other, _) = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(PROCESSES))
    assert main.startswith("BrokenOffError: Process 0 has waited for another one for `ddp_timeout` = 5 s.")
    assert SECONDS <= seconds < SECONDS + 20
    assert other == "BrokenOffError: Process 1 has lost another one, which ended: its own output says why."


def test_what_fails_by_itself_while_others_are_waited_for_is_told_as_it_is():
    with pytest.raises(RuntimeError, match=r"^no room$"), Processes().waiting():
        raise RuntimeError("no room")
    with pytest.raises(BrokenOffError, match="`ddp_timeout` = 7 s"), Processes(timeout=7).waiting():
        raise RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 7000ms for recv operation")
