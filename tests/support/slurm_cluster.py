"""A real SLURM cluster of several nodes on one machine, for tests.

Every node is a slurmd in namespaces of its own: host name, mounts (a private /dev/shm) and processes, so that it can be
crashed as a whole. Nothing outside the cluster's folder is touched, and nothing outlives the process that started it.

    with SlurmCluster(folder, nodes=2, cpus=2) as cluster:
        cluster.run("sbatch", "--parsable", "job.sbatch").stdout
        cluster.crash(2)
        cluster.boot(2)

Needs root and the Debian packages of PACKAGES; missing() says what is not there.
"""

import ctypes
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

PACKAGES = ["slurm-wlm", "munge"]
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare", "mount",
            "hostname"]

# Times are short: a requeued job waits for its old credential to expire, and a dead node shall be noticed.
CONFIGURATION = """\
ClusterName=tforge
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
SlurmctldTimeout=30
SlurmdTimeout={node_timeout}
MessageTimeout=10
TCPTimeout=2
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# What the first process of a node does: it also reaps the orphans there.
NODE = 'hostname "$1" && mount -t tmpfs tmpfs /dev/shm && { slurmd -D -N "$1" -f "$2" & wait $!; }'


def missing():
    """Why no cluster can be started here, or nothing."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if absent:
        packages = " ".join(PACKAGES)
        return f"{', '.join(absent)} not installed (Debian packages {packages}; scripts/setup.sh --with-slurm)"
    return None


def search_path():
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def free_ports(count):
    """The first of `count` ports in a row that nobody uses."""
    for first in range(17000, 32000, 20):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class SlurmCluster:
    def __init__(self, folder, nodes=2, cpus=2, gpus=0, kill_wait=5, node_timeout=15):
        self.folder = pathlib.Path(folder).absolute()
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        self.timing = {"kill_wait": kill_wait, "node_timeout": node_timeout}
        self.configuration = self.folder / "slurm.conf"
        self.processes = {}
        # What a client needs; the nodes hand SLURM_CONF to the jobs themselves.
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(self.configuration)}

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        for name in ["munge", "state", "log", *(f"{kind}/n{i}" for kind in ("spool", "tmp") for i in self.numbers())]:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # munged trusts only folders that nobody else can write, and clients of any user must reach its socket.
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        port = free_ports(1 + self.nodes)
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(f"NodeName=n{i} NodeHostname=n{i} NodeAddr=127.0.0.1 Port={port + i} CPUs={self.cpus} "
                          f"RealMemory=4000{gres} State=UNKNOWN" for i in self.numbers())
        host = socket.gethostname().split(".")[0]
        self.configuration.write_text(CONFIGURATION.format(host=host, port=port, folder=self.folder, nodes=nodes,
                                                           **self.timing))
        # Only the bookkeeping of GPUs is tested: any device file will do.
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-{self.nodes}] Name=gpu File=/dev/tty[0-{self.gpus - 1}]\n" if self.gpus > 1 else "")
        munge = self.folder / "munge"
        self.spawn("munged", "munged", "--foreground", "--force", "--num-threads=2", f"--socket={munge}/socket",
                   f"--key-file={key}", f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed")
        self.wait_for(lambda: (munge / "socket").exists(), "munged's socket")
        self.start_controller()
        for i in self.numbers():
            self.boot(i)
        self.wait_for(lambda: self.states().count("idle") == self.nodes, "idle nodes")

    def numbers(self):
        return range(1, self.nodes + 1)

    def spawn(self, name, *command):
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                    env=self.environment, preexec_fn=die_with_parent)

    def end(self, name, number=signal.SIGKILL, patience=5):
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def start_controller(self):
        self.spawn("slurmctld", "slurmctld", "-D", "-f", str(self.configuration))

    def kill_controller(self):
        self.end("slurmctld")

    def boot(self, i):
        """Starts node i, with nothing left of an earlier life."""
        for kind in ("spool", "tmp"):
            for left in (self.folder / kind / f"n{i}").iterdir():
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        self.spawn(f"n{i}", "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
                   NODE, "sh", f"n{i}", str(self.configuration))

    def crash(self, i):
        """Every process of node i is gone at once."""
        self.end(f"n{i}")

    def stop(self):
        for i in self.numbers():
            self.crash(i)
        self.end("slurmctld", signal.SIGTERM)
        self.end("munged", signal.SIGTERM)

    def run(self, *command, check=True, timeout=60, **options):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout,
                              env={**self.environment, **options.pop("env", {})}, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()}")
        return done

    def states(self):
        """The state of each node."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).stdout.split()

    def job(self, job):
        """What SLURM knows about a job: {"JobState": "RUNNING", ...}."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def queue(self):
        return self.run("squeue", "--noheader", "--format=%i %j %T %r").stdout.splitlines()

    def log(self):
        text = ""
        for path in sorted((self.folder / "log").iterdir()):
            text += f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]) + "\n"
        return text

    def wait_for(self, condition, what, patience=60):
        """Waits for others; how long it takes is no test."""
        end = time.monotonic() + patience
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"still no {what} after {patience} s\n{self.log()}")
            time.sleep(0.1)
