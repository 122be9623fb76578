"""Memory of large gradients is used again, and only when nobody can see it any more."""

import gc
import mmap
import threading

import ml_dtypes
import numpy as np
import pytest
from support.sizes import resize

from xent_array import cross_entropy_grad, cross_entropy_value_and_grad, softmax
from xent_array._engines.cpu import memory

SINGLE = np.dtype(np.float32)

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="this system cannot keep memory marked as free")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nothing kept yet, and 'large' is what a test can afford."""
    resize(monkeypatch, MAPPED=1 << 16, ALIGNED=1 << 14)
    memory._kept.clear()
    yield
    memory._kept.clear()


def address(array):
    return array.__array_interface__["data"][0]


def test_used_again():
    first = memory.empty((200, 100), SINGLE)
    first[...] = 1
    here = address(first)
    assert here % 64 == 0
    del first
    second = memory.empty((100, 200), SINGLE)
    assert address(second) == here
    assert second.shape == (100, 200)
    second[...] = 2
    assert second.sum() == 2 * second.size


@pytest.mark.parametrize(
    "hold",
    [
        lambda a: a[3:5, ::2],
        lambda a: a.T,
        lambda a: memoryview(a),
        lambda a: np.from_dlpack(a),
        lambda a: np.asarray(a).view(np.int32)[1],
    ],
)
def test_not_while_somebody_holds_a_part(hold):
    first = memory.empty((200, 100), SINGLE)
    first[...] = 1
    held, here = hold(first), address(first)
    del first
    second = memory.empty((200, 100), SINGLE)
    assert address(second) != here
    second[...] = 2
    assert (np.asarray(held) == hold(np.ones((200, 100), np.float32))).all()
    del held
    assert address(memory.empty((200, 100), SINGLE)) == here


def test_small_arrays_are_numpys():
    small = memory.empty((10, 10), SINGLE)
    assert small.base is None
    del small
    assert not memory._kept


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_what_a_copy_would_be_felt_of_starts_with_a_line(monkeypatch, dtype):
    resize(monkeypatch, MAPPED=1 << 25)
    held = [memory.empty((memory.ALIGNED // 64 + k, 64), np.dtype(dtype)) for k in range(5)]
    assert {address(each) % 64 for each in held} == {0}
    assert all(each.flags.carray for each in held)
    assert not memory._kept


@pytest.mark.parametrize(("count", "is_same"), [(100, True), (60, True), (50, True), (49, False), (101, False)])
def test_of_about_that_size(monkeypatch, count, is_same):
    first = memory.empty((100, 1024), SINGLE)
    del first
    mapped = []
    monkeypatch.setattr(memory, "_mapped", lambda size: mapped.append(size) or mmap.mmap(-1, size))
    assert memory.empty((count, 1024), SINGLE).shape == (count, 1024)
    assert mapped == ([] if is_same else [count * 4096])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_dtypes(dtype):
    made = memory.empty((300, 1000), np.dtype(dtype))
    assert (made.dtype, made.shape) == (dtype, (300, 1000))
    assert made.flags.carray


@pytest.mark.parametrize(("room", "count"), [(0, 2), (79_999 * 5, 4), (80_000 * 5, 5), (1 << 30, 7)])
def test_two_are_kept_or_as_many_as_there_is_room_for(monkeypatch, room, count):
    monkeypatch.setattr(memory, "ROOM", room)
    seven = [memory.empty((200, 100), SINGLE) for _ in range(7)]
    assert len({address(each) for each in seven}) == 7
    seven.clear()
    assert len(memory._kept) == count


def test_of_two_the_one_that_fits():
    small, large = memory.empty((200, 100), SINGLE), memory.empty((900, 100), SINGLE)
    here = address(small)
    del small, large  # the large one is the last
    assert address(memory.empty((199, 100), SINGLE)) == here


def test_gradients():
    """Of every function that makes one: each its own while it is held, and right in memory that is used again."""
    x = np.random.default_rng(0).standard_normal((300, 200), dtype=np.float32)
    labels = np.arange(300) % 200
    made = [
        cross_entropy_value_and_grad(x, labels)[1],
        cross_entropy_grad(x, labels, z_loss=0.1),
        softmax(x),
        cross_entropy_value_and_grad(x, labels, engine="numpy")[1],
    ]
    copies = [each.copy() for each in made]
    assert len({address(each) for each in made}) == 4
    made.clear()
    for _ in range(3):
        assert (cross_entropy_grad(x, labels, z_loss=0.1) == copies[1]).all()
        assert (softmax(x) == copies[2]).all()
        assert (cross_entropy_value_and_grad(x, labels)[1] == copies[0]).all()


def test_the_system_may_take_it():
    """What the system has taken back reads as zeros; nothing of the next gradient may rest on what was there."""
    x, labels = np.random.default_rng(1).standard_normal((300, 200), dtype=np.float32), np.arange(300) % 200
    wanted = cross_entropy_grad(x, labels).copy()
    assert memory._kept
    for kept in memory._kept:
        kept.madvise(mmap.MADV_DONTNEED)
    assert (cross_entropy_grad(x, labels) == wanted).all()


def test_threads():
    """Each gets memory of its own, whoever frees what."""
    wrong = []

    def work(number):
        for _ in range(200):
            made = memory.empty((128, 256), SINGLE)
            made[...] = number
            if not (made == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_smaller_arrays_of_other_threads(monkeypatch):
    """There malloc would give them back at once."""
    resize(monkeypatch, MAPPED=1 << 20, ELSEWHERE=1 << 16)
    memory.empty((200, 100), SINGLE)
    assert not memory._kept
    thread = threading.Thread(target=lambda: memory.empty((200, 100), SINGLE))
    thread.start()
    thread.join()
    assert len(memory._kept) == 1


def test_in_a_cycle():
    """Freed by the garbage collector."""
    made = memory.empty((200, 100), SINGLE)
    here, cycle = address(made), [made]
    cycle.append(cycle)
    del made, cycle
    gc.collect()
    assert address(memory.empty((200, 100), SINGLE)) == here


def test_without_the_means(monkeypatch):
    monkeypatch.setattr(memory, "_CAN_KEEP", False)
    made = memory.empty((200, 100), SINGLE)
    del made
    assert not memory._kept


def test_too_little_memory():
    """What is said is what NumPy says."""
    with pytest.raises(MemoryError, match="Unable to allocate"):
        memory.empty((1 << 40, 1 << 10), SINGLE)


def test_a_system_that_will_not_mark_it(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_FREE", 12345)
    made = memory.empty((200, 100), SINGLE)
    del made
    assert not memory._kept
