"""Checkpoints: a directory of safetensors files, one JSON file and a manifest of their hashes. Never pickle.

A checkpoint is written under a temporary name and then renamed. The one it replaces is kept as ``.<name>.replaced``
until the new one is in place; `load_checkpoint` and `latest_checkpoint` find it there if the writer dies in between.
Files that do not change from one checkpoint to the next are hard links, so each checkpoint is complete by itself.

Checkpoints may come from untrusted sources: every file must be a regular file inside its directory with the size in the
manifest, and nothing is parsed before its hash has been checked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsac.errors import FastsacError
from fastsac.run_dir import CHECKPOINTS, STEP, parse_json, temporary_sibling
from fastsac.system import WINDOWS

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
BEST = "best"
#: maximum bytes of JSON; ours never reach a hundredth of it
LONGEST_JSON = 64 * 2**20
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_FILE = re.compile(rf"{_GROUP.pattern}\.safetensors|state\.json")
_TEMPORARY = re.compile(r"\..+\.tmp-.*-[0-9]{1,9}-[0-9a-f]{8}")
_BAD_JSON = (KeyError, TypeError, AttributeError, ValueError, RecursionError)
_T = TypeVar("_T")


def save_checkpoint(
    directory: Path,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    unchanged: Collection[str] = (),
    before: Path | None = None,
) -> None:
    """Write `<group>.safetensors` for each group, `state` as JSON and the manifest, atomically and durably.

    An existing checkpoint at `directory` is replaced; after any failure it is unchanged. Tensors may be on any
    device, strided or share storage; they are copied only if needed. `state` is plain JSON with finite numbers.
    The groups in `unchanged` are linked from the checkpoint at `before`.

    Raises:
        FastsacError: if writing fails, `state` is not such JSON, or `directory` contains anything but a checkpoint.
        ValueError: if the format does not allow the name of a group or a tensor.
    """
    target = Path(os.path.realpath(directory))
    if bad := [group for group in groups if not _GROUP.fullmatch(group)]:
        raise ValueError(f"a group name must consist of letters, digits, '_' and '-', got {bad[0]!r}")
    with _reported(f"cannot save the checkpoint {target}: its state is not JSON", *_BAD_JSON):
        encoded = json.dumps(dict(state)).encode()
        parse_json(encoded)  # never write what could not be read back
    temporary = temporary_sibling(target)
    try:
        with _reported(f"cannot save the checkpoint {target}", OSError, SafetensorError):
            _refuse_to_destroy(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            (temporary / STATE).write_bytes(encoded)
            for group, tensors in groups.items():
                path = temporary / f"{group}.safetensors"
                save_file(_packed(tensors), path)
                path.chmod(temporary.stat().st_mode & 0o666)  # safetensors leaves 0600, whatever the umask
            files = {}
            for path in list(temporary.iterdir()):
                _fsync(path)
                files[path.name] = {"sha256": _sha256(path), "size": path.stat().st_size}
            if before is not None:
                files |= _take_over(before, unchanged, temporary)
            (temporary / MANIFEST).write_bytes(_manifest_bytes({"format": FORMAT, "files": files}))
            _fsync(temporary / MANIFEST)
            _fsync(temporary)
            _swap_in(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_over(before: Path, groups: Collection[str], temporary: Path) -> dict[str, dict[str, Any]]:
    """Link an older checkpoint's files, or copy them if links are not supported; return their manifest entries."""
    hashes = _read_manifest(before, groups)
    entries = {}
    for name in (f"{group}.safetensors" for group in groups):
        try:
            os.link(before / name, temporary / name)
        except OSError:
            shutil.copyfile(before / name, temporary / name)
            _fsync(temporary / name)
        entries[name] = {"sha256": hashes[name], "size": (temporary / name).stat().st_size}
    return entries


def load_checkpoint(
    directory: Path, device: str | torch.device = "cpu", groups: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors of `groups` (default: all) on `device`, and the state, after checking every hash.

    Files of other groups are neither read nor required. The tensors own their memory.

    Raises:
        FastsacError: if there is no checkpoint, it lacks a group, or a file is missing, damaged or unreadable.
    """

    def read(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        for name, sha256 in (hashes := _read_manifest(place, groups)).items():
            if _sha256(place / name) != sha256:
                damage = f"{place / name} is damaged: SHA-256 differs from the manifest" + _older_instead(place)
                if name.startswith("replay"):
                    damage += "; --no-checkpoint-replay continues without the replay buffer"
                raise FastsacError(damage)
        with _reported(f"{place / STATE} is damaged", *_BAD_JSON):
            state = parse_json(_read_json(place / STATE))
        paths = [place / name for name in hashes if name != STATE]
        return {path.stem: _load_tensors(path, device) for path in paths}, state

    return _settled(Path(os.path.realpath(directory)), read)


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the newest `run_dir/checkpoints/step-*`, if all its files are complete (`load_checkpoint` checks hashes).

    Raises:
        FastsacError: if there is none, or it is damaged; the message says which one could be used instead.
    """
    directories = _step_directories(run_dir)
    if not directories:
        raise FastsacError(f"no checkpoint: looked for {run_dir}/checkpoints/step-*/{MANIFEST}")
    if wrong := problem(directories[0]):
        raise FastsacError(wrong + _older_instead(directories[0]))
    return directories[0]


def groups_of(directory: Path) -> list[str]:
    """Return the names of the checkpoint's groups.

    Raises:
        FastsacError: if there is no checkpoint, or a file is missing or has the wrong size.
    """
    files = _settled(Path(os.path.realpath(directory)), _read_manifest)
    return [name.removesuffix(".safetensors") for name in files if name != STATE]


def identity(directory: Path) -> str:
    """Return a hash that identifies this checkpoint, or an empty string if there is none."""
    with suppress(OSError):
        return _sha256(directory / MANIFEST)
    return ""


def tensor_shapes(directory: Path, group: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a group's tensors without loading them, after checking the file's hash.

    Raises:
        FastsacError: if there is no such group, or its file is missing, damaged or unreadable.
    """

    def read(place: Path) -> dict[str, tuple[int, ...]]:
        path = place / f"{group}.safetensors"
        hashes = _read_manifest(place, [group])
        if _sha256(path) != hashes[path.name]:
            raise FastsacError(f"{path} is damaged: SHA-256 differs from the manifest" + _older_instead(place))
        with _reported(f"{path} is damaged", *_BAD_JSON):
            return {name: tuple(entry["shape"]) for name, entry in _read_header(path).items()}

    return _settled(Path(os.path.realpath(directory)), read)


def step_directory(run_dir: Path, step: int) -> Path:
    """Return `run_dir/checkpoints/step-<12 digits>`."""
    return run_dir / CHECKPOINTS / f"step-{step:012d}"


def best_checkpoint(run_dir: Path) -> Path:
    """Return the path of the checkpoint with the highest evaluation."""
    return run_dir / CHECKPOINTS / BEST


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints that are older than the `keep` (at least 1) newest complete ones.

    Raises:
        FastsacError: if something cannot be removed.
    """
    directories = _step_directories(run_dir)
    kept = [directory for directory in directories if not problem(directory)][: max(keep, 1)]
    older = directories[directories.index(kept[-1]) + 1 :] if len(kept) == max(keep, 1) else []
    with _reported(f"cannot prune {run_dir}/checkpoints", OSError):
        for directory in older:
            _discard(_replaced(directory))
            _discard(directory)


def remove_temporaries(run_dir: Path) -> None:
    """Remove temporary files of dead writers, if possible. No other process may be writing to the run directory."""
    for parent in (run_dir, run_dir / CHECKPOINTS):
        for entry in list(parent.iterdir()) if parent.is_dir() else []:
            if _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _older_instead(damaged: Path) -> str:
    """Return an addition to an error about a damaged `step-*`: which older one could be used, if any."""
    directories = _step_directories(damaged.parent.parent)
    place = directories.index(damaged) if damaged in directories else len(directories)
    for older in directories[place + 1 :]:
        with suppress(FastsacError, OSError):  # checkpoints share replay blocks: a damaged block affects all of them
            if not problem(older) and all(_sha256(older / name) == sha for name, sha in _read_manifest(older).items()):
                return f"; {older.name} is complete: remove {damaged} to use it"
    return ""


@contextmanager
def _reported(what: str, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise FastsacError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _step_directories(run_dir: Path) -> list[Path]:
    """Return all checkpoints, newest first, complete or not, under their final names."""
    parent = run_dir / CHECKPOINTS
    with _reported(f"cannot read {parent}", OSError):
        entries = os.listdir(parent) if parent.exists() else []
    names = {name[1:].removesuffix(".replaced") if name.endswith(".replaced") else name for name in entries}
    steps = {name: int(match[1]) for name in names if (match := STEP.fullmatch(name))}
    return [parent / name for name in sorted(steps, key=lambda name: (steps[name], name), reverse=True)]


def _replaced(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def _place(directory: Path) -> tuple[Path, int, int]:
    """Return where the checkpoint is now, and numbers that distinguish it from its replacement."""
    for place in (directory, _replaced(directory)):
        with suppress(OSError):
            found = (place / MANIFEST).stat()
            return place, found.st_ino, found.st_mtime_ns
    return directory, 0, 0


def _settled(directory: Path, read: Callable[[Path], _T]) -> _T:
    """Read the checkpoint, and read it again if a writer replaced it in the meantime."""
    while True:
        place = _place(directory)
        try:
            with _reported(f"cannot read the checkpoint {place[0]}", OSError):
                result = read(place[0])
        except FastsacError:
            if _place(directory) == place:
                raise
        else:
            if _place(directory) == place:
                return result


def problem(directory: Path) -> str:
    """Return what is wrong with the checkpoint, or an empty string; hashes are not checked."""
    if linked := [path for path in (directory.parent, directory) if path.is_symlink()]:
        return f"{linked[0]} is a symbolic link, but checkpoints are only read from their own directory"
    try:
        _settled(directory, _read_manifest)
    except FastsacError as error:
        return str(error)
    return ""


def _discard(path: Path) -> None:
    """Rename a directory, then remove it, so that a partly removed one never looks like a checkpoint."""
    if path.exists():
        trash = temporary_sibling(path)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _refuse_to_destroy(target: Path) -> None:
    names = sorted(os.listdir(target)) if target.exists() else []
    foreign = [name for name in names if name != MANIFEST and not (_FILE.fullmatch(name) and MANIFEST in names)]
    if foreign:
        what = f"it contains {foreign[0]!r} and is not a checkpoint"
        raise FastsacError(f"cannot save the checkpoint {target}: {what}; choose another directory")


def _swap_in(temporary: Path, target: Path) -> None:
    old = _replaced(target)
    replaces = (target / MANIFEST).exists()
    if replaces:
        _discard(old)
    try:
        if replaces:
            os.rename(target, old)
        elif WINDOWS and target.exists():  # an empty directory, which other systems replace directly
            target.rmdir()
        os.rename(temporary, target)
        _fsync(target.parent)
    except BaseException:
        if old.exists() or not replaces:
            if (target / MANIFEST).exists():
                os.rename(target, temporary)
            if replaces:
                os.rename(old, target)
        raise
    with suppress(OSError):
        _discard(old)


def _fsync(path: Path) -> None:
    if WINDOWS and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors without shared memory, copied only if needed: a replay buffer has gigabytes."""
    if "__metadata__" in tensors:
        raise ValueError("safetensors reserves the name '__metadata__'")
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name, tensor in sorted(packed.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            packed[name] = tensor.clone()
        else:
            end = tensor.data_ptr() + tensor.nbytes
    return packed


def _load_tensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    with _reported(f"{path} is damaged", SafetensorError, *_BAD_JSON):
        _read_header(path)
        with safe_open(path, framework="pt") as file:
            # safetensors maps the file: copied, the tensors outlive it and do not share one storage
            return {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118


def _read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, which must name each tensor once."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(path.stat().st_size - 8, LONGEST_JSON):
            raise ValueError(f"its header has an impossible length of {length} bytes")
        return parse_json(file.read(length))


def _read_json(path: Path) -> bytes:
    if (size := path.stat().st_size) > LONGEST_JSON:
        raise ValueError(f"{size} bytes are too many")
    return path.read_bytes()


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"


def _read_manifest(place: Path, groups: Collection[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of each file of `groups` and of the state, after checking that they exist in full size."""
    path = place / MANIFEST
    if not _is_plain(path):
        raise FastsacError(f"there is no checkpoint at {place}: {MANIFEST} is missing")
    with _reported(f"{path} is damaged", *_BAD_JSON):
        encoded = _read_json(path)
        manifest = parse_json(encoded)
        if type(version := manifest["format"]) is int and version != FORMAT:
            raise FastsacError(f"{path} has format {version}, but this version of fastsac reads format {FORMAT}")
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if not all(_FILE.fullmatch(name) for name in files):  # such as "../x"
            raise ValueError("it names files that do not belong to a checkpoint")
        ours = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()}
        if _manifest_bytes({"format": FORMAT, "files": ours}) != encoded:  # it has no hash of its own
            raise ValueError("fastsac did not write it in this form")
    wanted = list(files) if groups is None else [f"{group}.safetensors" for group in groups]
    for name in dict.fromkeys([*wanted, STATE]):
        if name not in files:
            raise FastsacError(f"the checkpoint {place} has no {name}, only {', '.join(sorted(files)) or 'a manifest'}")
        if not (place / name).exists():
            raise FastsacError(f"{place / name} is missing")
        if not _is_plain(place / name):
            raise FastsacError(f"{place / name} is damaged: it is not a regular file")
        if (size := (place / name).stat().st_size) != files[name][0]:
            raise FastsacError(f"{place / name} is damaged: it has {size} bytes, not {files[name][0]!r}")
    return {name: files[name][1] for name in dict.fromkeys([*wanted, STATE])}


def _is_plain(path: Path) -> bool:
    """Whether it is a regular file: a symbolic link could lead anywhere, and a device never ends."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False
