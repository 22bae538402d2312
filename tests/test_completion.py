"""What a shell offers after <TAB>."""

import os
import shutil
import subprocess
import sys

import pytest

from fastsac.cli import main

TRY = """
source fastsac.bash
try() {
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  _fastsac
  printf '%s|' "${COMPREPLY[@]}"
  echo
}
"""


def written(shell, where, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-write-completion", shell, str(where)])
    assert not stop.value.code
    assert capsys.readouterr() == ("", "")
    return where.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash(tmp_path, capsys):
    offered = {
        "fastsac tr": "train",
        "fastsac train --est": "--estimator",
        "fastsac train --normalize-": "--normalize-obs|--normalize-reward",
        "fastsac train --env-backend gym": "gymnasium|gymnasium-async",
        "fastsac eval --ep": "--episodes",
        "fastsac lab t": "toy",
        "fastsac eval some": "",  # then it offers files
        "fastsac train --num-envs 4": "",
    }
    written("bash", tmp_path / "fastsac.bash", capsys)
    script = TRY + "\n".join(f"try {line}" for line in offered) + "\ncomplete -p fastsac"
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # the script asks python3
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, check=True)
    *lines, registered = done.stdout.splitlines()
    assert dict(zip(offered, [line.rstrip("|") for line in lines], strict=True)) == offered
    assert registered == "complete -o default -F _fastsac fastsac"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell, tmp_path, capsys):
    script = written(shell, tmp_path / "script", capsys)
    (spec,) = (line for line in script.splitlines() if "COMPLETION_SPEC = " in line)
    assert "--estimator" in spec
    assert "\\n" not in spec  # a description of two lines would be offered as two words
    assert "return completions or ['__TYRO_COMPLETE_FILES__']" in script
    with pytest.raises(SystemExit):
        main(["--tyro-print-completion", shell])
    assert capsys.readouterr().out == script


@pytest.mark.parametrize(
    "arguments", [["--tyro-print-completion", "tcsh"], ["--tyro-print-completion"], ["--tyro-write-completion", "zsh"]]
)
def test_what_cannot_be_had_is_told_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.rstrip("\n").endswith("where SHELL is bash, zsh or fish")
