"""A real Slurm on this machine, for tests: a controller and two nodes of one core each, in a temporary folder."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
CONFIG = """
# A requeued job waits until its credential has expired.
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
SchedulerParameters=sched_interval=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Return the commands of Slurm and MUNGE that this machine lacks."""
    return [command for command in NEEDED if shutil.which(command, path=PATH) is None]


@contextmanager
def slurm():
    """Run the cluster while the block runs; its commands work in the block, and jobs share this file system.

    The partition `low` takes jobs by default; a job of the partition `high` preempts them, and Slurm requeues them.
    """
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports, user=getpass.getuser()))
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        before = dict(os.environ)
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        files = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "log-file",
                                                                              "pid-file", "seed-file")]
        for command in (["munged", "--force", "--foreground", *files], ["slurmctld", "-D"],
                        ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            with (folder / f"{command[0]}-{command[-1]}.log".replace("/", "-")).open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(0.3 if command[0] == "munged" else 0)
        for _ in range(100):
            if call("sinfo", "--noheader", "--format=%T", "--partition=low", check=False).strip() == "idle":
                break
            time.sleep(0.2)
        else:
            raise RuntimeError("\n".join(path.read_text()[-2000:] for path in folder.glob("*.log")))
        yield


def call(*command: str, check: bool = True) -> str:
    """Run a command of Slurm and return what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout
