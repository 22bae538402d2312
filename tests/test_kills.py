"""Runs that are killed with SIGKILL at random moments and resumed end as the run that was left alone."""

import pytest

from benchmarks.kills import INTERVAL, torment


def check(result, kills):
    assert result["whole_after_kill"] == kills
    assert all(result["equal_to_the_run_left_alone"].values()), result
    assert result["temporary_files_at_the_end"] == 0
    assert result["steps_lost"]["most"] <= 2 * INTERVAL  # an interval, and what came while a checkpoint was written


@pytest.mark.slow
def test_one_kill(tmp_path):
    check(torment(1, 3, tmp_path, ["--estimator", "score"]), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "settings"),
    [(0, ["--estimator", "pathwise"]), (1, ["--estimator", "score"]), (2, ["--engine", "reference"])],
)
def test_sixty_kills(tmp_path, seed, settings):
    check(torment(20, seed, tmp_path, settings), 20)
