import pytest
import torch

from hf_fedmoe.training.precision import without_tf32


def precisions():
    return [
        place.fp32_precision
        for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    ]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has other switches")
def test_products_are_those_of_float32_in_the_block_only():
    before = precisions()
    assert "tf32" in before  # of convolutions, unless told
    with without_tf32():
        assert precisions() == ["ieee"] * 3
        with without_tf32():
            pass
        assert precisions() == ["ieee"] * 3
    assert precisions() == before
    with pytest.raises(RuntimeError), without_tf32():
        raise RuntimeError
    assert precisions() == before
