"""Groups of ranks that share out the videos of a list: real processes, killed and restarted."""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
import torch.distributed.run
from forks import ForkedScript, python_command, run_ranks
from processes import Process
from scripts import SCRIPTS, assert_plays_in_a_browser, run_here, run_runner, self_forcing_env  # noqa: F401

import launch
from inferix import InputError, ParallelConfig
from inferix.cli import data_parallel, main
from inferix.cli.devices import parallel_config
from inferix.cli.main import Interrupt

# ruff: noqa: F811

SCRIPT = "self_forcing_quantized.sh"


@pytest.fixture
def batch_env(self_forcing_env, tmp_path) -> dict[str, str]:
    """Variables for eight prompts and two groups."""
    entries = [{"prompt": f"A cat, take {number}", "id": str(number)} for number in range(8)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return self_forcing_env | {"PROMPT_FILE": "list.jsonl", "DATA_PARALLEL": "2"}


def lines(folder: Path) -> list[dict]:
    path = folder / "my videos/manifest.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_each_once(folder: Path, count: int) -> None:
    """Every video has one file and one line; nothing else is left."""
    files = [line["file"] for line in lines(folder)]
    assert sorted(files) == [f"{number}.mp4" for number in range(count)]
    assert sorted(path.name for path in (folder / "my videos").iterdir()) == [*sorted(files), "manifest.jsonl"]
    for name in files:
        assert_plays_in_a_browser(folder / "my videos" / name, 9)


def kill_rank(process: Process, rank: int) -> None:
    """Kill a rank, then its encoder where one is at work."""
    for descendant in process.descendants(RANK=str(rank)):
        with suppress(psutil.NoSuchProcess):
            descendant.kill()


@pytest.mark.timeout(400)
def test_killed_and_started_again(batch_env, tmp_path):
    """One of two groups' ranks, then the whole job: torchrun's restart and the next run go on, and nothing is made twice."""
    env = batch_env | {"PET_MAX_RESTARTS": "1"}  # torch's variable for torchrun's --max-restarts
    with ForkedScript([SCRIPTS / SCRIPT], env, cwd=tmp_path, num_ranks=4) as process:
        process.wait_until(lambda: lines(tmp_path), 100)
        kill_rank(process, 1)
        killed_at = len(lines(tmp_path))
        process.wait_until(lambda: len(lines(tmp_path)) > killed_at + 1, 150)  # the other group may complete one more
        for rank in range(2):
            kill_rank(process, rank)
        process.popen.kill()
    made = len(lines(tmp_path))
    time.sleep(1)  # in its first second an incomplete file is left alone
    result = run_here(SCRIPT, batch_env | {"DATA_PARALLEL": "1"}, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"videos             {8 - made} made, {made} complete before: my videos/manifest.jsonl" in result.stdout
    assert_each_once(tmp_path, 8)


@pytest.mark.timeout(400)
def test_interrupted(batch_env, tmp_path):
    """The first Ctrl-C lets the videos be completed that were begun."""
    with ForkedScript([SCRIPTS / SCRIPT], batch_env, cwd=tmp_path, num_ranks=2) as process:
        process.wait_until(lambda: lines(tmp_path))
        process.popen.send_signal(signal.SIGINT)
        result = process.wait(100)
    assert result.returncode == 130 and "Traceback" not in result.stderr
    made = len(lines(tmp_path))
    assert 1 <= made < 8 and f"{8 - made} of 8 videos are not made yet" in result.stderr
    videos = list((tmp_path / "my videos").iterdir())
    assert len(videos) == made + 1 and all(line.get("error") is None for line in lines(tmp_path))


def test_groups_of_two_ranks(batch_env, tmp_path):
    env = batch_env | {"ULYSSES_SIZE": "2"}
    _launch, _runner, *flags = python_command([SCRIPTS / SCRIPT], env, tmp_path)
    ranks = run_ranks(4, run_runner, tmp_path, flags)
    assert {rank.value for rank in ranks} == {0}, ranks
    assert {line["processes"] for line in lines(tmp_path)} == {2}
    assert_each_once(tmp_path, 8)


# --- without processes


def test_ctrl_c_is_not_torchruns(monkeypatch):
    """It would kill the processes 30 seconds later, in the middle of their videos."""
    given = []
    monkeypatch.setattr(torch.distributed.run, "run", given.append)
    monkeypatch.setenv(launch.SIGNALS_TO_HANDLE, "SIGTERM,SIGHUP")
    assert launch.torchrun(2, ["runner.py"]) == 0
    config, *_ = torch.distributed.run.config_from_args(given[0])
    assert getattr(config, "signals_to_handle", "SIGTERM,SIGHUP") == "SIGTERM,SIGHUP"


@pytest.fixture
def queues(monkeypatch):
    """Return a function that makes the queue of a group; all on one store."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 1)]))
    return lambda group: data_parallel.WorkQueue(ParallelConfig(data_parallel_rank=group, data_parallel_size=2))


def test_each_unit_is_handed_out_once(queues):
    first, second = queues(0), queues(1)
    assert [first.claim(0), second.claim(0), second.claim(1), first.claim(1), first.claim(2)] == [1, 0, 1, 0, 1]
    assert (first.agree("batch", 4), second.agree("batch", 8)) == (4, 4)
    restarted = queues(1)
    assert [restarted.claim(0), restarted.claim(1), first.claim(1), restarted.claim(2)] == [0, 1, 0, 0]
    first.end()
    second.end()
    assert not first.all_ended()  # the process that has ended is not the group's any more
    restarted.end()
    assert first.all_ended()
    assert not first.stop_requested()
    restarted.request_stop()
    assert first.stop_requested()


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [
        (("all", None, None), 8, (8, 1, 1)),
        (("all", 2, None), 8, (4, 2, 1)),
        ((2, None, None), 8, (2, 4, 1)),
        ((2, None, 2), 8, (2, 2, 2)),
        (("all", None, None), 1, (1, 1, 1)),
    ],
)
def test_sizes(given, world, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    groups, ulysses, ring = given
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        config = parallel_config(ulysses, ring, num_heads=12, data_parallel=groups)
        assert (config.data_parallel_size, config.ulysses_size, config.ring_size) == expected
        assert config.data_parallel_rank * config.world_size + config.rank == rank


def test_sizes_that_do_not_fit(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"data_parallel 2 x ulysses_size 1 x ring_size 1 is not .* \(3\)"):
        parallel_config(None, None, num_heads=12, data_parallel=2)


def test_interrupts(monkeypatch):
    monkeypatch.setattr(main, "received", [])
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt.handle(signal.SIGINT, None)
    interrupt.graceful = True
    interrupt.handle(signal.SIGINT, None)
    assert interrupt.requested
    with pytest.raises(KeyboardInterrupt):
        interrupt.handle(signal.SIGINT, None)
