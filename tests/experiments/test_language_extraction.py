"""Training text that comes out again."""

import torch

from hf_fedmoe.experiments.language_extraction import extraction_table, reproduced
from hf_fedmoe.owners import default_arguments, fit_adapter, new_adapter
from tests.tiny_decoders import statistics_for, tiny_decoder, tiny_mixture


def test_a_text_learnt_by_heart_comes_out_and_one_never_read_does_not(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 24, (4, 16), generator=generator)
    adapter = new_adapter(tiny_decoder("gpt2"), 4, 6)
    args = default_arguments(tmp_path, learning_rate=0.05, max_steps=150, use_cpu=True, disable_tqdm=True)
    fit_adapter(adapter, [{"input_ids": row, "labels": row} for row in ids.tolist()], args)
    mixture = tiny_mixture("gpt2", owners=("court",))
    mixture = mixture.add_owner(adapter, statistics_for(mixture, "press"), name="press")
    assert reproduced(mixture, ids, prefix=4, expert="press") == (1.0, 12.0)
    assert reproduced(mixture, ids, prefix=4, expert="base")[0] == 0.0
    # The first token right, the second wrong.
    own = mixture.generate(ids[:, :4], max_new_tokens=2, min_new_tokens=2, do_sample=False, expert="base")
    own[:, 5] += 1
    assert reproduced(mixture, own, prefix=4, expert="base") == (0.0, 1.0)


def test_the_table_has_the_owners(tmp_path):
    mixture = tiny_mixture("gpt2")
    rows = {name: torch.randint(3, 24, (3, 64)).tolist() for name in ("court", "press")}
    found = extraction_table(mixture, rows, 2)
    assert "|  | court | press |" in found and found.count("| mixture without the owner | ") == 1
    assert found.count("%, ") == 8
