from __future__ import annotations

import pytest
import torch
from tq_core import TQError
from tq_kernels import debug_mode
from tq_kernels.checks import check_cumulative, check_range, check_tensor, values_checked


def test_range_of_int32_does_not_wrap() -> None:
    entries = torch.tensor([0, -1, 7], dtype=torch.int32)
    check_range("slots", entries, None, 2**40, "")
    check_range("slots", entries, -(2**40), 2**32, "")
    with pytest.raises(TQError, match=r"slots\[2\] is 7: needs at most 6; shrink"):
        check_range("slots", entries, None, 7, "shrink")
    with pytest.raises(TQError, match=r"slots\[1\] is -1: needs 0 to 7; grow"):
        check_range("slots", entries, 0, 8, "grow")


def test_tensor_messages() -> None:
    x = torch.zeros(2, 3)
    check_tensor("x", x, (None, 3))
    for arguments, match in (
        (("x", 5, (1,)), "x is a int: pass a torch.Tensor"),
        (("x", x, (2, 3), (torch.int32, torch.int64)), "float32: supported are int32, int64"),
        (("x", x, (None, 4)), r"shape \(2, 3\): needs \[\*, 4\]"),
        (("x", x, (2,)), r"needs \[2\]"),
        (("x", x, (2, 3), (torch.float32,), torch.device("meta")), r"x is on cpu: needs meta"),
    ):
        with pytest.raises(TQError, match=match):
            check_tensor(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[1, 2, 5], [0, 3, 2, 5], [0, 2, 4], [0, 2, 6]])
def test_cumulative(values: list[int]) -> None:
    check_cumulative("cu", torch.tensor([0, 2, 2, 5]), 5)
    with pytest.raises(TQError, match="cu is.*cumulative sum from 0 to.*5"):
        check_cumulative("cu", torch.tensor(values), 5)


def test_debug_mode_nests() -> None:
    meta = torch.empty(1, device="meta")
    assert values_checked(torch.empty(1)) and not values_checked(meta)
    with debug_mode():
        assert values_checked(meta)
        with debug_mode(False):
            assert not values_checked(meta)
        assert values_checked(meta)
    assert not values_checked(meta)
