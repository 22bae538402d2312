"""Take away from this process what another operating system lacks, and run the command line there.

`python elsewhere.py windows COMMANDS`, where COMMANDS is a JSON list of lists of arguments; one line of JSON is printed
for each: its exit status. This is a simulation: it shows that nothing is used that is not there, and no more.
"""

import contextlib
import errno
import importlib
import json
import os
import pathlib
import signal
import subprocess  # noqa: F401  (which would take the msvcrt below for a real one)
import sys
import types

LACKS = {
    "macos": (("triton",), ("sched_getaffinity",), ()),
    "windows": (
        ("triton", "envpool", "fcntl", "resource", "pwd", "grp", "termios"),
        ("sched_getaffinity", "killpg", "getloadavg", "O_NOFOLLOW", "O_DIRECTORY", "getpgid", "setsid"),
        ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT"),
    ),
}
NO_FILES = ("/proc", "/sys")


def pretend(system: str) -> None:
    """Be that system from now on; before fastsac is imported."""
    modules, of_os, of_signal = LACKS[system]
    if system == "windows":
        _as_windows()
    for name in modules:
        sys.modules[name] = None
    for module, names in ((os, of_os), (signal, of_signal)):
        for name in names:
            delattr(module, name)
    exists, read_text = pathlib.Path.exists, pathlib.Path.read_text

    def read(path, *arguments, **options):
        if str(path).startswith(NO_FILES):
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return read_text(path, *arguments, **options)

    pathlib.Path.exists = lambda path: exists(path) and not str(path).startswith(NO_FILES)
    pathlib.Path.read_text = read


def _as_windows() -> None:
    fcntl, readlink, listdir = importlib.import_module("fcntl"), os.readlink, os.listdir
    rename, unlink, open_, fsync = os.rename, os.unlink, os.open, os.fsync

    def in_use(path):
        """Whether a file at this place, or below it, is open or mapped into memory."""
        place = os.path.realpath(path)
        with open("/proc/self/maps") as maps:
            names = [line.split(maxsplit=5)[5].strip() for line in maps if "/" in line]
        for number in listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that of the listing
                names.append(readlink(f"/proc/self/fd/{number}"))
        return any(name == place or name.startswith(place + "/") for name in names)

    def no_rename(source, target, **options):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "it exists", str(target))
        if in_use(source):
            raise PermissionError(errno.EACCES, "in use", str(source))
        rename(source, target, **options)

    def no_unlink(path, **options):
        if options.get("dir_fd") is None and in_use(path):
            raise PermissionError(errno.EACCES, "in use", str(path))
        unlink(path, **options)

    def no_open(path, flags, *mode, **options):
        if os.path.isdir(path) and options.get("dir_fd") is None and sys._getframe(1).f_code.co_filename != shutil_file:
            raise PermissionError(errno.EACCES, "a directory", str(path))
        return open_(path, flags, *mode, **options)

    def no_fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not writable")
        fsync(descriptor)

    def locking(descriptor, mode, number):
        assert mode == 2
        assert number == 1
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 2**20  # else its text could not be read
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "locked") from None

    shutil_file = importlib.import_module("shutil").__file__
    os.rename, os.unlink, os.remove, os.open, os.fsync = no_rename, no_unlink, no_unlink, no_open, no_fsync
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)


def main() -> None:
    pretend(sys.argv[1])
    from fastsac.cli import main as fastsac

    for command in json.loads(sys.argv[2]):
        try:
            fastsac(command)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        print(json.dumps({"status": status}), flush=True)
    import torch

    from fastsac_kernels import sample_squashed_gaussian

    try:
        sample_squashed_gaussian(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 2, 3), backend="triton")
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main()
