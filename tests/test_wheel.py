"""The wheel holds what it needs, and works without the source tree."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(600)


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command, with nothing that would let it find the source tree, and return what it printed."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("PYTHON") and key not in ("POSTGRES_URI", "REDIS_URL", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Isolated, the build would fetch its backend from the package index.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    call(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_data_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    sources = [
        (ROOT / "migrations", "checkpointer/store/migrations"),
        (ROOT / "observability/queries", "observability/queries"),
    ]
    for source, target in sources:
        files = {f"{target}/{path.name}" for path in source.glob("*.sql")}
        assert files
        assert files - names == set()
    for folder in ("templates", "static"):
        console = ROOT / "observability/console" / folder
        kept = {f"observability/console/{folder}/{path.name}" for path in console.iterdir()}
        assert kept
        assert kept - names == set()
    assert {"checkpointer/py.typed", "observability/py.typed"} <= names
    for hook in ("console", "thread_log", "run_events", "system_errors"):
        assert f"{hook} = observability.hooks.{hook}:create" in points


def test_the_wheel_has_nothing_but_the_two_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"checkpointer", "observability"}


def test_the_quickstart_runs_on_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    call(python, "-m", "pip", "install", "--quiet", f"{wheel}[embedded]", cwd=tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    where = call(
        python, "-c", "import checkpointer, observability as o; print(checkpointer.__file__, o.__file__)", cwd=elsewhere
    )
    assert all(Path(path).is_relative_to(tmp_path / "venv") for path in where.split())

    said = call(python, tmp_path / "examples/quickstart.py", cwd=elsewhere)
    assert "stock PostgresSaver reads 10 checkpoints, the buffered one 10" in said
    assert "the same conversation: True (8 messages)" in said
