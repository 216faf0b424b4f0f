"""example/slurm/batch.sbatch on a cluster of two nodes on this host, one of which fails."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from forks import ForkedPython
from processes import Process
from scripts import self_forcing_env  # noqa: F401

# ruff: noqa: F811

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs Slurm and MUNGE: {', '.join(MISSING)} not found"),
    pytest.mark.timeout(400),
]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SlurmdParameters=config_overrides
SlurmdTimeout=5
SlurmctldTimeout=5
KillWait=2
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=100000
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=test Nodes=n1,n2 Default=YES State=UP MaxTime=10
"""


class Cluster:
    """Slurm's daemons, all in ``folder``, and the commands that talk to them."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, dict[str, Process]()
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [server.getsockname()[1] for server in sockets]
        for server in sockets:
            server.close()
        (folder / "state").mkdir()
        names = {
            "folder": folder,
            "host": socket.gethostname().split(".")[0],
            "user": getpass.getuser(),
            "ports": ports,
        }
        (folder / "slurm.conf").write_text(CONFIG.format(**names))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)

    def __enter__(self) -> "Cluster":
        files = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self.start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files.values())
        self.wait_until((self.folder / "munge.socket").exists)
        self.start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.command("sinfo", "-h", "-o", "%T %D") == "idle 2")
        return self

    def __exit__(self, *error) -> None:
        for process in self.daemons.values():
            process.__exit__()
        kill(self.node_processes("n1") + self.node_processes("n2"))

    def start(self, *command: str) -> None:
        self.daemons[command[-1]] = Process(list(command), self.env, cwd=self.folder).__enter__()

    def command(self, *command: str, **env: str) -> str:
        result = subprocess.run(command, env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=30)
        return result.stdout.strip()

    def node_processes(self, node: str) -> list[psutil.Process]:
        """Return the processes of a node's jobs, and their supervisor."""
        found = []
        for process in psutil.process_iter():
            try:
                of_job = process.environ().get("SLURMD_NODENAME") == node
                if of_job and process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(process.stderr[-2000:] for process in self.daemons.values())
            time.sleep(0.2)


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # ended with one that was killed before it
            process.kill()


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "slurm").mkdir(mode=0o755)
    with Cluster(tmp_path / "slurm") as cluster:
        yield cluster


def test_a_node_fails(cluster, self_forcing_env, tmp_path):
    """Slurm starts the job again when the node is back, and the job goes on where it stopped."""
    (tmp_path / "list.txt").write_text("\n".join(f"A cat, take {number}" for number in range(12)))
    env = self_forcing_env | {"PROMPT_FILE": str(tmp_path / "list.txt"), "OUTPUT_FOLDER": str(tmp_path / "videos")}
    env = {name: value for name, value in env.items() if name != "PATH"}
    env |= {name: str(tmp_path / env[name]) for name in ("CONFIG_PATH", "WAN_BASE_MODEL_PATH", "CHECKPOINT_PATH")}
    env["PATH"] = f"{ForkedPython(tmp_path / 'bin', num_ranks=1).folder}:{SEARCH}"
    log, manifest = tmp_path / "log.txt", tmp_path / "videos/manifest.jsonl"

    def lines() -> list[dict]:
        return [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.exists() else []

    submitted = ("sbatch", "--parsable", "--nodes=2", f"--output={log}", "example/slurm/batch.sbatch")
    job = cluster.command(*submitted, **env)
    assert job.isdecimal()
    cluster.wait_until(lines, 150)
    kill([*cluster.node_processes("n2"), psutil.Process(cluster.daemons["n2"].popen.pid)])
    cluster.wait_until(lambda: "Restarts=1" in cluster.command("scontrol", "show", "job", job), 100)
    made = len(lines())
    assert made < 12, log.read_text()
    cluster.start("slurmd", "-D", "-N", "n2")
    cluster.wait_until(lambda: "JobState=COMPLETED" in cluster.command("scontrol", "show", "job", job), 200)
    files = [line["file"] for line in lines()]
    assert len(files) == len(set(files)) == 12, log.read_text()
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == sorted([*files, "manifest.jsonl"])
    assert f"videos             {12 - made} made, {made} complete before" in log.read_text()
