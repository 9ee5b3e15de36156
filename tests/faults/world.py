"""What every trial needs: the jobs as processes, faults that strike them, and the quiet runs that all must end like."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import h5py

# A run is a matter of starting up and of saving.
CONFIG = """\
[model]
kind = "tokenformer"
layers = 1
dim = 16
heads = 2
max_seq = 16
{tokens}[data]
path = "{data}"
[train]
batch = 4
steps = {steps}
lr = 3e-3
warmup_steps = 2
eval_every = 5
eval_tokens = 128
[train.growth]
moments = "reset"
[run]
dir = "work/run"
save_every = 2
keep_last = 2
threads = 1
"""
TOKENS = """\
[model.tokens]
query = 8
key = 8
value = 8
proj = 8
ffn = 16
"""
GROWN = "query=12,key=12,value=12,proj=12,ffn=24"
PATIENCE = 600  # seconds after which a job hangs; a busy disk may take minutes to sync
CHAPTER = "^Ge[0-9]+:1 "


class Failed(Exception):
    """A trial that did not end as promised."""


def require(condition, what):
    if not condition:
        raise Failed(str(what))


def name_of(step):
    return f"step_{step:08}.h5"


def manifest_of(path):
    return path.with_name(path.name + ".manifest")


def content_of(path):
    """A digest for each thing that a later step depends on, read by h5py: parameters, moments, ages, counters."""
    content = {}
    with h5py.File(path) as file:
        def visit(name, item):
            if name.split("/")[0] not in ("model", "optim", "state", "growth", "tokenizer"):
                return
            attributes = {k: v for k, v in item.attrs.items() if k not in ("created", "parent_uuid", "parent_digest")}
            text = repr(sorted((k, str(v)) for k, v in attributes.items())).encode()
            data = item[...].tobytes() if isinstance(item, h5py.Dataset) else b""
            content[name] = hashlib.sha256(text + data).hexdigest()
        file.visititems(visit)
    return content


def losses_of(run):
    """{step: loss as text}; no step may be there twice."""
    losses = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        if "loss" in found:
            require(found["step"] not in losses, f"step {found['step']} is twice in {run}/metrics.jsonl")
            losses[found["step"]] = repr(found["loss"])
    return losses


def environment(**more):
    return {**os.environ, "OMPI_MCA_ess_singleton_isolated": "1", **{k: str(v) for k, v in more.items()}}


class Strike:
    """Where a fault strikes: at a call of a rank that changes a file, or after some seconds."""

    def __init__(self, rank=0, call=None, seconds=None):
        self.rank, self.call, self.seconds = rank, call, seconds

    def __str__(self):
        return f"call {self.call} of rank {self.rank}" if self.call is not None else f"{self.seconds:.3f} s"


class Job:
    """A running job. `folder` is where it runs; its files are below folder/work, its output is in folder/log."""

    def __init__(self, world, folder, command, ranks, strike=None, **variables):
        self.folder, self.ranks, self.strike = folder, ranks, strike
        self.marker = folder / "held"
        with contextlib.suppress(FileNotFoundError):
            self.marker.unlink()
        env = {}
        if strike and strike.call is not None:
            env = {"FAULTS_HOLD": f"{strike.call} {self.marker}", "FAULTS_RANK": strike.rank}
        env.update(variables)
        if any(name.startswith("FAULTS_") for name in env):
            env.update(LD_PRELOAD=world.record_io, FAULTS_FOLDER=folder / "work")
        launcher = world.mpirun + [str(ranks)] if ranks else []
        words = [str(word) for word in launcher + [world.jobs / command[0]] + list(command[1:])]
        self.words = " ".join(words)
        self.start_of_log = (folder / "log").stat().st_size if (folder / "log").exists() else 0
        with open(folder / "log", "ab") as log:
            self.process = subprocess.Popen(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=environment(**env))
        self.began = time.monotonic()

    def log(self):
        with open(self.folder / "log", "rb") as file:
            file.seek(self.start_of_log)
            return file.read().decode("utf-8", "replace")

    def pids(self):
        """{rank: process id} of the ranks that live."""
        if not self.ranks:
            return {0: self.process.pid} if self.process.poll() is None else {}
        found = {}
        for entry in glob.glob("/proc/[0-9]*/stat"):
            pid = int(entry.split("/")[2])
            try:
                with open(entry) as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
                if int(parent) != self.process.pid or state == "Z":
                    continue
                with open(f"/proc/{pid}/environ", "rb") as file:
                    rank = re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", file.read())
            except OSError:
                continue
            if rank:
                found[int(rank[1])] = pid
        return found

    def wait_for(self, condition, seconds=PATIENCE):
        """True once the condition holds; False when the job has ended before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return condition()
            if time.monotonic() > end:
                self.kill()
                raise Failed(f"hangs: {self.words}\n{self.log()}")
            time.sleep(0.001)
        return True

    def struck(self):
        """Waits for the moment of the strike; False when the job has ended before."""
        if self.strike.call is None:
            time.sleep(max(0, self.began + self.strike.seconds - time.monotonic()))
            return self.process.poll() is None
        return self.wait_for(self.marker.exists)

    def go_on(self, pids):
        """A rank that was held may go on, where it still lives."""
        for pid in pids.values():
            self.send(pid, signal.SIGCONT)

    @staticmethod
    def send(pid, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self):
        for pid in [*self.pids().values(), self.process.pid]:
            self.send(pid, signal.SIGKILL)

    def end(self, seconds=PATIENCE):
        """Its exit code, once the launcher and all ranks are gone."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"hangs: {self.words}\n{self.log()}")
        # Ranks whose launcher was killed end a little later.
        end = time.monotonic() + seconds
        while self.left():
            require(time.monotonic() < end, f"a rank outlives its launcher: {self.words}\n{self.log()}")
            time.sleep(0.01)
        return self.process.returncode

    def left(self):
        """Processes that run in the folder."""
        found = []
        for entry in glob.glob("/proc/[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry) == str(self.folder):
                    found.append(int(entry.split("/")[2]))
        return found

    def ends_with(self, *codes):
        code = self.end()
        require(code in codes, f"exit code {code}, want {codes}: {self.words}\n{self.log()}")
        return self


class Stage:
    """One link of the chain train -> expand -> train. It begins with the result of the link before it."""

    def __init__(self, name, command, result, before=None):
        self.name, self.command, self.result, self.before = name, command, result, before


TRAIN = ["tf_train", "--config", "tiny.toml"]
FIRST = Stage("first", TRAIN, "run/" + name_of(12))
EXPAND = Stage("expand", ["tf_expand", "--checkpoint", "work/" + name_of(12), "--output", "work/grown.h5", "--tokens",
                          GROWN], "grown.h5", FIRST)
SECOND = Stage("second", ["tf_train", "--config", "grown.toml", "--init", "work/grown.h5"], "run/" + name_of(24),
               EXPAND)


class Layout:
    """Ranks and how they share the work."""

    def __init__(self, name, ranks, settings):
        self.name, self.ranks, self.settings = name, ranks, settings

    def command(self, stage):
        return stage.command + (self.settings if stage.command[0] == "tf_train" else [])


# In the last two both ranks write into every checkpoint.
ONE = Layout("1x1", 1, [])
TENSOR = Layout("1x2", 2, ["--set", "parallel.dp=1", "--set", "parallel.tp=2"])
DATA = Layout("2x1", 2, ["--set", "parallel.dp=2", "--set", "parallel.zero=1"])
LAYOUTS = [ONE, TENSOR, DATA]


def chain_to(stage):
    return (chain_to(stage.before) if stage.before else []) + [stage]


class Quiet:
    """How a stage goes and ends on its own."""

    def __init__(self, folder, stage, layout, seconds, events):
        self.folder, self.seconds = folder, seconds
        self.content = content_of(folder / "work" / stage.result)
        self.losses = losses_of(folder / "work/run") if stage is not EXPAND else {}
        # Calls of each rank that a fault can strike at.
        self.calls = [0] * layout.ranks
        for event in events:
            self.calls[event.rank] += event.when != "END"


class Event:
    """One record of record_io.c."""

    def __init__(self, name, when, rank, inode, offset, data, size, paths):
        self.name, self.when, self.rank, self.inode = name, when, rank, inode
        self.offset, self.data, self.size, self.paths = offset, data, size, paths


def read_log(path):
    events = []
    if not path.exists():
        return events
    text = path.read_bytes()
    at = 0
    while at < len(text):
        end = text.index(b"\n", at)
        name, when, rank, inode, offset, size, paths = text[at:end].decode().split(" ", 6)
        size = int(size)
        at = end + 1 + size
        events.append(Event(name, when, int(rank), int(inode), int(offset), text[end + 1:at], size,
                            [os.path.basename(p) for p in paths.split(" -> ")]))
    return events


def scratch():
    """Memory where there is enough: what counts is what the jobs ask of a disk, which may take minutes to sync."""
    memory = "/dev/shm"
    return memory if os.path.isdir(memory) and shutil.disk_usage(memory).free > 1 << 30 else None


class World:
    """A scratch folder with a dataset and the quiet runs; trials have folders of their own in it."""

    def __init__(self, build):
        self.jobs = pathlib.Path(build).absolute() / "jobs"
        tools = pathlib.Path(build).absolute() / "tests/faults"
        self.record_io, self.loader = tools / "libfaults_record_io.so", tools / "faults_loader"
        self.mpirun = os.environ.get("TFORGE_MPIRUN", "mpirun -n").split()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="tforge_faults_", dir=scratch())).absolute()
        # What killed ranks leave there goes with the folder.
        os.environ["OMPI_MCA_btl_vader_backing_directory"] = str(self.folder)
        self.data = self.folder / "data.h5"
        self.quiet_runs = {}
        self.lock = threading.Lock()
        text = subprocess.run(["bible", "-f", "gen1:1-gen20:30"], capture_output=True, check=True).stdout
        (self.folder / "text").write_bytes(text)
        self.prepare_command = ["tf_prepare", self.folder / "text", "--document-start", CHAPTER]
        folder = self.new_folder("prepare")
        Job(self, folder, self.prepare_command + ["--vocab", "400", "--output", self.data], 0).ends_with(0)

    def new_folder(self, name):
        folder = self.folder / name
        (folder / "work").mkdir(parents=True)
        (folder / "tiny.toml").write_text(CONFIG.format(data=self.data, tokens=TOKENS, steps=12))
        # The second stage takes its size from the grown checkpoint.
        (folder / "grown.toml").write_text(CONFIG.format(data=self.data, tokens="", steps=24))
        return folder

    def trial_folder(self, name, stage, layout):
        """A new folder with what the stage begins with."""
        folder = self.new_folder(name)
        if stage.before:
            source = self.quiet_runs[stage.before, layout].folder / "work" / stage.before.result
            for path in (source, manifest_of(source)):
                shutil.copyfile(path, folder / "work" / path.name)
        return folder

    def quiet(self, stage, layout):
        """The stage as it goes without faults, and what of it a fault can strike."""
        with self.lock:
            for each in chain_to(stage):
                if (each, layout) not in self.quiet_runs:
                    self.quiet_runs[each, layout] = self.run_quietly(each, layout)
            return self.quiet_runs[stage, layout]

    def run_quietly(self, stage, layout):
        folder = self.trial_folder(f"quiet_{stage.name}_{layout.name}", stage, layout)
        job = Job(self, folder, layout.command(stage), layout.ranks).ends_with(0)
        seconds = time.monotonic() - job.began
        recorded = self.trial_folder(f"recorded_{stage.name}_{layout.name}", stage, layout)
        Job(self, recorded, layout.command(stage), layout.ranks, FAULTS_LOG=recorded / "events").ends_with(0)
        quiet = Quiet(folder, stage, layout, seconds, read_log(recorded / "events"))
        require(quiet.content == content_of(recorded / "work" / stage.result), "two quiet runs differ")
        return quiet

    def goes_on(self, stage, layout, folder):
        """Started again without a fault, the stage ends like the quiet run."""
        # tf_expand refuses to replace what is complete.
        if stage is not EXPAND or not manifest_of(folder / "work" / stage.result).exists():
            job = Job(self, folder, layout.command(stage), layout.ranks).ends_with(0)
            require("DAMAGED" not in job.log(), f"what a save left is taken for damage: {folder}\n{job.log()}")
        self.ends_like_the_quiet_run(stage, layout, folder)

    def ends_like_the_quiet_run(self, stage, layout, folder):
        quiet = self.quiet(stage, layout)
        content = content_of(folder / "work" / stage.result)
        different = sorted(k for k in content.keys() | quiet.content.keys() if content.get(k) != quiet.content.get(k))
        require(not different, f"WRONG: {stage.result} of {folder} differs from the quiet run's in {different}")
        written = folder / "work" if stage is EXPAND else folder / "work/run"
        left = [name for name in os.listdir(written) if name.endswith(".tmp") or ".damaged" in name]
        require(not left, f"left in {written}: {left}")
        if stage is not EXPAND:
            losses = losses_of(written)
            require(losses == quiet.losses, f"WRONG: losses differ from the quiet run's: {losses} {quiet.losses}")

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class Loader:
    """faults_loader as a process that answers for one folder after the other."""

    def __init__(self, world, config, ranks=0):
        launcher = world.mpirun + [str(ranks)] if ranks else []
        self.command = [str(word) for word in launcher + [world.loader, config]]
        self.process = None

    def ask(self, folder, resume="auto", salvage=""):
        """Its answer, a list of words. A crash or a hang is a failure."""
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, text=True, env=environment())
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(f"{folder}\t{resume}\t{salvage}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        timer.cancel()
        if not line.endswith("\n"):
            code = self.process.wait()
            self.process = None
            raise Failed(f"loading {folder} crashed or hung: exit code {code}")
        return line.rstrip("\n").split("\t")

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()
