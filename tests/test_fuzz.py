"""Any command line is run or refused with one line; there is never a traceback."""

import contextlib
import dataclasses
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsac import Config
from fastsac.cli import main

FIELDS = {field.name.replace("_", "-"): getattr(Config(), field.name) for field in dataclasses.fields(Config)}
OPTIONS = [
    *FIELDS,
    "run-dir",
    "resume",
    "preset",
    "callback",
    "restarts",
    "step-timeout",
    "episodes",
    "best",
    "json",
    "video",
    "no-best",
]

words = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats(allow_subnormal=False).map(str),
    st.sampled_from(
        [
            "auto",
            "none",
            "None",
            "score",
            "pathwise",
            "loo",
            "value",
            "cpu",
            "cuda",
            "bf16",
            "true",
            "--",
            "-",
            "sac",
            "{}",
        ]
    ),
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)
options = st.sampled_from(OPTIONS).map(lambda name: f"--{name}") | st.text(max_size=6).map(lambda name: f"--{name}")
arguments = st.lists(
    st.tuples(options, words).map(list) | options.map(lambda option: [option]) | words.map(lambda word: [word]),
    max_size=4,
).map(lambda lists: [word for words in lists for word in words])


class Started(Exception):
    """The command line was understood."""


@pytest.fixture(scope="module", autouse=True)
def _no_training(tmp_path_factory):
    def start(*_, **__):
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setattr("fastsac.train_command._train_here", start)
        patch.setattr("fastsac.train_command.Supervisor", start)
        patch.setattr("fastsac.train.SAC.load", start)
        yield


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["train", "eval", "presets", "tra"]), arguments)
def test_any_command_line_is_understood_or_refused_in_one_line(command, rest):
    if "--help" in rest or "-h" in rest:
        return
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([command, *rest])
            status = 0
        except Started:
            return
        except SystemExit as stop:
            status = stop.code
    if status:
        assert status in (1, 2)
        assert err.getvalue().startswith("fastsac: ")
        assert err.getvalue().count("\n") == 1, err.getvalue()
