from __future__ import annotations

import pytest

from lit_prune.allocation.protection import ends


@pytest.mark.parametrize(
    ("layers", "first", "last", "expected"),
    [
        (32, 4, 2, [0, 1, 2, 3, 30, 31]),
        (32, 4, 3, [0, 1, 2, 3, 29, 30, 31]),
        (30, 4, 2, [0, 1, 2, 3, 28, 29]),
        (16, 4, 2, [0, 1, 15]),
        (64, 4, 2, [0, 1, 2, 3, 4, 5, 6, 7, 60, 61, 62, 63]),
        (12, 4, 2, [0, 1, 11]),
        (8, 4, 2, [0, 7]),
        (3, 4, 2, []),
        (1, 4, 2, []),
        (5, 0, 0, []),
    ],
)
def test_the_share_is_that_of_32_layers(
    layers: int, first: int, last: int, expected: list[int]
) -> None:
    assert ends(layers, first, last) == expected
