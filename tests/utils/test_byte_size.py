import pytest

from verl.utils.byte_size import format_bytes, format_gb


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (2048 * 2**30, "2,048.0 GiB"),
    ],
)
def test_format_bytes_takes_the_largest_unit_that_fits(nbytes, text):
    assert format_bytes(nbytes) == text


def test_format_gb_counts_in_powers_of_ten():
    assert format_gb(128 * 10**9) == "128.0 GB"
