"""What is built, and that it works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fastsac

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore")
FOLDERS = ("fastsac", "kernels", "tests", "benchmarks", "docs")
WHERE = """
from importlib.util import find_spec
import fastsac
print(fastsac.__file__, find_spec("fastsac_kernels").origin, fastsac.__version__)
"""
USE = """
from fastsac import SAC, Config
from fastsac_kernels import td_loss

agent = SAC(Config(env_id="Pendulum-v1"))
reveal_type(agent.config.num_envs)
reveal_type(td_loss)
"""


def names(archive: Path) -> set[str]:
    """The files in an archive; without an sdist's first folder."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as file:
        return {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, of a copy in which things lie about that do not belong there."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    for name in (
        "runs/mine/config.json",
        "fastsac/__pycache__/old.pyc",
        ".venv/pyvenv.cfg",
        "benchmarks/results/x.png",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def sources(*folders: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".typed", ".md", ".txt")
    }


def test_the_wheel_holds_both_packages_and_nothing_else(built):
    found, info = names(built["wheel"]), f"fastsac-{fastsac.__version__}.dist-info"
    files = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    modules = {name.removeprefix("kernels/") for name in sources("fastsac", "kernels/fastsac_kernels")}
    assert files | modules <= found
    assert {name.partition("/")[0] for name in found} == {"fastsac", "fastsac_kernels", info}
    assert not [name for name in found if "__pycache__" in name]
    assert {"fastsac/py.typed", "fastsac_kernels/py.typed", "fastsac/presets.toml"} <= found
    metadata = zipfile.ZipFile(built["wheel"]).read(f"{info}/METADATA").decode()
    assert f"\nVersion: {fastsac.__version__}\n" in metadata
    for version in ("3.11", "3.12", "3.13"):
        assert f"\nClassifier: Programming Language :: Python :: {version}\n" in metadata
    assert "\nRequires-Dist: ray>=2.40; extra == 'all'\n" in metadata
    assert "\nRequires-Dist: triton>=3.6; sys_platform == 'linux'\n" in metadata


def test_the_sdist_holds_what_building_and_testing_take(built):
    needed = {name for name in sources(*FOLDERS) if not name.startswith("benchmarks/results/")}
    found = names(built["sdist"])
    assert needed - {"tests/test_docs.py"} | {*FILES, "PKG-INFO"} <= found
    assert {name.partition("/")[0] for name in found} == {*FOLDERS, *FILES, "PKG-INFO"}
    assert not [name for name in found if "__pycache__" in name or name.startswith("benchmarks/results/")]


def environment(where: Path, *arguments: str, with_ours: bool) -> Path:
    """Make a virtual environment and install into it; return its folder of programs."""
    venv.create(where, symlinks=True, with_pip=False)
    if with_ours:  # a line names a folder whose own .pth files are not read: an editable checkout is not seen
        (packages,) = where.glob("lib/*/site-packages")
        packages.joinpath("ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--python", str(where / "bin" / "python"), "install", "-q", *arguments]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return where / "bin"


def check_works(programs: Path, where: Path) -> None:
    """Look, from a directory that is no checkout, at what was installed."""
    where.mkdir()
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def output(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [programs / program, *arguments], cwd=where, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    *modules, version = output("python", "-c", WHERE).split()
    assert all(Path(module).is_relative_to(programs.parent) for module in modules)
    assert version == fastsac.__version__
    assert "train" in output("fastsac", "--help")
    assert "Pendulum" in output("fastsac", "presets")
    settings = "--env-id Pendulum-v1 --num-envs 2 --total-steps 40 --learning-starts 20 --hidden-sizes 8 --eval-every 0"
    output("fastsac", "train", *settings.split(), "--num-threads", "1", "--precision", "fp32", "--run-dir", "run")
    assert (where / "run" / "checkpoints" / "step-000000000040" / "manifest.json").exists()


def test_the_wheel_works(built, tmp_path):
    programs = environment(tmp_path / "venv", "--no-index", "--no-deps", str(built["wheel"]), with_ours=True)
    check_works(programs, tmp_path / "elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_clean_environment_with_all_dependencies(kind, built, tmp_path):
    programs = environment(tmp_path / "venv", str(built[kind]), with_ours=False)
    check_works(programs, tmp_path / "elsewhere")
    (tmp_path / "use.py").write_text(USE)
    command = ["-m", "mypy", "--strict", "--python-executable", str(programs / "python"), "use.py"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert 'Revealed type is "int"' in done.stdout
    assert "-> torch._tensor.Tensor" in done.stdout
    assert done.returncode == 0, done.stdout


IMPORTS = """
import sys
before = set(sys.modules)
import fastsac
of_import = set(sys.modules) - before
import contextlib, io, json
from fastsac.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
print(json.dumps([sorted(name for name in found if "." not in name) for found in (of_import, set(sys.modules))]))
"""


def test_import_and_help_are_light():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    of_import, of_help = map(set, json.loads(done.stdout))
    heavy = {"torch", "numpy", "gymnasium", "envpool", "tensorboard", "matplotlib", "scipy", "safetensors", "imageio"}
    assert not of_help & heavy
    assert not of_import & {"tyro", "rich", "argparse", "tomllib", "logging", "traceback", "fastsac_kernels"}
