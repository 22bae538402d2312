"""Kernels that are wrong on purpose: the comparisons have to notice."""

from pathlib import Path

import pytest
import torch

from fastsac_kernels import launch
from tests.kernels.parity import CASES, MODULES, Guarded, check, mutate, rows, sampler

#: op, what is in its kernel, what is put in its place
MUTATIONS = [
    ("sampler", "b, A, grad_mean,", "b, A, -grad_mean,"),
    ("sampler", "grad_log_prob * (2.0 *", "grad_log_prob * (1.0 *"),
    ("sampler", "tl.where(live, log_prob, 0.0)", "log_prob"),
    ("sampler", "grad_u * scaled - grad_log_prob", "grad_u * scaled + grad_log_prob"),
    ("sampler", "tl.where(u < 0.0, -action, action)", "action"),
    ("sampler", "grad_action * squashed[1]", "grad_action * squashed[0]"),
    ("pathwise", "alpha * log_prob - lowest, 0.0", "alpha * log_prob + lowest, 0.0"),
    ("pathwise", "tl.where(live, alpha * log_prob", "tl.where(index >= 0, 1.0 + alpha * log_prob"),
    ("pathwise", "alpha * scale, 0.0", "2.0 * alpha * scale, 0.0"),
    ("pathwise", "-scale / ties", "-scale"),
    ("score", "sum_h += f - constant", "sum_h += f + constant"),
    ("score", "score = eps * eps - 1.0", "score = eps * eps - eps"),
    ("score", "alpha * log_prob - lowest", "alpha * log_prob + lowest"),
    ("score", "K * sum_h_mean", "sum_h_mean"),
    ("score", "tl.where(live, log_slope, 0.0)", "log_slope"),
    ("td", "lowest - alpha * log_prob", "lowest + alpha * log_prob"),
    ("td", "terminated != 0, 0.0", "terminated == 7, 0.0"),
    ("td", "2.0 * scale * error", "scale * error"),
    ("td", "tl.where(live, q - target, 0.0)", "q - target + tl.where(live, 0.0, 1.0)"),
    ("td_discounts", "gamma + b * stride_gamma", "gamma + b * 0"),
    ("categorical", "reward + discount * (v_min - bonus)", "reward + discount * (v_min + bonus)"),
    ("categorical", "tl.where(goes_on, discount, 0.0)", "discount"),
    ("categorical", "first + j.to(tl.float32) * step", "first + j.to(tl.float32)"),
    ("categorical", "tl.minimum(place, (M - 1)", "tl.minimum(place, (M - 2)"),
    ("categorical", "* step, 0.0,", "* step, -1.0,"),
    ("categorical", "scale * (p - mass)", "scale * (mass - p)"),
    ("categorical", "(logits - top - tl.log(total))", "(logits - tl.log(total))"),
    (
        "categorical",
        "p = tl.where(j < M, exp(tl.where(j < M, piece - top, 0.0)) * share, 0.0)",
        "p = exp(piece - top) * share",
    ),
    ("categorical", "source_ptr = row_ptr + critic * stride_next_e", "source_ptr = row_ptr"),
    ("categorical_smallest", "(mean < lowest)", "(mean > lowest)"),
    ("categorical_smallest", "_project(row_ptr + chosen", "_project(row_ptr"),
    ("categorical_smallest", "gamma + b * stride_gamma", "gamma + b * 0"),
    ("gather", "slot = first + position", "slot = position"),
    ("gather", "copy_rows(obs_ptr, following", "copy_rows(obs_ptr, index"),
    ("gather", "high.to(tl.int64) * size +", "low.to(tl.int64) * size +"),
    ("gather_n_step", "(ended == 0) & ", ""),
    ("gather_n_step", " & (tl.load(valid_ptr + here, mask=live, other=0) != 0)", ""),
    ("gather_n_step", "going = going & (ended", "going = (ended"),  # goes on behind the end
    ("gather_n_step", "tl.where(index + N >= length, index + N - length, index + N)", "(index + N) % (length - N)"),
    ("gather_n_step", "tl.where(going, discount * gamma, discount)", "discount * gamma"),
    ("gather_n_step", "tl.where(going, discount * reward, 0.0)", "tl.where(going, reward, 0.0)"),
    ("gather_n_step", "tl.load(terminated_ptr + last", "tl.load(terminated_ptr + index"),
    ("gather_n_step", "following = next_row(last", "following = next_row(index"),
    ("gather_n_step", "range(1, N_STEP)", "range(1, N_STEP + 1)"),
]


@pytest.mark.parametrize(("op", "old", "new"), MUTATIONS)
def test_a_wrong_kernel_fails(op: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[op](batch=rows(op, 200))
    check(case)
    mutate(monkeypatch, tmp_path, MODULES[op], old, new)
    with pytest.raises(AssertionError, match="off by"):
        check(case)


def test_a_wrong_backward_scale_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, tmp_path, "scale_triton", "gradient * tl.load(upstream_ptr).to(tl.float32)", "gradient")
    for op in ("pathwise", "score", "td", "categorical"):
        with pytest.raises(AssertionError, match=r"gradient of .*: off by"):
            check(CASES[op]())


def test_a_kernel_that_leaves_something_out_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(
        monkeypatch, tmp_path, "squashed_gaussian_triton", "squashed[2]\n", "squashed[2]\n    in_batch = b < B - 1\n"
    )
    guarded = Guarded()
    monkeypatch.setattr(torch, "empty", guarded)
    sampler().to(torch.float32, "cpu").call("triton")
    with pytest.raises(AssertionError):
        guarded.check()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.sum(partials, 0)", "total"),
        ("mask=index < programs", "mask=index < programs - 1"),
        ("tl.store(ticket_ptr, 0)", "tl.store(ticket_ptr, 1)"),  # the next launch is not summed
    ],
)
def test_a_wrong_sum_over_programs_fails(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_tickets", {})
    monkeypatch.setattr(torch, "empty", Guarded())  # memory taken anew may hold the right result
    mutate(monkeypatch, tmp_path, "scale_triton", old, new, ("pathwise_loss_triton", "td_loss_triton"))
    for op in ("pathwise", "td"):
        case = CASES[op](batch=6000).to(torch.float32, "cpu")
        losses = [case.call("triton")["output 0"] for _ in range(2)]
        expected = case.call("reference")["output 0"]
        assert not all(torch.isclose(loss, expected, rtol=1e-5) for loss in losses)
