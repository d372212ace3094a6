"""Out of memory: errors of allocators, and batches in halves."""

import pytest
import torch

from fewstep.base.memory import Halving, in_parts, is_out_of_memory

ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.07 GB, max allowed: 18.13 GB)."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:20])
def test_errors_of_allocators_are_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_size_that_fits_is_remembered(caplog):
    sizes = []

    def function(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise ERRORS[0]
        return torch.tensor(list(rows))

    halving = Halving()
    for _ in range(2):
        assert in_parts(function, 7, halving).tolist() == list(range(7))
    assert sizes == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1]
    assert caplog.text.count("out of memory with ") == 2
    assert "with 7 samples in a batch: 4 from now on" in caplog.text


def test_one_row_that_does_not_fit_and_other_errors_are_raised():
    def function(rows):
        raise ERRORS[1] if len(rows) < 3 else ERRORS[2]

    with pytest.raises(RuntimeError, match="MPS backend"):
        in_parts(function, 3)
    other = RuntimeError("shape mismatch")

    def wrong(rows):
        raise other

    with pytest.raises(RuntimeError) as raised:
        in_parts(wrong, 3)
    assert raised.value is other


def test_no_rows_are_one_part():
    assert in_parts(lambda rows: torch.zeros(len(rows), 2), 0).shape == (0, 2)
