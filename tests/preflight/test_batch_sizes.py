import pytest

from verl.preflight.batch_sizes import nearest_sizes


@pytest.mark.parametrize("size", range(1, 40))
def test_nearest_sizes_equal_a_search_over_all_numbers(size):
    fitting = [number for number in range(1, 31) if 30 % number == 0]
    expected = [
        max((n for n in fitting if n < size), default=None),
        min((n for n in fitting if n > size), default=None),
    ]
    found = nearest_sizes(size, 30, lambda number: 30 % number == 0)
    assert found == " or ".join(str(n) for n in expected if n is not None)
