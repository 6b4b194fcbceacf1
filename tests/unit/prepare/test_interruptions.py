"""A pipeline that is killed, or whose disk is full, leaves nothing half-written and goes on."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from or1_megatron import cli
from or1_megatron.prepare.recipe import load
from or1_megatron.prepare.runner import prepare
from or1_megatron.prepare.tables import BATCH_ROWS
from tests.unit.prepare.odd_steps import NUM_ROWS, ROOT, outcome


def killed_when(words: list[str], there: Path, least: int) -> bool:
    """Runs the pipeline and kills it once the file or folder `there` has so many bytes; False: it ended before."""
    command = [sys.executable, "-m", "tests.unit.prepare.odd_steps", *words]
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < deadline
        size = there.stat().st_size if there.exists() else -1
        if size >= least:
            children = process.children(recursive=True)
            process.kill()
            process.wait()
            gone, alive = psutil.wait_procs(children, timeout=60)
            assert not alive, "workers outlive their parent"
            return True
        time.sleep(0.01)
    return False


def test_killed_at_any_moment_it_ends_with_the_same_bytes(recipe: Path, tmp_path: Path):
    log, cache = tmp_path / "judged", tmp_path / "cache"
    prepare(load(recipe, [f"cache={tmp_path / 'whole'}", f"write.path={tmp_path / 'o' / 'train.parquet'}"]))
    slow = f"{{do: slow, seconds: 0.001, log: {log}}}"
    recipe.write_text(recipe.read_text().replace("{do: slow}", slow).replace("slow_table", "slow_table, seconds: 0.2"))
    words = [str(recipe), "workers=2"]
    slow_key = next(path.name for path in (tmp_path / "whole").glob("slow-*"))
    table_key = next(path.name for path in (tmp_path / "whole").glob("slow_table-*"))
    journal = cache / f".{slow_key}.partial" / "batches"
    kills = [(journal, 1), (journal, 150_000), (cache / f".{table_key}.partial" / "scratch", 0)]
    assert [killed_when(words, there, least) for there, least in kills] == [True] * 3
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / ".train.parquet.1.tmp"
    left.touch()  # as of a process killed while it wrote
    assert not killed_when(words, tmp_path / "never", 0)
    assert outcome(cache) == outcome(tmp_path / "whole")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "o")
    assert not left.exists() and not list(cache.glob(".*"))
    judged = log.read_text().split()
    assert set(judged) == {f"s/{i}" for i in range(NUM_ROWS)}
    assert len(judged) <= NUM_ROWS + 2 * 2 * BATCH_ROWS  # what was in work at each of two kills, and no more


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """To this process, and to those that it starts, the disk is full when a file has so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "done", "last"), [(9_000, 0, "all"), (60_000, 1, "threes")], ids=["table", "journal"]
)
def test_a_full_disk_leaves_nothing_half_written(recipe: Path, tmp_path: Path, capsys, limit, done: int, last: str):
    recipe.write_text(recipe.read_text().replace("write: {", f"write: {{from: {last}, "))
    with file_size_limit(limit):
        assert cli.main(["prepare", str(recipe), "workers=2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("or1: error: step ") and "the disk is full at" in error and "run the same again" in error
    assert not (tmp_path / "out").exists()
    assert len([path for path in (tmp_path / "cache").glob("*-*") if not path.name.startswith(".")]) == done
    assert not list((tmp_path / "cache").glob(".*/out"))
    assert cli.main(["prepare", str(recipe)]) == 0
    prepare(load(recipe, [f"cache={tmp_path / 'c2'}", f"write.path={tmp_path / 'o2' / 'train.parquet'}"]))
    assert outcome(tmp_path / "out") == outcome(tmp_path / "o2")


@pytest.mark.parametrize(
    ("key", "message"), [("cache={}/cache", "Permission denied"), ("write.path={}/x.parquet", "may not write there")]
)
def test_a_folder_that_may_not_be_written_is_one_line(recipe: Path, tmp_path: Path, capsys, key: str, message: str):
    prepare(load(recipe, ["write.from=all"]))  # imports all that it takes while they may be read
    capsys.readouterr()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:
                tmp_path.chmod(0o755)
                for parent in tmp_path.parents:
                    if parent.owner() == "root" and "pytest" in str(parent):
                        parent.chmod(0o755)
                os.seteuid(65534)
            code = cli.main(["prepare", str(recipe), "write.from=all", key.format(folder)])
        finally:
            os.seteuid(user)
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and message in error and str(folder) in error
