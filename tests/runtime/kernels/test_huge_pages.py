"""Large pages change nothing of what lies there."""

import pytest
import torch

from optim.runtime.kernels.huge_pages import use_huge_pages


@pytest.mark.parametrize("count", [0, 10, 3 << 20])
def test_huge_pages_keep_what_is_there(count: int) -> None:
    x = torch.arange(count, dtype=torch.int32)
    use_huge_pages(x)
    assert torch.equal(x, torch.arange(count, dtype=torch.int32))
