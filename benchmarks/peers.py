"""Times fastsac against Stable-Baselines3 and SBX on this machine, in one interleaved run.

    python -m benchmarks.peers --peer-python PYTHON --out FILE.json

PYTHON is the interpreter of an environment with stable-baselines3 and sbx-rl; fastsac runs under the current one. Every
contender has its own process (`benchmarks.peer_worker`); they take turns, block by block, and only one is busy at a
time, so that a noisy machine affects all of them equally. Ratios are taken within a round, then their median. Exit
status: 0, 1 if a contender failed (the file is still written), 2 on a usage error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np

from benchmarks import peer_worker
from benchmarks.machine import busy_cpu_seconds, describe_machine, load_average, write_json

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
TIMEOUT_S = 900.0  # for one request, start-up with its compilations included
UNITS = {"update_1": "ms/update", "update_16": "ms/update", "learn_16": "steps/s", "learn_1": "steps/s"}
MEANING = {
    "update_1": "ms per gradient update, one update a call",
    "update_16": "ms per gradient update, 16 updates a call",
    "learn_16": "environment steps/s end to end, 16 environments, one update per environment step",
    "learn_1": "environment steps/s end to end, 1 environment, one update per environment step",
    "speed_relative_to_sb3": "within one round; above 1 is faster than Stable-Baselines3, for both units",
}


class Contender:
    """One contender's process and what was measured of it. After an error it is asked nothing more."""

    def __init__(self, name: str, python: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.samples: dict[str, list[float]] = {kind: [] for kind in UNITS}
        self.others: dict[str, list[float]] = {kind: [] for kind in UNITS}  # cores that other processes used meanwhile
        self.updates = {kind: {"done": 0, "expected": 0} for kind in UNITS}
        self.about: dict[str, Any] = {}
        self.error: str | None = None
        environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", JAX_PLATFORMS="cpu")
        environment.pop("OMP_NUM_THREADS", None)  # the number of threads is each contender's own choice
        folder.mkdir()  # a throw-away working directory: MuJoCo and loggers write files where they stand
        with (folder / "stderr").open("wb") as stderr:
            command = [python, "-m", "benchmarks.peer_worker"]
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=stderr, cwd=folder, env=environment)

    def measure(self, kind: str, amount: int) -> None:
        """One block: `amount` updates or environment steps."""
        what, size = kind.split("_")
        fields = ("per_call", "updates") if what == "update" else ("num_envs", "steps")
        busy_before, wall_before = busy_cpu_seconds(), time.perf_counter()
        reply = self.ask(do=what, **dict(zip(fields, (int(size), amount), strict=True)))
        busy, wall = busy_cpu_seconds() - busy_before, time.perf_counter() - wall_before
        if reply is None:
            return
        seconds, done, steps = reply["seconds"], reply["updates"], reply.get("steps", amount)
        if not (done and steps):
            return self.fail(f"{kind}: a block of {amount} did {done} updates and {steps} steps")
        self.samples[kind].append(1e3 * seconds / done if what == "update" else steps / seconds)
        self.others[kind].append(round(max(0.0, busy - reply["cpu_s"]) / wall, 3))
        self.updates[kind]["done"] += done
        self.updates[kind]["expected"] += steps
        self.about["idle_cpu_s"] = reply["idle_cpu_s"]

    def ask(self, **request: Any) -> dict[str, Any] | None:
        """The worker's reply, or None once this contender has failed."""
        if self.error:
            return None
        try:
            return self._exchange(request)
        except (OSError, RuntimeError) as error:
            self.fail(str(error))
            return None

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        requests, replies = self.process.stdin, self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # a process that is gone shows below, by an empty line
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
        if not select.select([replies], [], [], TIMEOUT_S)[0]:
            raise RuntimeError(f"no answer to {request['do']!r} within {TIMEOUT_S:.0f} s")
        line = replies.readline()
        if not line:
            printed = (self.folder / "stderr").read_text(errors="replace").strip() or "nothing on stderr"
            raise RuntimeError(f"process ended with status {self.process.wait()}: {printed.splitlines()[-1]}")
        reply: dict[str, Any] = json.loads(line)
        if not reply.pop("ok"):
            raise RuntimeError(reply["error"])
        return reply

    def fail(self, reason: str) -> None:
        self.error = peer_worker.without_paths(reason)
        self.close()
        print(f"error: {self.name}: {self.error}", file=sys.stderr)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def did_as_asked(self, kind: str) -> bool:
        """Whether it made the updates asked for, or one per step. Resets may shift a few between blocks: 2 %."""
        return abs(self.updates[kind]["done"] / self.updates[kind]["expected"] - 1) < 0.02

    def result(self, reference: Contender) -> dict[str, Any]:
        measured = {kind: values for kind, values in self.samples.items() if values}
        return {
            "error": self.error,
            **self.about,
            "samples": measured,
            "summary": {kind: quantiles(values) for kind, values in measured.items()},
            "speed_relative_to_sb3": {kind: relative_speed(self, reference, kind) for kind in measured},
            "cores_used_by_others": {kind: self.others[kind] for kind in measured},
            "updates": {kind: self.updates[kind] | {"as_asked": self.did_as_asked(kind)} for kind in measured},
        }


def quantiles(values: list[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": round(float(median), 4), "p20": round(float(p20), 4), "p80": round(float(p80), 4)}


def relative_speed(contender: Contender, reference: Contender, kind: str) -> dict[str, Any] | None:
    """How many times as fast as the reference, round by round; None where the reference has no sample."""
    pairs = zip(contender.samples[kind], reference.samples[kind], strict=False)  # a failed one has fewer
    ratios = [theirs / ours if UNITS[kind] == "ms/update" else ours / theirs for ours, theirs in pairs]
    return {"per_round": [round(ratio, 4) for ratio in ratios], **quantiles(ratios)} if ratios else None


def block_sizes(rounds: int, updates: int, steps: int) -> dict[str, int]:
    """Updates or environment steps of a block of each kind, in whole calls; the rounds share `steps` out."""
    sizes = {kind: updates if kind.startswith("update") else round(steps / rounds) for kind in UNITS}
    return {k: 16 * max(1, round(n / 16)) if k.endswith("_16") else max(1, n) for k, n in sizes.items()}


def run_rounds(contenders: list[Contender], rounds: int, sizes: dict[str, int]) -> None:
    """All blocks; each kind goes round the contenders, starting with another one every round."""
    for number in range(rounds):
        turn = contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
        for kind, amount in sizes.items():
            for contender in turn:
                contender.measure(kind, amount)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)


def print_table(contenders: list[Contender]) -> None:
    """Medians and, in brackets, speed relative to Stable-Baselines3."""
    for row in (UNITS.keys(), UNITS.values()):
        print(f"{'':24}" + "".join(f"{text:>18}" for text in row))
    for contender in contenders:
        cells = []
        for kind in UNITS:
            ratio, values = relative_speed(contender, contenders[0], kind), contender.samples[kind]
            factor = f" ({ratio['median']:.2f}x)" if ratio else ""
            cells.append(f"{np.median(values):.2f}{factor}" if values else "-")
        print(f"{contender.name:24}" + "".join(f"{cell:>18}" for cell in cells))
        wrong = [kind for kind in UNITS if contender.samples[kind] and not contender.did_as_asked(kind)]
        print(f"  warning: not the updates that were asked for: {', '.join(wrong)}\n" if wrong else "", end="")
        print(f"  error: {contender.error}\n" if contender.error else "", end="")
    others = [cores for contender in contenders for kind in UNITS for cores in contender.others[kind]]
    if others and np.mean(others) > 0.1:
        print(f"warning: other processes used {np.mean(others):.2f} cores meanwhile: measure on a quiet machine")


def positive(text: str) -> int:
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer-python", required=True, help="interpreter that has stable-baselines3 and sbx-rl")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    for name, default, text in (
        ("--rounds", 7, "blocks of each kind"),
        ("--updates", 60, "gradient updates a block"),
        ("--e2e-steps", 3000, "environment steps end to end, over all rounds"),
    ):
        parser.add_argument(name, type=positive, default=default, help=f"{text} (default {default})")
    parser.add_argument("--env-id", default="HalfCheetah-v5", help="Gymnasium and EnvPool id (default HalfCheetah-v5)")
    arguments = parser.parse_args()
    if shutil.which(arguments.peer_python) is None:
        parser.error(f"--peer-python: no such program: {arguments.peer_python}")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out: no such folder: {arguments.out.parent}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    machine = describe_machine()  # before the load that this run makes itself
    sizes = block_sizes(arguments.rounds, arguments.updates, arguments.e2e_steps)
    contenders = compete(arguments, sizes)
    options = f"--rounds {arguments.rounds} --updates {arguments.updates} --e2e-steps {arguments.e2e_steps}"
    result = {
        # Without the paths that were given: they say nothing outside this machine.
        "command": f"python -m benchmarks.peers --peer-python PYTHON --out FILE {options} --env-id {arguments.env_id}",
        "machine": machine | {"load_average_at_end": load_average()},
        "settings": {"env_id": arguments.env_id, "seed": SEED, "rounds": arguments.rounds, "block_sizes": sizes}
        | peer_worker.SETTINGS,
        "meaning": MEANING,
        "contenders": {contender.name: contender.result(contenders[0]) for contender in contenders},
    }
    write_json(arguments.out, result)
    print_table(contenders)
    return 1 if any(contender.error for contender in contenders) else 0


def compete(arguments: argparse.Namespace, sizes: dict[str, int]) -> list[Contender]:
    """Start every contender, let them take turns, and end them whatever happens."""
    peer_python = str(Path(shutil.which(arguments.peer_python) or "").absolute())
    with tempfile.TemporaryDirectory() as folder:
        contenders = [
            Contender(name, peer_python if name in ("sb3", "sbx") else sys.executable, Path(folder) / name)
            for name in peer_worker.CONTENDERS
        ]
        try:
            for contender in contenders:  # one after the other: thread counts are measured here
                request = {"do": "start", "contender": contender.name, "env_id": arguments.env_id, "seed": SEED}
                contender.about |= contender.ask(**request) or {}
                print(f"{contender.name}: threads {contender.about.get('threads')}", file=sys.stderr)
            run_rounds(contenders, arguments.rounds, sizes)
            for contender in contenders:
                contender.about |= contender.ask(do="finish") or {}
        finally:
            for contender in contenders:
                contender.close()
    return contenders


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"error: {type(error).__name__}: {error}")  # on stderr, with status 1
