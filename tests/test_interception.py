"""Forward functions: replaced for a while, then as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_prune.interception import forwards, player


def test_forward_functions_come_back() -> None:
    plain, hooked, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)

    def own(input: torch.Tensor) -> torch.Tensor:  # such as what accelerate puts there
        return input + 1

    hooked.forward = own
    expected = plain(x)

    def fail() -> None:
        with forwards({plain: player("p"), hooked: player("h")}):
            assert (plain(x), hooked(x)) == ("p", "h")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "forward" not in vars(plain)
    assert hooked.forward is own
    assert torch.equal(plain(x), expected)
    assert torch.equal(hooked(x), x + 1)
