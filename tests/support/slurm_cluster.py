"""A real SLURM cluster of several nodes on one machine, for tests.

Every node is a slurmd in namespaces of its own: host name, network, mounts (a private /dev/shm) and processes, so that
it can be crashed as a whole or cut off. The cluster's network is reached from nowhere else: whoever wants something of
it starts with `inside`. Nothing outside the cluster's folder is touched, nothing outlives the process that started it,
and several clusters do not know of each other.

    with SlurmCluster(folder, nodes=2, cpus=2) as cluster:
        cluster.run("sbatch", "--parsable", "job.sbatch").stdout
        cluster.crash(2)
        cluster.boot(2)
        cluster.cut(2)
        cluster.mend(2)

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

PACKAGES = ["slurm-wlm", "munge", "iproute2"]
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare", "nsenter",
            "mount", "hostname", "ip"]

# Times are short: a requeued job waits for its old credential to expire, and a dead node shall be noticed.
CONFIGURATION = """\
ClusterName=tforge
SlurmctldHost={host}(10.77.0.254)
SlurmctldPort=17000
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
LaunchParameters=mpir_use_nodeaddr
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SUBNET = "10.77.0.0/24"
# The controller's end of the network, to which nodes are plugged. FILE
NETWORK = ("ip link set lo up && ip link add tforge type bridge && ip addr add 10.77.0.254/24 dev tforge && "
           'ip link set tforge up && touch "$1" && exec sleep infinity')
# A node's end. NAME CONTROLLER ADDRESS COMMAND...
CABLE = ('ip link add eth0 type veth peer name "$1" netns "$2" && '
         'nsenter --net="/proc/$2/ns/net" ip link set "$1" master tforge up && ip addr add "$3/24" dev eth0 && '
         'ip link set eth0 up && ip link set lo up && shift 3 && exec "$@"')
# What the first process of a node does: it also reaps the orphans there. NAME CONFIGURATION SHARED
NODE = ('hostname "$1" && mount --bind "$3" /mnt && mount -t tmpfs tmpfs /dev/shm && mkdir -p "$3" && '
        'mount --move /mnt "$3" && { slurmd -D -N "$1" -f "$2" & wait $!; }')


def missing():
    """Why no cluster can be started here, or nothing."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if absent:
        packages = " ".join(PACKAGES)
        return f"{', '.join(absent)} not installed (Debian packages {packages}; scripts/setup.sh --all)"
    trial = ("ip link add trial0 type bridge && ip link add trial1 type veth peer name trial2 && "
             "mount -t tmpfs tmpfs /mnt")
    done = subprocess.run(["unshare", "--net", "--mount", "sh", "-c", trial], capture_output=True, text=True,
                          env={**os.environ, "PATH": search_path()})
    return f"a test cluster needs namespaces of network and mounts: {done.stderr.strip()}" if done.returncode else None


def search_path():
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class SlurmCluster:
    """`shared`: the folder that all nodes see, wherever it lies; by default the one with the cluster's folder."""

    def __init__(self, folder, nodes=2, cpus=2, gpus=0, kill_wait=5, node_timeout=15, shared=None):
        self.folder = pathlib.Path(folder).absolute()
        self.shared = pathlib.Path(shared or self.folder.parent).absolute()
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        self.timing = {"kill_wait": kill_wait, "node_timeout": node_timeout}
        self.configuration = self.folder / "slurm.conf"
        self.processes = {}
        # What a client needs; the nodes hand SLURM_CONF to the jobs themselves.
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(self.configuration),
                            **dict.fromkeys(["OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_oob_tcp_if_include"], SUBNET)}
        self.inside = []

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
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(f"NodeName=n{i} NodeHostname=n{i} NodeAddr=10.77.0.{i} Port=17001 CPUs={self.cpus} "
                          f"RealMemory=4000{gres} State=UNKNOWN" for i in self.numbers())
        host = socket.gethostname().split(".")[0]
        self.configuration.write_text(CONFIGURATION.format(host=host, folder=self.folder, nodes=nodes,
                                                           **self.timing))
        # Only the bookkeeping of GPUs is tested: any device file will do.
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-{self.nodes}] Name=gpu File=/dev/tty[0-{self.gpus - 1}]\n" if self.gpus > 1 else "")
        munge = self.folder / "munge"
        self.spawn("munged", "munged", "--foreground", "--force", "--num-threads=2", f"--socket={munge}/socket",
                   f"--key-file={key}", f"--log-file={munge}/log", f"--pid-file={munge}/pid",
                   f"--seed-file={munge}/seed")
        self.spawn("network", "unshare", "--net", "sh", "-c", NETWORK, "sh", self.folder / "network")
        self.wait_for(lambda: (munge / "socket").exists() and (self.folder / "network").exists(), "munge and network")
        self.inside = ["nsenter", f"--net=/proc/{self.processes['network'].pid}/ns/net"]
        self.start_controller()
        for i in self.numbers():
            self.boot(i)
        self.wait_for(lambda: self.states().count("idle") == self.nodes, "idle nodes")

    def numbers(self):
        return range(1, self.nodes + 1)

    def spawn(self, name, *command):
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log,
                                                    stderr=log, env=self.environment, preexec_fn=die_with_parent)

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
        self.spawn("slurmctld", *self.inside, "slurmctld", "-D", "-f", self.configuration)

    def boot(self, i):
        """Starts node i, with nothing left of an earlier life."""
        for kind in ("spool", "tmp"):
            for left in (self.folder / kind / f"n{i}").iterdir():
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        self.run("ip", "link", "del", f"n{i}", check=False)  # the cable of a node that crashed goes a little later
        self.spawn(f"n{i}", "unshare", "--net", "sh", "-c", CABLE, "sh", f"n{i}", self.processes["network"].pid,
                   f"10.77.0.{i}", "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
                   "sh", "-c", NODE, "sh", f"n{i}", self.configuration, self.shared)

    def crash(self, i):
        """Every process of node i is gone at once."""
        self.end(f"n{i}")

    def cut(self, i):
        """Nothing reaches node i, and nothing comes from it."""
        self.run("ip", "link", "set", f"n{i}", "down")

    def mend(self, i):
        self.run("ip", "link", "set", f"n{i}", "up")

    def stop(self):
        for i in self.numbers():
            self.crash(i)
        self.end("slurmctld", signal.SIGTERM)
        self.end("munged", signal.SIGTERM)
        self.end("network")

    def run(self, *command, check=True, timeout=600, **options):
        done = subprocess.run([*self.inside, *(str(word) for word in command)], capture_output=True, text=True,
                              timeout=timeout, env={**self.environment, **options.pop("env", {})}, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()}")
        return done

    def states(self):
        """The state of each node."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).stdout.split()

    def job(self, job):
        """What SLURM knows about a job: {"JobState": "RUNNING", ...}."""
        def ask():
            done = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
            if done.returncode != 0 and "Unable to contact" not in done.stderr:  # it is busy
                raise AssertionError(f"{done.stderr}\n{self.log()}")
            return done.stdout
        text = self.wait_for(ask, f"answer about job {job}")
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def queue(self):
        return self.run("squeue", "--noheader", "--format=%i %j %T %r").stdout.splitlines()

    def log(self):
        text = ""
        for path in sorted((self.folder / "log").iterdir()):
            text += f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]) + "\n"
        return text

    def wait_for(self, condition, what, patience=600):
        """Waits for others; how long it takes is no test. What the condition says when it holds."""
        end = time.monotonic() + patience
        while not (found := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"still no {what} after {patience} s\n{self.log()}")
            time.sleep(0.3)
        return found
