"""What `make test` concludes from the compiled kernels, and that it compiles what is launched."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compile_kernels
from benchmarks.compile_kernels import CHIPS, CORNER_CHIPS, disorder, faults, variant
from benchmarks.kernel_launches import Launch, corners, launches, recorded, whole_launches
from fastsac_kernels import PhiloxState, sample_squashed_gaussian


def row(**changes: Any) -> dict[str, Any]:
    return {
        "kernel": "_k",
        "shape": "B=1",
        "chip": "sm_90",
        "stack_bytes": 0,
        "shared_bytes": 227 * 1024,
        "disorder": None,
    } | changes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"stack_bytes": 8}, "_k (B=1, sm_90) spills: 8 bytes of stack"),
        ({"shared_bytes": 227 * 1024 + 1}, "_k (B=1, sm_90) wants 232449 bytes of shared memory, the chip has 232448"),
        ({"disorder": "reads too early"}, "_k (B=1, sm_90) reads too early"),
        ({"chip": "sm_80"}, "_k (B=1, sm_80) wants 232448 bytes of shared memory, the chip has 166912"),
        (
            {"chip": "sm_89", "shared_bytes": 99 * 1024 + 1},
            "_k (B=1, sm_89) wants 101377 bytes of shared memory, the chip has 101376",
        ),
        ({"chip": "sm_120", "shared_bytes": 99 * 1024}, None),
    ],
)
def test_spills_and_too_much_shared_memory_are_faults(changes: dict[str, Any], fault: str | None) -> None:
    assert faults(row(**changes)) == ([fault] if fault else [])


#: as Triton writes it, with the gradients' stores in the loop before
STORE = "@%p46 st.global.b32 [ %rd27 + 0 ], { %r87 };"
ARRIVE = "@%p46 atom.global.gpu.acq_rel.add.u32 %r88, [ %rd45 + 0 ], %r89;"
LOAD = "@%p29 ld.global.cg.b32 { %r107 }, [ %rd28 + 0 ];"
PTX = f"""
$L__BB0_2:
	@%p2 ld.global.v4.b32 {{ %r17, %r18, %r19, %r20 }}, [ %rd11 + 0 ];
	@%p2 st.global.v4.b32 [ %rd14 + 0 ], {{ %r30, %r31, %r32, %r33 }};
	@%p23 bra 	$L__BB0_2;
$L__tmp7:
$L__BB0_4:                              // %._crit_edge
	bar.sync 	0;
	{STORE}
	bar.sync 	0; // own threads
	{ARRIVE}
	@%p46 st.shared.b32 [ %r90 + 0 ], %r88;
	bar.sync 	0; // who arrived
	ld.shared.b32 	%r105, [global_smem];
	@%p28 bra 	$L__BB0_6;
	{LOAD}
	@%p46 st.global.b32 [ %rd44 + 0 ], {{ %r129 }};
$L__BB0_6:
	ret;
"""
OWN, WHO = "bar.sync 	0; // own threads", "bar.sync 	0; // who arrived"
MANY = [
    ({}, None),
    ({STORE: ""}, "arrives before its sum is stored"),
    ({STORE: OWN, OWN: STORE}, "arrives without waiting for its own threads"),
    ({STORE: ARRIVE, ARRIVE: STORE}, "arrives before its sum is stored"),
    ({OWN: ""}, "arrives without waiting for its own threads"),
    ({OWN: "bar.warp.sync -1;"}, "arrives without waiting for its own threads"),
    ({OWN: "@%p46 bar.sync 0;"}, "arrives without waiting for its own threads"),
    ({OWN: ARRIVE, ARRIVE: OWN}, "arrives without waiting for its own threads"),
    ({ARRIVE: ""}, "does not arrive once, releasing and acquiring"),
    ({ARRIVE: f"{ARRIVE}\n{ARRIVE}"}, "does not arrive once, releasing and acquiring"),
    ({"acq_rel": "acquire"}, "does not arrive once, releasing and acquiring"),
    ({"acq_rel": "release"}, "does not arrive once, releasing and acquiring"),
    ({"acq_rel": "relaxed"}, "does not arrive once, releasing and acquiring"),
    ({"gpu.acq_rel": "cta.acq_rel"}, "does not arrive once, releasing and acquiring"),
    ({ARRIVE: WHO, WHO: ARRIVE}, "reads the sums without waiting for the thread that arrived"),
    ({WHO: ""}, "reads the sums without waiting for the thread that arrived"),
    ({WHO: "bar.warp.sync -1;"}, "reads the sums without waiting for the thread that arrived"),
    ({WHO: LOAD, LOAD: WHO}, "reads the sums without waiting for the thread that arrived"),
    ({LOAD: ""}, "does not read the sums behind its arrival"),
    ({LOAD: LOAD.replace(".cg", "")}, "does not read the sums behind its arrival"),
    ({LOAD: LOAD + LOAD.replace(".cg", "").replace("@%p29", "\n@%p30")}, "reads through its own cache"),
    ({LOAD: ARRIVE, ARRIVE: LOAD}, "does not read the sums behind its arrival"),
    ({ARRIVE: f"{ARRIVE}\n{STORE}"}, "stores after it has arrived"),
]
ONE_WARP = [
    ({}, None),
    ({OWN: ""}, None),  # the same thread stores and arrives
    ({OWN: "", STORE: STORE.replace("p46", "p45")}, "arrives without waiting for its own threads"),
    ({OWN: "", STORE: STORE.replace("@", "@!")}, "arrives without waiting for its own threads"),
    ({OWN: "bar.warp.sync -1;", WHO: "bar.warp.sync -1;"}, None),
    ({WHO: ""}, "reads the sums without waiting for the thread that arrived"),
]


@pytest.mark.parametrize(
    ("num_warps", "changes", "fault"),
    [(4, *case) for case in MANY] + [(1, *case) for case in ONE_WARP],
)
def test_other_programs_sums_are_read_in_order(num_warps: int, changes: dict[str, str], fault: str | None) -> None:
    ptx = PTX
    for number, old in enumerate(changes):
        assert ptx.count(old) == 1
        ptx = ptx.replace(old, f"<{number}>")
    for number, new in enumerate(changes.values()):
        ptx = ptx.replace(f"<{number}>", new)
    assert disorder(ptx, num_warps) == fault


def test_the_launchers_themselves_say_what_is_compiled() -> None:
    usual, _ = launches()
    assert len({launched.kernel for launched in usual}) == 8
    assert {launched.constants.get("BASELINE") for launched in usual} >= {"none", "constant", "loo", "tensor"}
    sampler = next(each for each in usual if each.kernel == "_squashed_gaussian_fwd_kernel" and "A=6" in each.label)
    variants = {(launched.kernel, variant(launched.constants)) for launched in usual}
    assert len(variants) == 13
    assert variants >= {("_replay_gather_fwd_kernel", "n=3 "), ("_td_loss_fwd_kernel", "discounts ")}
    assert ("_categorical_loss_fwd_kernel", "discounts smallest ") in variants
    limits = {(launched.kernel, launched.options.get("maxnreg")) for launched in usual}
    assert {limit for limit in limits if limit[1]} == {("_categorical_loss_fwd_kernel", 80)}
    assert sampler.signature["mean_ptr"] == "*fp32"
    assert sampler.signature["rng_ptr"] == "*i64"
    assert sampler.constants["BLOCK_A"] == 8
    assert sampler.constants["stride_mean_a"] == 1
    assert not any(launched.options["enable_fp_fusion"] for launched in usual)
    assert set(CHIPS) == {80, 86, 89, 90, 100, 120} > set(CORNER_CHIPS)


def test_corner_cases_are_compiled() -> None:
    usual, rare = launches()
    keys = [(launched.kernel, launched.key) for launched in usual + rare]
    assert len(keys) == len(set(keys))
    assert {launched.label for launched in rare} == set(corners())  # none is there for nothing
    sizes = ("B", "A", "K", "E", "N", "obs_size")
    ones = [{name for name in sizes if launched.constants.get(name) == 1} for launched in rare]
    assert all({name} in ones for name in sizes)
    small = [launched for launched in rare if "large" not in launched.label]
    for kernel, kind in {(launched.kernel, variant(launched.constants)) for launched in usual}:
        of_kind = [launched for launched in small if (launched.kernel, variant(launched.constants)) == (kernel, kind)]
        types = [launched.signature for launched in of_kind]
        assert any("*bf16" in each.values() for each in types), kernel
        if "alpha" in types[0]:
            assert {each["alpha"] for each in types} >= {"fp32", "*fp32"}, kernel
    noise = ("HAS_NOISE", "HAS_POSITIONS")
    takers = [launched for launched in small for name in noise if launched.constants.get(name)]
    assert len({launched.kernel for launched in takers}) == 4  # sampler forward, backward, score function, gather
    assert {launched.constants["N_STEP"] for launched in takers if "N_STEP" in launched.constants} == {1, 3}


def test_whole_updates_are_compiled_for_every_precision_and_estimator() -> None:
    usual, rare = whole_launches()
    assert len({launched.kernel for launched in usual}) == 6
    keys = [(launched.kernel, launched.key) for launched in usual + rare]
    assert len(keys) == len(set(keys))
    for launched in usual + rare:
        assert not launched.options["enable_fp_fusion"]
        assert "atomic" not in launched.kernel
    by_kernel: dict[str, set[Any]] = {}
    for launched in usual:
        by_kernel.setdefault(launched.kernel, set()).add(launched.constants["PRECISION"])
    assert all(precisions == {"ieee", "tf32", "bf16"} for precisions in by_kernel.values())
    baselines = {launched.constants["BASELINE"] for launched in usual + rare if "BASELINE" in launched.constants}
    assert baselines == {"none", "constant", "loo", "value"}
    rows = {launched.constants.get("BLOCK_B") for launched in usual + rare}
    assert rows == {None, 8, 16, 32}
    assert {launched.constants["H2"] for launched in usual + rare} == {64, 192, 256, 512}


def test_what_is_compiled_is_what_triton_looks_up_when_it_launches() -> None:
    for launched in [each for part in (*launches(), *whole_launches()) for each in part]:
        bound: list[tuple[str, Any]] = []
        for place, (name, kind) in enumerate(launched.signature.items()):
            marks = launched.attributes.get((place,))  # none at all for a float
            mark = marks if marks is None else "D" if marks else ""
            bound.append((kind, launched.constants[name] if kind == "constexpr" else mark))
        assert launched.key.startswith(str(bound) + "{")
        assert f"'num_warps': {launched.options['num_warps']}, 'enable_fp_fusion': False" in launched.key
        if "whole_update" in launched.module:
            assert f"'num_stages': {launched.options['num_stages']}" in launched.key


def test_arguments_are_bound_by_triton_itself() -> None:
    found: list[Launch] = []
    storage = torch.zeros(33 * 16 + 1)
    mean, log_std = storage[1:].view(33, 16), storage[:-1].view(33, 16)  # one at an odd address
    with recorded(found.append):
        sample_squashed_gaussian(mean, log_std, PhiloxState(stream=1), 1, "triton")
    (launched,) = found
    names = list(launched.signature)
    marked = {names[place] for (place,), marks in launched.attributes.items() if marks}
    assert marked >= {"log_std_ptr", "stride_mean_b", "stride_noise_k", "action_ptr", "A"}  # 16 divides 16 and 0
    assert not marked & {"mean_ptr", "B", "stride_mean_a"}
    assert launched.constants.items() >= {"stride_mean_a": 1, "stream": 1, "HAS_NOISE": False}.items()
    assert launched.signature["stream"] == "constexpr"
    assert launched.signature["B"] == "i32"


def test_what_has_changed_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compile_kernels", "--if-changed"])
    monkeypatch.setattr(compile_kernels, "RESULT", tmp_path / "result.json")

    class Compiled(Exception):
        """It begins."""

    def launches() -> None:
        raise Compiled

    monkeypatch.setattr(compile_kernels, "launches", launches)
    with pytest.raises(Compiled):
        compile_kernels.main()
    sources = compile_kernels.source_hash()
    compile_kernels.RESULT.write_text(json.dumps(compile_kernels.compiled_of(sources, [])))
    compile_kernels.main()
    monkeypatch.setattr(compile_kernels.triton, "__version__", "another")
    assert compile_kernels.source_hash() != sources
    with pytest.raises(Compiled):
        compile_kernels.main()
    compile_kernels.RESULT.write_text(
        json.dumps(compile_kernels.compiled_of(compile_kernels.source_hash(), ["spills"]))
    )
    with pytest.raises(Compiled):
        compile_kernels.main()
