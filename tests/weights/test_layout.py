import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fedmoe.weights import StateLayout, copy_module, in_one_copy, release


class TiedWithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 3, bias=False)
        self.third = nn.Linear(3, 5, bias=False)
        self.third.weight = self.first.weight


def test_row_holds_every_float_tensor_once_and_integers_apart():
    module = TiedWithBatchNorm()
    layout = StateLayout.of(module)
    assert layout.integers == ("norm.num_batches_tracked",)
    assert layout.num_elements == 15 + 5 + 5 + 5 + 5 + 5 + 15
    assert [(mean.name, variance.name) for mean, variance in layout.batchnorm] == [
        ("norm.running_mean", "norm.running_var")
    ]
    assert "third.weight" not in {slot.name for slot in layout.slots}


def test_read_write_round_trip_is_bitwise():
    source, target = TiedWithBatchNorm(), TiedWithBatchNorm()
    source.norm.running_mean.uniform_()
    layout = StateLayout.of(source)
    layout.write(layout.read(source), target)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name
    assert target.third.weight is target.first.weight


def test_bound_module_and_row_are_one_memory():
    module = TiedWithBatchNorm()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    layout = StateLayout.of(module)
    bank_SP = layout.bank([module])
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    bank_SP.zero_()
    assert module.first.weight.abs().sum() == 0 and module.norm.running_var.abs().sum() == 0
    # Training goes into the row: an optimizer step on the module moves the bank.
    module.eval()
    module.second(module.first(torch.ones(2, 3))).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(layout.read(module), bank_SP[0])

    release(module)
    bank_SP.fill_(7.0)
    assert not (module.first.weight == 7.0).any()


def test_every_tensor_starts_on_a_64_byte_boundary():
    layout = StateLayout.of(TiedWithBatchNorm())
    assert all(slot.start % 16 == 0 for slot in layout.slots) and layout.size % 16 == 0


def test_copy_of_a_bound_module_owns_its_memory_and_keeps_ties():
    module, other = TiedWithBatchNorm(), TiedWithBatchNorm()
    for each in (module, other):
        each.second.weight.requires_grad_(False)
    layout = StateLayout.of(module)
    assert "second.weight" not in [slot.name for slot in layout.slots]
    bank_SP = layout.bank([module, other])
    copied = copy_module(module)
    assert copied.first.weight.untyped_storage().nbytes() == 15 * 4
    assert copied.third.weight is copied.first.weight
    assert not copied.second.weight.requires_grad and copied.first.weight.requires_grad
    bank_SP.zero_()
    assert copied.first.weight.abs().sum() > 0


def test_difference_names_the_tensor():
    layout = StateLayout.of(nn.Linear(3, 4))
    assert layout.difference(StateLayout.of(nn.Linear(3, 4))) is None
    assert "torch.float64" in layout.difference(StateLayout.of(nn.Linear(3, 4).double()))
    assert "`bias`" in layout.difference(StateLayout.of(nn.Linear(3, 4, bias=False)))
    assert "(4, 3)" in layout.difference(StateLayout.of(nn.Linear(2, 4)))


def test_what_nobody_has_written_is_named():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    layout = StateLayout.of(module)
    row_P = torch.rand(layout.size)
    layout.blank_(row_P)
    assert layout.blanks(row_P) == [slot.name for slot in layout.slots]
    padding = torch.ones(layout.size, dtype=torch.bool)
    for slot in layout.slots:
        padding[slot.start : slot.stop] = False
    assert not row_P[padding].any()
    layout.views(row_P)["0.weight"].zero_()
    assert "0.weight" not in layout.blanks(row_P) and "0.bias" in layout.blanks(row_P)
    layout.read(module, out=row_P)
    assert layout.blanks(row_P) == []
    row_P.fill_(float("nan"))  # what a model that has diverged is
    assert layout.blanks(row_P) == []


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default:
            self.count += result.device != args[0].device
        return result


def test_many_tensors_are_moved_in_one_copy_of_each_dtype():
    tensors = {"count": torch.tensor(3), "mean": torch.rand(2, 3), "of": torch.arange(4), "rest": torch.rand(5)}
    stay = in_one_copy(tensors, "cpu")
    assert stay is not tensors and all(stay[name] is tensor for name, tensor in tensors.items())
    with Copies() as copies:
        moved = in_one_copy(tensors, "meta")
    assert copies.count == 2
    assert list(moved) == list(tensors)
    for name, tensor in tensors.items():
        found = moved[name]
        assert (found.device.type, found.shape, found.dtype) == ("meta", tensor.shape, tensor.dtype)
        assert found.untyped_storage().nbytes() == tensor.nbytes  # nobody else's
    assert in_one_copy({}, "meta") == {}
    with Copies() as copies:
        mixed = in_one_copy(tensors | {"of": moved["of"]}, "meta")
    assert mixed["of"] is moved["of"] and copies.count == 2 and list(mixed) == list(tensors)


def test_where_tensors_begin_is_copied_once(monkeypatch):
    layout = StateLayout.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    made, make = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: made.append(kwargs) or make(*args, **kwargs))
    for _ in range(2):
        layout.blank_(torch.empty(layout.size, device="meta"))
    layout.blank_(torch.empty(layout.size))
    assert made == [{"device": torch.device("meta")}, {"device": torch.device("cpu")}]
