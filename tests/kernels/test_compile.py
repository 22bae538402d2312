"""What `make test` concludes from the compiled kernels."""

from typing import Any

import pytest

from benchmarks.compile_kernels import CHIPS, faults, launches


def row(**changes: Any) -> dict[str, Any]:
    return {
        "kernel": "_k",
        "shape": "B=1",
        "chip": "sm_90",
        "stack_bytes": 0,
        "shared_bytes": 227 * 1024,
        "ordered": True,
    } | changes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"stack_bytes": 8}, "_k (B=1, sm_90) spills: 8 bytes of stack"),
        ({"shared_bytes": 227 * 1024 + 1}, "_k (B=1, sm_90) wants 232449 bytes of shared memory, the chip has 232448"),
        ({"ordered": False}, "_k (B=1, sm_90) adds up other programs' sums without waiting for them"),
        ({"chip": "sm_80"}, "_k (B=1, sm_80) wants 232448 bytes of shared memory, the chip has 166912"),
    ],
)
def test_spills_and_too_much_shared_memory_are_faults(changes: dict[str, Any], fault: str | None) -> None:
    assert faults(row(**changes)) == ([fault] if fault else [])


def test_the_launchers_themselves_say_what_is_compiled() -> None:
    found = launches()
    assert len({launch.kernel for launch in found}) == 7
    assert {launch.constants.get("BASELINE") for launch in found} >= {"none", "constant", "loo", "tensor"}
    sampler = next(each for each in found if each.kernel == "_squashed_gaussian_fwd_kernel" and "A=6" in each.label)
    assert sampler.signature["mean_ptr"] == "*fp32"
    assert sampler.signature["rng_ptr"] == "*i64"
    assert sampler.constants["BLOCK_A"] == 8
    assert sampler.constants["stride_mean_a"] == 1  # as Triton itself takes a 1
    assert set(CHIPS) == {80, 90, 100}
