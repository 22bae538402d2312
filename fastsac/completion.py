"""Shell completion: the script that tyro writes, with two of its bugs fixed."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastsac.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
#: tyro's options, and what each takes
OPTIONS = {"--tyro-print-completion": ("SHELL",), "--tyro-write-completion": ("SHELL", "FILE")}

#: if tyro has no suggestion, bash completes file names: `fastsac eval runs/...`
BASH_FILES = """
_fastsac() {
  _tyro_fastsac
  [[ -n "${COMPREPLY[*]}" ]] || COMPREPLY=()
}
complete -o default -F _fastsac fastsac
"""


def complete(arguments: Sequence[str], cli: Callable[[Sequence[str]], Any]) -> bool:
    """Print or write the completion script if the arguments request it, and return whether they do.

    Args:
        arguments: the command-line arguments.
        cli: tyro's command line, which prints the script.

    Raises:
        UsageError: if the shell or the output file is missing.
    """
    option = arguments[0].replace("_", "-") if arguments else ""
    if option not in OPTIONS:
        return False
    if len(arguments) != 1 + len(OPTIONS[option]) or arguments[1] not in SHELLS:
        raise UsageError(
            f"{option} takes {' '.join(OPTIONS[option])}, where SHELL is {', '.join(SHELLS[:-1])} or {SHELLS[-1]}"
        )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli(["--tyro-print-completion", arguments[1]])
    script = _mend(printed.getvalue())
    if arguments[1] == "bash":
        script += BASH_FILES
    if len(arguments) == 3 and arguments[2] != "-":
        Path(arguments[2]).write_text(script, encoding="utf-8")
    else:
        print(script, end="")
    return True


def _mend(script: str) -> str:
    """Put each description on one line, since each line is offered, and offer files if nothing else fits."""
    script = re.sub("^.*COMPLETION_SPEC = .*$", lambda line: re.sub(r"\\+n", " ", line[0]), script, flags=re.MULTILINE)
    end = "    return completions\n\n\ndef main"
    return script.replace(end, end.replace("completions", "completions or ['__TYRO_COMPLETE_FILES__']"))
