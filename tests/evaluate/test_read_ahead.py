"""Items are read in order, and not far ahead."""

import threading

import pytest

from emu_jax.evaluate.read_ahead import read_ahead


def test_at_most_so_many_items_are_taken_before_they_are_needed():
    taken: list[int] = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number

    read = read_ahead(lambda number: number * number, items(), 3)
    assert next(read) == 0 and taken == [0, 1, 2]
    assert next(read) == 1 and taken == [0, 1, 2, 3]
    assert list(read) == [4, 9, 16, 25, 36, 49, 64, 81]


def test_the_order_is_the_items_whichever_is_read_first():
    second = threading.Event()

    def read(number: int) -> int:
        if number == 0:
            assert second.wait(10)
        else:
            second.set()
        return number

    assert list(read_ahead(read, range(4), 2)) == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would():
    read = read_ahead(lambda number: 6 // number, [3, 0, 2], 2)
    assert next(read) == 2
    with pytest.raises(ZeroDivisionError):
        next(read)
