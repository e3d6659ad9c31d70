import math
from types import SimpleNamespace

from hf_fedmoe.federation.local_training import LocalTrainer, local_steps


def arguments(**changes):
    fields = dict(num_train_epochs=2, train_batch_size=4, gradient_accumulation_steps=1, dataloader_drop_last=False)
    return SimpleNamespace(**fields | changes)


def test_every_epoch_visits_every_example_once_in_a_new_order():
    steps = local_steps(10, arguments(), seed=3)
    epochs = [[i for step in steps[:3] for batch in step for i in batch]]
    epochs.append([i for step in steps[3:] for batch in step for i in batch])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    assert [len(batch) for step in steps for batch in step] == [4, 4, 2, 4, 4, 2]
    assert local_steps(10, arguments(), seed=3) == steps != local_steps(10, arguments(), seed=4)


def test_accumulation_does_not_reach_across_epochs():
    steps = local_steps(10, arguments(gradient_accumulation_steps=2), seed=3)
    assert [[len(batch) for batch in step] for step in steps] == [[4, 4], [2], [4, 4], [2]]


def test_fraction_of_an_epoch_is_rounded_up_to_whole_steps():
    assert len(local_steps(10, arguments(num_train_epochs=1.5), seed=3)) == 5
    assert len(local_steps(10, arguments(num_train_epochs=0.1), seed=3)) == 1


def test_drop_last_never_drops_a_client_that_has_no_full_batch():
    assert [len(step[0]) for step in local_steps(10, arguments(dataloader_drop_last=True), seed=3)] == [4, 4] * 2
    assert [len(step[0]) for step in local_steps(3, arguments(dataloader_drop_last=True), seed=3)] == [3, 3]


def test_a_last_row_by_itself_joins_the_batch_before_it():
    def sizes(count, **changes):
        return [[len(b) for b in step] for step in local_steps(count, arguments(**changes), 3, 1, never_one=True)]

    assert sizes(9) == [[4], [5]] and sizes(5) == [[5]]
    assert sizes(10) == [[4], [4], [2]] and sizes(8) == [[4], [4]]
    assert sizes(1) == [[1]] and sizes(3, train_batch_size=1) == [[1], [1], [1]]
    assert sizes(9, dataloader_drop_last=True) == [[4], [4]]
    assert sizes(9, gradient_accumulation_steps=2) == [[4, 5]]
    # In the order of the others.
    (joined,), (first, last) = local_steps(5, arguments(), 3, 1, never_one=True), local_steps(5, arguments(), 3, 1)
    assert joined[0] == first[0] + last[0]


def test_a_loss_that_is_no_number_is_not_the_least():
    for losses, least in (([0.5, 0.3, 0.3], 1), ([math.nan, 0.5, 0.4], 2), ([math.nan, math.nan], 0)):
        told = iter(losses)
        local = SimpleNamespace(mean_loss=lambda *_, told=told: next(told))
        assert LocalTrainer.least_loss(local, None, losses, {}, 0) == least
