"""`fastsac lab toy`: every estimator's bias and variance on a problem with known answers (`fastsac.lab.quadratic`).

A second problem adds a ripple, eta sin(omega u), to a quadratic critic in one dimension. The pathwise estimator
differentiates the ripple, so its variance grows with (eta omega)^2; the score function sees its height only. From some
omega on, the order of the two families is reversed (`ripple`).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from fastsac.config import Config
from fastsac.errors import UsageError
from fastsac.estimators import ESTIMATORS, choose
from fastsac.lab.arguments import Toy
from fastsac.lab.arms import Arm, parse_arms
from fastsac.lab.quadratic import MOST, Quadratic, closed_form, every_arm, measure
from fastsac.lab.results import make_directory
from fastsac.lab.watch import tracked
from fastsac.machine import describe_machine, write_json

#: standard errors that one figure may be off by; for many, as many as are equally improbable for the worst of them
SIGMAS = 3.0
#: times as many samples for a figure that is further off: sample variances are skewed, and few of them look too small
AGAIN = 10
CENTRE = {"dimension": 4, "distance": 1.0, "sigma": 0.3}
AXES: dict[str, Sequence[float]] = {"dimension": (1, 4, 16), "distance": (0.3, 1.0, 3.0), "sigma": (0.1, 0.3, 1.0)}
SAMPLES = (1, 2, 4, 8)
#: of the problem with a ripple
HEIGHTS, DISTANCE, SIGMA = (0.03, 0.1, 0.3), 0.5, 0.3
FREQUENCIES = np.geomspace(1.0, 100.0, 81)


def run(options: Toy) -> dict[str, Any]:
    """Measure everything, and write toy.json and two pictures if a directory is given.

    Raises:
        UsageError: if an arm is wrong, or there are too few samples.
    """
    if not 1000 <= options.num_samples <= MOST:
        raise UsageError(f"--num-samples must be from 1000 to {MOST}, got {options.num_samples}")
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if options.seed is None else options.seed
    if seed < 0:
        raise UsageError(f"--seed must be a whole number of at least 0, got {seed}")
    arms = every_arm() if options.arms is None else parse_arms(options.arms)
    words = ["fastsac", "lab", "toy", "--seed", str(seed), "--num-samples", str(options.num_samples)]
    words += ["--arms", *options.arms] if options.arms else []
    if options.out is not None:
        make_directory(options.out)  # before anything slow
    rows = sweep(arms, seed, options.num_samples)
    allowed = judge(rows)
    for index, row in enumerate(rows):
        if not (row["unbiased"] and row.get("agrees", True)):
            rows[index] = _again(row, arms, seed, options.num_samples)
    judge(rows)
    result = {
        **{"command": shlex.join(words), "seed": seed, "machine": describe_machine()},
        **{"allowed_sigmas": allowed, "rows": rows, "ripple": [ripple(height) for height in HEIGHTS]},
    }
    if options.out is not None:
        write_json(options.out / "toy.json", result)
        draw(result, options.out)
    return result


def sweep(arms: Sequence[Arm], seed: int, num_samples: int) -> list[dict[str, Any]]:
    """Return a row for each arm at each point: one axis at a time from the centre, then the action samples K."""
    points = [(axis, value, {**CENTRE, axis: value}) for axis, values in AXES.items() for value in values]
    rows = []
    for arm in tracked(arms, "toy problem"):
        entry = ESTIMATORS[arm.estimator.rpartition(":")[2]]
        for axis, value, point in points:
            rows.append(_row(arm, axis, value, point, seed, num_samples))
        for samples in SAMPLES:
            if samples >= entry.least(arm.choice.baseline) and not (entry.pairs and samples % 2):
                of_samples = arm._replace(num_action_samples=samples)
                rows.append(_row(of_samples, "K", samples, dict(CENTRE), seed, num_samples, arm.label))
    return rows


def _row(
    arm: Arm,
    axis: str,
    value: float,
    point: dict[str, Any],
    seed: int,
    num_samples: int,
    label: str = "",
    noise_seed: int | None = None,
) -> dict[str, Any]:
    problem, choice = Quadratic.random(seed, **point), choose(arm.config(Config()))
    found, gradient = (
        measure(problem, choice, num_samples, seed + 1 if noise_seed is None else noise_seed),
        problem.gradient(),
    )
    known, size = closed_form(problem, choice, arm.estimator.rpartition(":")[2]), gradient.square().sum().item()
    sigmas = ((found.mean - gradient) / found.mean_error.clamp_min(1e-9 * gradient.abs().max())).abs()
    row = {
        **{"arm": label or arm.label, "axis": axis, "value": value, "K": choice.num_action_samples, **point},
        **{"variance": found.trace / size, "bias_sigmas": sigmas.max().item(), "comparisons": len(gradient)},
        "closed_form": None if known is None else known.variance.sum().item() / size,
    }
    if known is not None:
        slack = found.variance_error + 1e-9 * known.variance.max()  # where it is zero
        row["variance_sigmas"] = ((found.variance - known.variance) / slack).abs().max().item()
    return row


def _again(row: dict[str, Any], arms: Sequence[Arm], seed: int, num_samples: int) -> dict[str, Any]:
    """Return a row measured with more samples and other noise."""
    arm = next(each for each in arms if each.label == row["arm"])._replace(num_action_samples=row["K"])
    point = {name: row[name] for name in CENTRE}
    number = min(MOST, AGAIN * num_samples)
    return _row(arm, row["axis"], row["value"], point, seed, number, row["arm"], noise_seed=seed + 2)


def judge(rows: list[dict[str, Any]]) -> float:
    """Mark each row: is it unbiased, does it match the closed form? Return how many standard errors it may be off.

    This is Bonferroni's bound: the worst figure exceeds it as rarely as a single one exceeds `SIGMAS`.
    """
    number = sum(row["comparisons"] * (1 + ("variance_sigmas" in row)) for row in rows)
    allowed = float(stats.norm.isf(stats.norm.sf(SIGMAS) / number))
    for row in rows:
        row["unbiased"] = row["bias_sigmas"] <= allowed
        if "variance_sigmas" in row:
            row["agrees"] = row["variance_sigmas"] <= allowed
    return allowed


def ripple_variances(height: float, frequency: float) -> tuple[float, float]:
    """Return the variances of d mean by pathwise and by the score function with the exact value as its baseline.

    Q(u) = -u^2 / 2 + eta sin(omega u), u = `DISTANCE` + `SIGMA` eps, entropy left out. They are integrals of smooth
    functions over a Gaussian, for which the trapezoidal rule converges faster than any power of the spacing.
    """
    eps = np.linspace(-12.0, 12.0, 40_001)
    weight = np.exp(-0.5 * eps**2)
    weight /= weight.sum()
    u = DISTANCE + SIGMA * eps

    def variance(g: NDArray[np.float64]) -> float:
        return float(weight @ (g - weight @ g) ** 2)

    f = 0.5 * u**2 - height * np.sin(frequency * u)
    pathwise = u - height * frequency * np.cos(frequency * u)
    return variance(pathwise), variance((f - weight @ f) * eps / SIGMA)


def ripple(height: float) -> dict[str, Any]:
    """Return both variances over the frequency omega, and the omega from which pathwise is noisier."""
    both = [ripple_variances(height, frequency) for frequency in FREQUENCIES]
    noisier = [pathwise > score for pathwise, score in both]
    crossing = None
    if True in noisier[1:] and not noisier[0]:
        place = noisier.index(True)

        def ratio(frequency: float) -> float:
            pathwise, score = ripple_variances(height, frequency)
            return float(np.log(pathwise / score))

        crossing = float(optimize.brentq(ratio, FREQUENCIES[place - 1], FREQUENCIES[place]))
    pathwise, score = zip(*both, strict=True)
    return {"height": height, "frequency": FREQUENCIES.tolist(), "pathwise": pathwise, "score": score, "from": crossing}


def table(result: dict[str, Any]) -> str:
    """Return a table in plain text: the results at the centre, and where the order of the families is reversed."""
    rows = [["arm", "K", "noise", "closed form", "bias", "off the closed form"]]
    for row in result["rows"]:
        if row["axis"] == "dimension" and row["value"] == CENTRE["dimension"]:
            known = "-" if row["closed_form"] is None else f"{row['closed_form']:.4g}"
            off = f"{row['variance_sigmas']:.1f} sigmas" if "variance_sigmas" in row else "-"
            bias = f"{row['bias_sigmas']:.1f} sigmas"
            rows.append([row["arm"], str(row["K"]), f"{row['variance']:.4g}", known, bias, off])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    biased = _places(row for row in result["rows"] if not row["unbiased"])
    wrong = _places(row for row in result["rows"] if not row.get("agrees", True))
    lines += [
        "noise: trace of the covariance over the squared norm of the gradient; sigmas: standard errors",
        "at dimension {dimension}, distance {distance:g} from the optimum, sigma {sigma:g}; seed {seed}".format(
            **CENTRE, seed=result["seed"]
        ),
        f"{len(result['rows'])} measurements, threshold {result['allowed_sigmas']:.1f} standard errors: "
        f"biased: {biased or 'none'}; different from the closed form: {wrong or 'none'}",
    ]
    if biased:
        lines.append("a biased estimator's noise says little: if its gradient is too small, its noise is smaller, too")
    deviations = [
        (abs(row["variance"] / row["closed_form"] - 1.0), row) for row in result["rows"] if row["closed_form"]
    ]
    if deviations:
        most, row = max(deviations, key=lambda each: each[0])
        where = f"{row['arm']}, {row['axis']} {row['value']:g}"
        lines.append(f"largest deviation of the noise from a closed form: {100.0 * most:.1f} % ({where})")
    lines.append("with a ripple on the critic, for one fixed one-dimensional problem, by integration:")
    for each in result["ripple"]:
        where = "nowhere up to omega = 100" if each["from"] is None else f"from omega = {each['from']:.3g}"
        lines.append(f"ripple {each['height']:g} sin(omega u): pathwise is noisier {where}")
    return "\n".join(lines)


def _places(rows: Iterable[dict[str, Any]]) -> str:
    """Return ``arm (dimension 1, 4; K 2), ...``."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault(row["arm"], {}).setdefault(row["axis"], []).append(f"{row['value']:g}")
    points = {arm: "; ".join(f"{axis} {', '.join(each)}" for axis, each in axes.items()) for arm, axes in found.items()}
    return ", ".join(f"{arm} ({where})" for arm, where in points.items())


def draw(result: dict[str, Any], directory: Path) -> None:
    """Write toy.png and toy_ripple.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes_names = [*AXES, "K"]
    labels = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    figure, panels = plt.subplots(1, 4, figsize=(15, 5.2), sharey=True, layout="constrained")
    colours = matplotlib.colormaps["tab20"]
    for axes, name in zip(panels, axes_names, strict=True):
        for index, label in enumerate(labels):
            rows = [row for row in result["rows"] if row["arm"] == label and row["axis"] == name]
            known = [row for row in rows if row["closed_form"]]
            look = {"color": colours(index % colours.N)}
            line = "-" if index < colours.N else "--"
            axes.plot([row["value"] for row in known], [row["closed_form"] for row in known], line, **look)
            dots = [row["value"] for row in rows], [row["variance"] for row in rows]
            axes.plot(*dots, marker="os^DvX"[index // 4 % 6], ls="", ms=5, label=label, **look)
        axes.set(xscale="log", yscale="log", xlabel={"K": "action samples K"}.get(name, name))
        axes.set_xticks(sorted({row["value"] for row in result["rows"] if row["axis"] == name}))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("trace of covariance / |gradient|²")
    figure.suptitle("Quadratic critic: measured (marks) and closed form (lines)")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(directory / "toy.png", dpi=130)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for index, each in enumerate(result["ripple"]):
        colour = ("#0072B2", "#D55E00", "#009E73")[index % 3]
        axes.plot(each["frequency"], each["pathwise"], color=colour, label=f"pathwise, η = {each['height']:g}")
        axes.plot(each["frequency"], each["score"], color=colour, ls="--", label=f"score, η = {each['height']:g}")
        if each["from"] is not None:
            axes.plot(each["from"], ripple_variances(each["height"], each["from"])[0], "o", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="frequency ω of the ripple η sin(ωu)", ylabel="variance of d mean")
    axes.set_title("Where the order of the two families is reversed")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(directory / "toy_ripple.png", dpi=130)
    plt.close(figure)
