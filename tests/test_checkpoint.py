import ast
import errno
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastsac.checkpoint as checkpoint
from fastsac.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    remove_temporaries,
    save_checkpoint,
    step_directory,
)
from fastsac.errors import FastsacError

STATE = {
    "step": 20_000,
    "random": {"state": 2**127 + 1},
    "name": "naïve \ud800",
    "rate": 3e-4,
    "none": None,
    "list": [1],
}


def learner(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 2), value), "log_alpha": torch.tensor(-value)}


def save(directory: Path, value: float = 1.0) -> None:
    groups = {"learner": learner(value), "replay": {"obs": torch.full((5,), value)}}
    save_checkpoint(directory, groups, {"value": value})


def loaded_value(directory: Path) -> float:
    """The value that `save` was given; fails if the files come from different saves."""
    groups, state = load_checkpoint(directory)
    values = {state["value"], groups["learner"]["weight"][0, 0].item(), groups["replay"]["obs"][4].item()}
    assert len(values) == 1
    return values.pop()


def refusal(directory: Path, **kwargs: object) -> str:
    with pytest.raises(FastsacError) as caught:
        load_checkpoint(directory, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(directory: Path, name: str, content: bytes) -> None:
    """Replaces one file and makes the manifest agree with it."""
    (directory / name).write_bytes(content)
    manifest = json.loads((directory / "manifest.json").read_bytes())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (directory / "manifest.json").write_bytes(checkpoint._manifest_bytes(manifest))


def rubbish(parent: Path) -> list[str]:
    return [name for name in os.listdir(parent) if ".tmp-" in name or ".replaced" in name]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_every_dtype_and_shape_returns_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"scalar": (), "vector": (7,), "matrix": (3, 5), "empty": (0, 4)}
    tensors = {name: (torch.randn(shape) * 50).to(dtype) for name, shape in shapes.items()}
    save_checkpoint(tmp_path / "c", {"g": tensors}, STATE)
    groups, state = load_checkpoint(tmp_path / "c")
    assert state == STATE
    assert groups.keys() == {"g"}
    assert groups["g"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert groups["g"][name].dtype == dtype
        torch.testing.assert_close(groups["g"][name], tensor, rtol=0, atol=0)


def test_strided_shared_overlapping_and_trained_tensors(tmp_path: Path) -> None:
    flat = torch.arange(24.0)
    tensors = {
        "whole": flat,
        "again": flat,
        "head": flat[:6].view(2, 3),
        "tail": flat[20:],
        "overlaps_tail": flat[18:22],
        "empty": flat[6:6],
        "transposed": flat.view(4, 6).T,
        "step": flat[::5],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    save_checkpoint(tmp_path / "c", {"g": tensors}, {})
    groups, _ = load_checkpoint(tmp_path / "c")
    assert groups["g"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(groups["g"][name], tensor), name
        assert not groups["g"][name].requires_grad


def test_only_overlapping_or_strided_tensors_are_copied() -> None:
    flat = torch.arange(20.0)
    tensors = {"first": flat[:10], "second": flat[10:], "within": flat[2:4], "strided": flat[::2]}
    packed = checkpoint._packed(tensors)
    kept = {name for name in tensors if packed[name].data_ptr() == tensors[name].data_ptr()}
    assert kept == {"first", "second"}


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    save(tmp_path / "c")
    groups, _ = load_checkpoint(tmp_path / "c")
    with (tmp_path / "c/learner.safetensors").open("r+b") as file:  # in place: a mapped tensor would change
        file.write(b"\xff" * (tmp_path / "c/learner.safetensors").stat().st_size)
    assert torch.equal(groups["learner"]["weight"], learner()["weight"])
    assert torch.equal(groups["learner"]["log_alpha"], learner()["log_alpha"])


@pytest.mark.gpu
def test_cuda_tensors_go_to_and_from_the_device(tmp_path: Path) -> None:
    tensor = torch.arange(12.0, device="cuda").view(3, 4)
    save_checkpoint(tmp_path / "c", {"g": {"a": tensor, "b": tensor.T, "c": tensor[1]}}, {})
    groups, _ = load_checkpoint(tmp_path / "c", device=torch.device("cuda", 0))
    assert groups["g"]["b"].is_cuda
    assert torch.equal(groups["g"]["a"], tensor)
    assert torch.equal(groups["g"]["b"], tensor.T)
    assert torch.equal(groups["g"]["c"], tensor[1])


def test_groups_pick_what_is_read_and_the_rest_may_even_be_gone(tmp_path: Path) -> None:
    save(tmp_path / "c")
    (tmp_path / "c/replay.safetensors").unlink()
    groups, state = load_checkpoint(tmp_path / "c", groups=["learner"])
    assert groups.keys() == {"learner"}
    assert state == {"value": 1.0}
    assert load_checkpoint(tmp_path / "c", groups=())[0] == {}
    assert "replay.safetensors is missing" in refusal(tmp_path / "c")
    assert "no critic.safetensors, only learner.safetensors" in refusal(tmp_path / "c", groups={"critic"})


def test_no_groups_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("a/b/c"), {}, {"x": 1})
    assert load_checkpoint(Path("a/b/../b/c")) == ({}, {"x": 1})


def test_files_are_as_readable_as_the_directory(tmp_path: Path) -> None:
    save(tmp_path / "c")
    mask = stat.S_IMODE((tmp_path / "c").stat().st_mode) & 0o666
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "c").iterdir()} == {mask}


@pytest.mark.parametrize("name", ["learner.safetensors", "replay.safetensors", "state.json"])
def test_one_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c")
    path = tmp_path / "c" / name
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x01]) + content[position + 1 :])
        assert refusal(tmp_path / "c").startswith(f"{path} is damaged: SHA-256 differs from the manifest")


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x07, 0x20, 0x2A, 0x80])
def test_one_flipped_byte_in_the_manifest_is_found(tmp_path: Path, flip: int) -> None:
    save(tmp_path / "c")
    path = tmp_path / "c/manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
        assert str(tmp_path / "c") in refusal(tmp_path / "c")


@pytest.mark.parametrize("name", ["learner.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("size", [0, 1, -1])
def test_truncated_file(tmp_path: Path, name: str, size: int) -> None:
    save(tmp_path / "c")
    path = tmp_path / "c" / name
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is damaged" in refusal(tmp_path / "c")


@pytest.mark.parametrize("name", ["learner.safetensors", "state.json", "manifest.json"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    assert f"{name} is missing" in refusal(tmp_path / "c")


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "no checkpoint" in refusal(tmp_path / "none")
    assert "no checkpoint" in refusal(tmp_path / "file")
    assert "no checkpoint" in refusal(tmp_path / "file/below")


def test_nothing_is_parsed_before_its_hash_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c")
    with (tmp_path / "c/replay.safetensors").open("r+b") as file:
        file.write(b"\xff")

    def parse(*args: object, **kwargs: object) -> None:
        pytest.fail("parsed")

    monkeypatch.setattr(checkpoint, "safe_open", parse)
    assert "replay.safetensors is damaged" in refusal(tmp_path / "c")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "state.json\n"])
def test_a_manifest_cannot_lead_out_of_the_directory(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c")
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "c/learner.safetensors").read_bytes())
    path = tmp_path / "c/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = manifest["files"]["learner.safetensors"]
    path.write_bytes(checkpoint._manifest_bytes(manifest))
    assert refusal(tmp_path / "c") == f"{path} is damaged: it names files that do not belong to a checkpoint"


def test_a_group_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    save(tmp_path / "c")
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "c/learner.safetensors").read_bytes())
    assert "has no ../outside.safetensors" in refusal(tmp_path / "c", groups=["../outside"])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"format": 1, "files": {}}',
        b'{"format": "2", "files": []}',
        b'{"format": 2, "files": {}}',
        b'{"format": 2, "files": {"state.json": 5}}',
        b'{"format": 2, "files": {"state.json": {"size": "a\\nb", "sha256": null}}}',
        b'{"format": 2, "files": {"state.json": {"size": NaN, "sha256": ""}}}',
        b'{"format": 2, "files": {"state.json": {"size": 1e999, "sha256": ""}}}',
        b'{"format": 2, "format": 2, "files": {}}',
        b'{"format": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_odd_manifests(tmp_path: Path, text: bytes) -> None:
    save(tmp_path / "c")
    (tmp_path / "c/manifest.json").write_bytes(text)
    refusal(tmp_path / "c")
    try:
        (tmp_path / "c/manifest.json").write_bytes(checkpoint._manifest_bytes(json.loads(text)))
    except (ValueError, RecursionError):
        return
    refusal(tmp_path / "c")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": NaN}', "not JSON compliant"),
        (b'{"a": [-Infinity]}', "not JSON compliant"),
        (b'{"a": 1e999}', "not JSON compliant"),
        (b'{"a": {"b": 1, "b": 2}}', "a key occurs twice"),
        (b"[1]", "not an object"),
        (b"{", "Expecting"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
    ],
)
def test_odd_state_with_the_right_hash(tmp_path: Path, text: bytes, reason: str) -> None:
    save(tmp_path / "c")
    rewrite(tmp_path / "c", "state.json", text)
    message = refusal(tmp_path / "c")
    assert message.startswith(f"{tmp_path}/c/state.json is damaged")
    assert reason in message


def test_a_pickle_with_the_right_hash_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    save(tmp_path / "c")
    rewrite(tmp_path / "c", "learner.safetensors", pickle.dumps(Payload()))
    assert "learner.safetensors is damaged" in refusal(tmp_path / "c")
    assert not (tmp_path / "owned").exists()


def test_the_module_has_no_way_to_unpickle() -> None:
    tree = ast.parse(Path(checkpoint.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {module.split(".")[0] for module in modules}
    assert roots - {"torch", "safetensors", "fastsac"} <= sys.stdlib_module_names - {"pickle", "marshal", "shelve"}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"torch.load", "torch.save", "torch.serialization"}
    assert "torch.device" in attributes  # the walk does see such names


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: BaseException) -> list[int]:
    """Makes the `call`-th call (from 1) raise; the list's length is the number of calls."""
    original = getattr(owner, name)
    calls: list[int] = []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


STEPS = [
    *((checkpoint, "save_file", call) for call in (1, 2)),
    *((os, "fsync", call) for call in range(1, 7)),  # three files, the manifest, the directory, its parent
    *((os, "rename", call) for call in (1, 2)),
]


@pytest.mark.parametrize(("owner", "name", "call"), STEPS, ids=[f"{name}-{call}" for _, name, call in STEPS])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: BaseException
) -> None:
    directory = step_directory(tmp_path, 10)
    save(directory, 1.0)
    calls = fail_at(monkeypatch, owner, name, call, error)
    expected = FastsacError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save(directory, 2.0)
    monkeypatch.undo()
    assert len(calls) >= call
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot save the checkpoint {directory}: [Errno 28] No space left on device"
    assert rubbish(directory.parent) == []
    assert latest_checkpoint(tmp_path) == directory
    assert loaded_value(directory) == 1.0
    save(directory, 3.0)
    assert loaded_value(directory) == 3.0


@pytest.mark.parametrize(("name", "call"), [("fsync", 6), ("rename", 1)])
def test_a_failed_first_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    fail_at(monkeypatch, os, name, call, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(FastsacError, match="Input/output error"):
        save(tmp_path / "c")
    assert os.listdir(tmp_path) == []


def test_the_calls_that_fail_above_are_all_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c")
    wrapped = [(checkpoint, "save_file"), (os, "fsync"), (os, "rename")]
    calls = [fail_at(monkeypatch, owner, name, -1, OSError()) for owner, name in wrapped]
    save(tmp_path / "c")
    assert [len(each) for each in calls] == [2, 6, 3]  # the third rename hides the old one for removal


def test_failure_to_remove_the_replaced_one_is_no_failure_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c", 1.0)
    fail_at(monkeypatch, os, "rename", 3, OSError(errno.EBUSY, "busy"))
    save(tmp_path / "c", 2.0)
    assert rubbish(tmp_path) == [".c.replaced"]
    assert loaded_value(tmp_path / "c") == 2.0
    save(tmp_path / "c", 3.0)
    assert rubbish(tmp_path) == []
    assert loaded_value(tmp_path / "c") == 3.0


def test_a_read_only_parent_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        if ".tmp-" in self.name:  # root may write anywhere, so permissions alone would not do
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(FastsacError, match=r"^cannot save the checkpoint .*/c: .*Permission denied.*$"):
        save(tmp_path / "c")


def test_the_place_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("mine")
    with pytest.raises(FastsacError, match="Not a directory"):
        save(tmp_path / "c")
    with pytest.raises(FastsacError, match="File exists"):
        save(tmp_path / "c/d")
    assert (tmp_path / "c").read_text() == "mine"


@pytest.mark.parametrize("name", ["thesis.tex", "learner.safetensors", ".git", "state.json"])
def test_a_directory_that_is_no_checkpoint_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / name).write_text("mine")
    with pytest.raises(FastsacError, match=f"it contains '{name}' and is not a checkpoint; choose another"):
        save(tmp_path / "c")
    assert (tmp_path / "c" / name).read_text() == "mine"
    assert os.listdir(tmp_path) == ["c"]


def test_a_checkpoint_with_a_foreign_file_is_never_replaced(tmp_path: Path) -> None:
    save(tmp_path / "c")
    (tmp_path / "c/notes.md").write_text("mine")
    assert loaded_value(tmp_path / "c") == 1.0
    with pytest.raises(FastsacError, match=r"notes\.md"):
        save(tmp_path / "c", 2.0)
    assert loaded_value(tmp_path / "c") == 1.0


@pytest.mark.parametrize(
    "state",
    [{"x": float("nan")}, {"x": [float("-inf")]}, {"x": torch.zeros(1)}, {"x": {1, 2}}, {1: "a", "1": "b"}],
    ids=["nan", "inf", "tensor", "set", "same-key"],
)
def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(FastsacError, match=r"^cannot save the checkpoint .*: its state is not JSON: .*$"):
        save_checkpoint(tmp_path / "c", {}, state)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("group", ["", "..", "../x", "a/b", "a.b", "-a", "a\n"])
def test_group_names(tmp_path: Path, group: str) -> None:
    with pytest.raises(ValueError, match="a group name must consist of"):
        save_checkpoint(tmp_path / "c", {group: {}}, {})
    assert os.listdir(tmp_path) == []


def test_what_safetensors_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    for tensors in ({"__metadata__": torch.zeros(1)}, {"a": torch.zeros(3).to_sparse()}):
        with pytest.raises((ValueError, RuntimeError), match=r"__metadata__|unsupported memory format"):
            save_checkpoint(tmp_path / "c", {"g": tensors}, {})
        assert os.listdir(tmp_path) == []


def test_replacing_leaves_only_the_new_one(tmp_path: Path) -> None:
    save(tmp_path / "c", 1.0)
    save_checkpoint(tmp_path / "c", {"other": learner()}, {"value": 2})
    assert sorted(os.listdir(tmp_path / "c")) == ["manifest.json", "other.safetensors", "state.json"]
    assert os.listdir(tmp_path) == ["c"]


def test_an_empty_directory_and_a_symbolic_link_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", 1.0)
    save(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert loaded_value(tmp_path / "real") == loaded_value(tmp_path / "link") == 2.0
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_writer_that_dies_between_the_renames(tmp_path: Path) -> None:
    directory = step_directory(tmp_path, 20)
    save(step_directory(tmp_path, 10), 1.0)
    save(directory, 2.0)
    os.rename(directory, directory.with_name(f".{directory.name}.replaced"))
    assert latest_checkpoint(tmp_path) == directory
    assert loaded_value(latest_checkpoint(tmp_path)) == 2.0
    prune_checkpoints(tmp_path, 1)
    assert loaded_value(latest_checkpoint(tmp_path)) == 2.0
    directory.mkdir()  # empty: still no checkpoint
    assert loaded_value(latest_checkpoint(tmp_path)) == 2.0
    save(directory, 3.0)
    assert os.listdir(directory.parent) == [directory.name]
    assert loaded_value(latest_checkpoint(tmp_path)) == 3.0


def test_a_reader_never_meets_a_gap_or_a_mixture(tmp_path: Path) -> None:
    directory = step_directory(tmp_path, 10)
    save(directory, 0.0)
    failures: list[BaseException] = []
    seen: list[float] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                seen.append(loaded_value(latest_checkpoint(tmp_path)))
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(1, 1000):
        save(directory, float(value))
        if failures or (value >= 40 and len(set(seen)) > 3):
            break
    done.set()
    reader.join()
    assert failures == []
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


def test_step_directory(tmp_path: Path) -> None:
    assert step_directory(tmp_path, 20_000) == tmp_path / "checkpoints/step-000000020000"


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    for name in ("step-9", "step-000000000010", "step-000000000008", "best"):
        save(parent / name, 1.0)
    for name in (".step-60.tmp-host-1-00000000", "step-x", ".step-80"):
        (parent / name).mkdir()
    assert latest_checkpoint(tmp_path) == parent / "step-000000000010"


@pytest.mark.parametrize("damage", ["learner.safetensors", "state.json", "manifest.json"])
def test_a_damaged_latest_is_no_older_policy(tmp_path: Path, damage: str) -> None:
    for step in (1, 2, 3):
        save(step_directory(tmp_path, step), step)
    for step in (2, 3):
        (step_directory(tmp_path, step) / damage).unlink()
    newest = step_directory(tmp_path, 3)
    advice = f"; step-000000000001 is complete: remove {newest} to use it"
    with pytest.raises(FastsacError, match=rf"{re.escape(damage)} is missing{re.escape(advice)}$"):
        latest_checkpoint(tmp_path)
    shutil.rmtree(newest)
    shutil.rmtree(step_directory(tmp_path, 2))
    assert loaded_value(latest_checkpoint(tmp_path)) == 1.0


def test_no_latest_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FastsacError, match=r"^no checkpoint: looked for .*/checkpoints/step-\*/manifest\.json$"):
        latest_checkpoint(tmp_path)
    save(step_directory(tmp_path, 3))
    (step_directory(tmp_path, 3) / "replay.safetensors").unlink()
    with pytest.raises(FastsacError, match=r"replay\.safetensors is missing$"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("keep", "left"), [(9, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (2, [3, 4]), (1, [4]), (0, [4]), (-3, [4])]
)
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (3, 1, 4, 2):
        save(step_directory(tmp_path, step), step)
    save(tmp_path / "checkpoints/best", 7.0)
    prune_checkpoints(tmp_path, keep)
    names = [step_directory(tmp_path, step).name for step in left]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best", *names]
    assert loaded_value(latest_checkpoint(tmp_path)) == 4.0


def test_prune_does_not_count_half_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(step_directory(tmp_path, step), step)
    for step in (1, 4):
        (step_directory(tmp_path, step) / "state.json").unlink()
    prune_checkpoints(tmp_path, 1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [step_directory(tmp_path, step).name for step in (3, 4)]


def test_prune_without_checkpoints(tmp_path: Path) -> None:
    prune_checkpoints(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def test_prune_that_cannot_remove_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(step_directory(tmp_path, step))
    fail_at(monkeypatch, os, "rename", 1, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(FastsacError, match=r"cannot prune .*/checkpoints: .*Permission denied"):
        prune_checkpoints(tmp_path, 1)


def test_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    directory = step_directory(tmp_path, 1)
    save(directory)
    node = platform.node()
    ours = [f"checkpoints/.step-1.tmp-{node}-1-00000000", f"checkpoints/.best.tmp-elsewhere.{node}-999-0000000a"]
    foreign = ["checkpoints/step-1.tmp-host-5-00000005", ".notes", "checkpoints/.tmp-1"]
    for name in ours + foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "learner.safetensors").touch()
    (tmp_path / f".config.json.tmp-{node}-77-00000000").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "checkpoints" / f".step-2.tmp-{node}-1-00000001").symlink_to(tmp_path / "mine")
    remove_temporaries(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in [*tmp_path.iterdir(), *directory.parent.iterdir()]}
    assert left == {"checkpoints", ".notes", "mine", "checkpoints/step-000000000001", *foreign}
    assert loaded_value(directory) == 1.0
