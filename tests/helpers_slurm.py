"""A real Slurm of two nodes on this machine, up in a second: own munge key, own configuration, everything in one folder, no accounting."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "sinfo")
#: States in which Slurm does no more for a job.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2 RealMemory=1000 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def require_slurm() -> None:
    """Skip, and say so loudly, where no cluster can be made."""
    folders = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in DAEMONS if shutil.which(name, path=folders) is None]
    if missing:
        pytest.skip(f"SLURM IS NOT TESTED: {', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins)")
    if os.geteuid() != 0:
        pytest.skip("SLURM IS NOT TESTED: its daemons need root here")


class Cluster:
    """Two nodes, ``n1`` and ``n2``, each with two CPUs and one GPU that exists on paper alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[Path] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}

    def start(self) -> None:
        """Daemons up and both nodes idle."""
        folder = self.folder
        host = socket.gethostname().split(".")[0]
        control, *ports = _free_ports(3)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, control=control, ports=ports))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "state").mkdir()
        for name in ("slurm", "launch"):
            (folder / name).symlink_to(ROOT / name)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
        self._start(["munged", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}", *files], "munge.pid")
        self._start(["slurmctld", "-c"], "slurmctld.pid")
        for name in ("n1", "n2"):
            self._start(["slurmd", "-N", name], f"slurmd-{name}.pid")
        self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-N", "-o", "%N").split() == ["n1", "n2"], "both nodes are idle", 30)

    def _start(self, command: list[str], pid_file: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
        self._daemons.append(self.folder / pid_file)

    def stop(self) -> None:
        """Everything down; what jobs are left are killed by their nodes."""
        with contextlib.suppress(AssertionError):
            self.run("scancel", "--user=root")
            self.until(lambda: not self.run("squeue", "-h"), "no job is left", 10)
        for path in reversed(self._daemons):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)

    def run(self, *command: str, **more: str) -> str:
        """What a command says that is given where jobs are submitted: a folder with the scripts, where jobs' output also goes."""
        done = subprocess.run(command, env={**self.environment, **more}, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: str, **more: str) -> str:
        """The number of a job."""
        return self.run("sbatch", "--parsable", *command, **more).partition(";")[0]

    def show(self, job: str, key: str) -> str:
        """A field of a job as ``scontrol show job`` writes it."""
        found = re.search(rf"\b{key}=(\S*)", self.run("scontrol", "show", "job", job))
        return found[1] if found else ""

    def wait(self, job: str, seconds: float = 120.0) -> str:
        """The state that a job ends in; one that was put back is let in after two seconds, which Slurm otherwise does after two minutes.

        Not at once: in the second in which a job is killed its node refuses it as one whose credential is revoked.
        """
        state, seen = "", 0.0

        def ended() -> bool:
            nonlocal state, seen
            state = self.show(job, "JobState")
            if state != "PENDING" or self.show(job, "Reason") != "BeginTime":
                seen = 0.0
            elif not seen:
                seen = time.monotonic()
            elif time.monotonic() > seen + 2.0:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state in ENDED

        self.until(ended, f"job {job} ends: it is {state}", seconds)
        return state

    def said(self, job: str) -> str:
        """What a job has written so far."""
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob(f"slurm-*-{job}.out"))

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Poll for something."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                told = "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.out")))
                raise AssertionError(f"waited {seconds:.0f} s in vain until {what}\n{self.run('squeue')}\n{told}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
