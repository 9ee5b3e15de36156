"""train.sbatch and submit_stages on a SLURM cluster of three nodes: warned, requeued, out of time, crashed, cut off.

A rank is held at a call that changes a file while the fault strikes. Whatever struck, the job must go on by itself, end
like the quiet run under mpirun, and take along the job that waits for it."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import slurm_cluster
from world import DATA, EXPAND, FIRST, ONE, SECOND, TENSOR, Job, content_of, losses_of, require

SLURM = pathlib.Path(__file__).resolve().parents[2] / "slurm"
PATIENCE = 600
# In the path of a cluster's jobs instead of the real program. A job for which there is a file of its name in holds/ is
# held where that says (RANK CALL).
PROGRAM = """\
#!/bin/sh
hold={folder}/holds/$SLURM_JOB_NAME
if [ -n "$SLURM_STEP_ID" ] && [ -e "$hold" ]; then
  read -r FAULTS_RANK call <"$hold"
  export FAULTS_RANK FAULTS_HOLD="$call {folder}/held/$SLURM_JOB_NAME" FAULTS_FOLDER={folder}/work
  export LD_PRELOAD={record_io}
fi
exec {program} "$@"
"""
# Updates have 4 * 16 tokens; the ranks change with every stage.
PLAN = """\
[chain]
name = "chain"
dir = "work/chain"
config = "tiny.toml"
data = "{data}"
[[stage]]
tokens = 768
ranks = 1
[[stage]]
tokens = 768
grow = {{ query = 12, key = 12, value = 12, proj = 12, ffn = 24 }}
ranks = 2
nodes = 2
set = ["parallel.tp=2", "parallel.token_shards=append"]
[[stage]]
tokens = 768
grow = {{ query = 16, ffn = 32 }}
ranks = 3
nodes = 3
[expand]
ranks = 2
[eval]
split = "test"
ranks = 2
"""
STEPS = ["train1", "grow2", "train2", "grow3", "train3", "eval"]
ENDS = ["stage1/step_00000012.h5", "stage2/step_00000024.h5", "stage3/step_00000036.h5"]


class Site:
    """A cluster of a trial's own. Its jobs work in folder/work."""

    def __init__(self, world, folder):
        self.world, self.folder = world, folder
        for name in ("bin", "holds", "held"):
            (folder / name).mkdir()
        for name in ("tf_train", "tf_expand", "tf_eval"):
            program = folder / "bin" / name
            program.write_text(PROGRAM.format(folder=folder, record_io=world.record_io, program=world.jobs / name))
            program.chmod(0o755)
        (folder / "bin/tf_inspect").symlink_to(world.jobs / "tf_inspect")
        self.cluster = slurm_cluster.SlurmCluster(folder / "cluster", nodes=3, kill_wait=3, shared=world.folder)
        self.variables = {"PATH": f"{folder}/bin:{self.cluster.environment['PATH']}",
                     "OMPI_MCA_btl_vader_backing_directory": "/dev/shm"}  # each node's own

    def __enter__(self):
        self.cluster.__enter__()
        return self

    def __exit__(self, *_):
        self.cluster.stop()

    def hold(self, name, rank, call):
        (self.folder / "holds" / name).write_text(f"{rank} {call}\n")

    def sbatch(self, *words):
        return self.cluster.run("sbatch", "--parsable", f"--chdir={self.folder}", *words, env=self.variables).stdout.strip()

    def train(self, stage, layout, options, settings):
        """Two ranks on two nodes."""
        job = self.sbatch("--job-name=train", "--nodes=2", "--ntasks=2", f"--output={self.folder}/log", *options,
                          SLURM / "train.sbatch", *layout.command(stage)[2:], *settings)
        return Run(self, "train", job, self.folder / "log")

    def stages(self, command):
        """submit_stages with the plan."""
        return self.cluster.run(sys.executable, SLURM / "submit_stages", command, self.folder / "plan.toml",
                                env=self.variables).stdout

    def submit_chain(self):
        """{"train1": Run, ...} of the jobs that were missing."""
        found = re.findall(r"(\w+): submitted as job (\d+)", self.stages("submit"))
        return {step: Run(self, f"chain.{step}", job, self.folder / f"work/chain/logs/{step}-{job}.log")
                for step, job in found}

    def lose(self, node):
        """A crash that SLURM knows of at once; the node is booted again."""
        self.cluster.crash(node)
        self.cluster.run("scontrol", "update", f"nodename=n{node}", "state=down", "reason=crash")
        self.cluster.boot(node)

    def wait_for(self, condition, what):
        self.cluster.wait_for(condition, what, PATIENCE)

    def wait_for_empty_queue(self):
        def empty():
            done = self.cluster.run("squeue", "--noheader", "--format=%i %j %r", check=False)  # the controller may be away
            require("held" not in done.stdout, f"SLURM holds a job: {done.stdout}\n{self.cluster.log()}")
            return done.returncode == 0 and not done.stdout
        self.wait_for(empty, "end of the jobs")


class Run:
    """A job of the cluster."""

    def __init__(self, site, name, job, log):
        self.site, self.cluster, self.name, self.job, self.log_file = site, site.cluster, name, job, log

    def log(self):
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def about(self, field):
        return self.cluster.job(self.job)[field]

    def restarts(self):
        return int(self.about("Restarts"))

    def struck(self):
        """Waits until the rank is held; False when the job has ended before."""
        marker = self.site.folder / "held" / self.name
        alive = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        self.site.wait_for(lambda: marker.exists() or self.about("JobState") not in alive,
                           f"moment to strike {self.name}")
        (self.site.folder / "holds" / self.name).unlink()  # the next start is not held
        return marker.exists()

    def pids(self):
        """{rank: process id} of the ranks of a start that is held."""
        found = {}
        mine = f"FAULTS_FOLDER={self.site.folder}/work\0".encode()
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mine in (text := pathlib.Path(entry.path, "environ").read_bytes()):
                    found[int(re.search(rb"\0SLURM_PROCID=(\d+)", b"\0" + text)[1])] = int(entry.name)
        return found

    def signal(self, number):
        for pid in self.pids().values():
            Job.send(pid, number)

    def go_on(self):
        self.signal(signal.SIGCONT)

    def nodes(self):
        """Numbers of its nodes; the first is that of the script."""
        names = self.cluster.run("scontrol", "show", "hostnames", self.about("NodeList")).stdout.split()
        return [int(name[1:]) for name in names]

    def wait_for_restart(self):
        self.site.wait_for(lambda: self.restarts() > 0, f"restart of {self.name}\n{self.log()}")


class Slurm:
    name, short, long = "slurm", 5, 80
    missing = staticmethod(slurm_cluster.missing)

    def __init__(self, world):
        self.world = world
        self.lock = threading.Lock()
        self.quiet_chain = None

    def trial(self, number, rng):
        kinds = [self.warning, self.requeue, self.node_taken_away, self.controller, self.chain, self.crash, self.cut,
                 self.time_limit]
        return kinds[number % len(kinds)](number, rng)

    def strike(self, number, rng, fault, options=("--time=60",), settings=()):
        """A training on two nodes that is held at a call and struck there."""
        stage, layout = rng.choice([FIRST, SECOND]), rng.choice([TENSOR, DATA])
        quiet = self.world.quiet(stage, layout)
        folder = self.world.trial_folder(f"slurm_{number}", stage, layout)
        rank = rng.randrange(2)
        with Site(self.world, folder) as site:
            site.hold("train", rank, rng.randrange(quiet.calls[rank]))
            run = site.train(stage, layout, options, settings)
            waits = site.sbatch(f"--dependency=afterok:{run.job}", "--kill-on-invalid-dep=yes", "--wrap=true")
            ending = fault(run, rank, rng) if run.struck() else "ended before"
            site.wait_for_empty_queue()
            for job in (run.job, waits):
                state = site.cluster.job(job)["JobState"]
                require(state == "COMPLETED", f"job {job} ended as {state}\n{run.log()}\n{site.cluster.log()}")
            require("the grace (run.grace_s) ends" not in run.log(), f"it did not stop by itself:\n{run.log()}")
            require("DAMAGED" not in run.log(), f"what a save left is taken for damage:\n{run.log()}")
        self.world.ends_like_the_quiet_run(stage, layout, folder)
        return ending

    def warning(self, number, rng):
        def fault(run, *_):
            run.cluster.run("scancel", "--signal=USR1", run.job)
            run.go_on()
            run.site.wait_for_empty_queue()
            return f"scancel --signal=USR1: {'saved, requeued and went on' if run.restarts() else 'ended before'}"
        return self.strike(number, rng, fault)

    def requeue(self, number, rng):
        def fault(run, *_):
            run.cluster.run("scontrol", "requeue", run.job)
            run.wait_for_restart()
            return "scontrol requeue: went on"
        return self.strike(number, rng, fault)

    def node_taken_away(self, number, rng):
        def fault(run, _, rng):
            node, how = f"n{rng.choice(run.nodes())}", rng.choice(["drain", "down"])
            run.cluster.run("scontrol", "update", f"nodename={node}", f"state={how}", "reason=test")
            if how == "drain":
                run.cluster.run("scontrol", "requeue", run.job)
            run.wait_for_restart()
            run.go_on()
            run.site.wait_for_empty_queue()
            if how == "drain":
                require(node not in run.about("NodeList"), f"{node} is drained, but used: {run.about('NodeList')}")
            return f"a node set to {how}: went on"
        return self.strike(number, rng, fault)

    def controller(self, number, rng):
        """It is away while the run goes on, or while the job wants to requeue itself."""
        def fault(run, rank, rng):
            stops, how = rng.random() < 0.5, rng.choice([signal.SIGTERM, signal.SIGKILL])
            if how == signal.SIGKILL:
                time.sleep(6)  # it saves its state every five seconds; without this one it would know of no such run
            run.cluster.end("slurmctld", how)
            if stops:
                Job.send(run.pids()[rank], signal.SIGUSR1)
            run.go_on()
            time.sleep(rng.uniform(0, 15))
            run.cluster.start_controller()
            run.site.wait_for_empty_queue()
            return f"controller ended by {how.name}{', SIGUSR1 meanwhile' if stops else ''}: went on"
        return self.strike(number, rng, fault)

    def crash(self, number, rng):
        def fault(run, _, rng):
            nodes = run.nodes()
            node, again = rng.choice(nodes), rng.choice([None, rng.uniform(0, 60)])
            run.cluster.crash(node)
            run.go_on()
            if again is not None:
                time.sleep(again)
                run.cluster.boot(node)
            run.wait_for_restart()
            return (f"crash of {'the first' if node == nodes[0] else 'another'} node"
                    f"{'' if again is None else ', booted again'}: went on")
        return self.strike(number, rng, fault, settings=["--set", "parallel.timeout_s=10"])

    def cut(self, number, rng):
        def fault(run, _, rng):
            nodes = run.nodes()
            node, again = rng.choice(nodes), rng.choice([None, rng.uniform(0, 60)])
            run.cluster.cut(node)
            run.go_on()
            if again is not None:
                time.sleep(again)
                run.cluster.mend(node)
            run.site.wait_for_empty_queue()
            named = re.search(rf"rank \d \(n{node}, pid \d+\) is missing", run.log())
            return (f"link of {'the first' if node == nodes[0] else 'another'} node cut"
                    f"{'' if again is None else ' and mended'}: {'named, ' if named else ''}"
                    f"{'went on' if run.restarts() else 'ended before'}")
        return self.strike(number, rng, fault, settings=["--set", "parallel.timeout_s=10"])

    def time_limit(self, number, rng):
        """Warned by SLURM; by its own clock; or missed, which SLURM ends with SIGKILL."""
        how = ["warned", "own clock", "missed"][number // 8 % 3]

        def fault(run, rank, _):
            if how == "own clock":
                environ = pathlib.Path(f"/proc/{run.pids()[rank]}/environ").read_bytes()
                end = int(re.search(rb"\0SLURM_JOB_END_TIME=(\d+)", environ)[1])
                time.sleep(max(0, end - 4 - time.time()))
                run.go_on()
            pids = run.pids().values()
            while how == "missed" and any(os.path.exists(f"/proc/{pid}") for pid in pids):
                for pid in pids:
                    Job.send(pid, signal.SIGSTOP)  # whatever SLURM sends to make them go on
                time.sleep(0.001)
            run.site.wait_for_empty_queue()
            return f"time limit, {how}: {'went on' if run.restarts() else 'ended before'}"
        # The batch script does not heed SIGCONT: nobody is warned.
        options = ["--time=1"] + ([] if how == "warned" else ["--signal=B:CONT@1"])
        return self.strike(number, rng, fault, options)

    def quiet(self):
        """The chain as it goes without SLURM and without faults: a folder."""
        with self.lock:
            if not self.quiet_chain:
                folder = self.world.new_folder("slurm_quiet")
                (folder / "plan.toml").write_text(PLAN.format(data=self.world.data))
                command = [sys.executable, SLURM / "submit_stages", "local", folder / "plan.toml", "--launcher",
                           " ".join(self.world.mpirun)]
                done = subprocess.run(command, capture_output=True, text=True,
                                      env={**os.environ, "PATH": f"{self.world.jobs}:{os.environ['PATH']}"})
                require(done.returncode == 0, f"{done.stdout}\n{done.stderr}")
                self.quiet_chain = folder
            return self.quiet_chain

    def chain(self, number, rng):
        """One failure in every job of a chain; where that ends it, it is submitted again."""
        quiet = self.quiet()
        calls = {"train": min(self.world.quiet(FIRST, ONE).calls[0], self.world.quiet(SECOND, TENSOR).calls[0]),
                 "grow": self.world.quiet(EXPAND, TENSOR).calls[0], "eval": 4}
        faults = {"USR1": lambda run: run.cluster.run("scancel", "--signal=USR1", run.job),
                  "requeue": lambda run: run.cluster.run("scontrol", "requeue", run.job),
                  "crash": lambda run: run.site.lose(run.nodes()[0]),
                  "cancel": lambda run: run.cluster.run("scancel", run.job),
                  "kill": lambda run: Job.send(run.pids()[0], signal.SIGKILL)}
        folder = self.world.new_folder(f"slurm_{number}")
        (folder / "plan.toml").write_text(PLAN.format(data=self.world.data))
        with Site(self.world, folder) as site:
            for step in STEPS:
                site.hold(f"chain.{step}", 0, rng.randrange(calls[step.rstrip("0123456789")]))
            runs = site.submit_chain()
            require(list(runs) == STEPS, runs)
            struck = 0
            for step in STEPS:
                run = runs[step]
                if not run.struck():
                    continue
                struck += 1
                how = rng.choice([name for name in faults if name != "USR1" or step.startswith("train")])
                faults[how](run)
                run.go_on()
                # It ends the chain, and SLURM removes those that wait.
                if how == "cancel" or how == "kill" and not step.startswith("train"):
                    site.wait_for_empty_queue()
                    again = site.submit_chain()
                    # Where it had done its work before it was ended, that is not repeated.
                    rest = STEPS[STEPS.index(step):]
                    require(list(again) in (rest, rest[1:]), f"after {how} in {step}: submitted {list(again)}")
                    runs.update(again)
            site.wait_for_empty_queue()
            report = site.stages("status")
            require("everything is done" in report, f"{report}\n{site.cluster.log()}")
        a, b = quiet / "work/chain", folder / "work/chain"
        for end in map(pathlib.Path, ENDS):
            require(content_of(a / end) == content_of(b / end), f"WRONG: {b / end} differs from the quiet chain's")
            require(losses_of(a / end.parent) == losses_of(b / end.parent), f"WRONG: losses of {b / end.parent}")
        results = [json.loads((each / "eval.json").read_text())["nll_sum"] for each in (a, b)]
        require(results[0] == results[1], f"WRONG: evaluations differ: {results}")
        return f"a chain with failures in {struck} of {len(STEPS)} jobs: ended alike"
