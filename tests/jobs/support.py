"""The real binaries as child processes: a scratch folder with a corpus, a dataset and a trained checkpoint."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest

BIN = os.environ["TFORGE_BIN_DIR"]
MPIRUN = os.environ.get("TFORGE_MPIRUN", "mpirun -n").split()
JOBS = ["tf_prepare", "tf_train", "tf_expand", "tf_eval", "tf_generate", "tf_inspect", "tf_plan"]
CHAPTER = "^Ge[0-9]+:1 "

CONFIG = """\
[model]
kind = "tokenformer"
layers = 2
dim = 32
heads = 4
max_seq = 64
[model.tokens]
query = 12
key = 12
value = 12
proj = 12
ffn = 24
[data]
path = "data.h5"
[train]
batch = 4
steps = 6
lr = 3e-3
warmup_steps = 2
eval_every = 3
eval_tokens = 512
[run]
dir = "run"
save_every = 3
threads = 1
"""


class Ended:
    """What a job left behind: exit code, standard output and error, and its own lines of error."""

    def __init__(self, command, done):
        self.command, self.code = " ".join(command), done.returncode
        self.out = done.stdout.decode("utf-8", "replace")
        self.err = done.stderr.decode("utf-8", "replace")
        # mpirun adds lines of its own after a job that fails; ours begin with the job's name.
        self.errors = re.findall(r"^tf_\w+: error: .*$", self.err, re.M)

    def __str__(self):
        return f"{self.command}\nexit code {self.code}\n{self.out}\n{self.err}"


def names_in(folder):
    return sorted(os.listdir(folder))


def configured(config, *settings):
    """The words of a command line for a configuration with settings of its own."""
    return ["--config", config] + [word for setting in settings for word in ("--set", setting)]


class JobTest(unittest.TestCase):
    """Each class has a scratch folder of its own, which is where its jobs run."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="tforge_jobs_")
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.write("tiny.toml", CONFIG)
        text = subprocess.run(["bible", "-f", "gen1:1-gen20:30"], capture_output=True, check=True).stdout
        cls.write("kjv.txt", text)
        cls.finish(cls.run_job("tf_prepare", "kjv.txt", "--document-start", CHAPTER, "--vocab", 400, "--output", "data.h5"))

    @classmethod
    def train(cls):
        """Six updates on two ranks: cls.checkpoint."""
        cls.trained = cls.finish(cls.run_job("tf_train", "--config", "tiny.toml", ranks=2))
        cls.checkpoint = "run/step_00000006.h5"

    @staticmethod
    def finish(ended):
        if ended.code != 0:
            raise AssertionError(str(ended))
        return ended

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder, name)

    @classmethod
    def write(cls, name, content):
        with open(cls.path(name), "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return name

    @classmethod
    def read(cls, name):
        with open(cls.path(name), "rb") as file:
            return file.read()

    @classmethod
    def run_job(cls, job, *arguments, ranks=0, env=None):
        """ranks = 0: without a launcher."""
        command = (MPIRUN + [str(ranks)] if ranks else []) + [os.path.join(BIN, job)] + [str(a) for a in arguments]
        done = subprocess.run(command, capture_output=True, cwd=cls.folder, timeout=240, env={**os.environ, **(env or {})})
        return Ended(command, done)

    def ok(self, job, *arguments, **options):
        ended = self.run_job(job, *arguments, **options)
        self.assertEqual(ended.code, 0, ended)
        self.assertEqual(ended.errors, [], ended)
        return ended

    def metrics(self, folder):
        """The lines of metrics.jsonl of a run."""
        return [json.loads(line) for line in self.read(f"{folder}/metrics.jsonl").splitlines()]

    def losses(self, folder):
        return {line["step"]: line["loss"] for line in self.metrics(folder) if "loss" in line}

    def evaluate(self, checkpoint, *arguments, ranks=0, split="validation"):
        """What tf_eval writes with --json."""
        self.ok("tf_eval", "--checkpoint", checkpoint, "--data", "data.h5", "--split", split, "--json", "eval.json",
                "--threads", 1, *arguments, ranks=ranks)
        return json.loads(self.read("eval.json"))

    def nll(self, checkpoint, *arguments, ranks=0):
        return self.evaluate(checkpoint, *arguments, ranks=ranks)["nll"]

    def same_tensors(self, a, b):
        """Parameters and moments of both checkpoints are the same bits; how many tensors these are."""
        import h5py  # the other tests do without it

        with h5py.File(self.path(a), "r") as x, h5py.File(self.path(b), "r") as y:
            paths = []
            x.visititems(lambda name, item: paths.append(name)
                         if isinstance(item, h5py.Dataset) and name.split("/")[0] in ["model", "optim"] else None)
            self.assertGreater(len(paths), 0)
            for path in paths:
                self.assertEqual(x[path][:].tobytes(), y[path][:].tobytes(), path)
        return len(paths)

    def fails(self, code, message, job, *arguments, **options):
        """The job ends with `code` and one line, "<job>: error: <message>"; # in the message is any run of letters."""
        ended = self.run_job(job, *arguments, **options)
        pattern = re.escape(f"{job}: error: {message}").replace(r"\#", ".*")
        self.assertEqual(ended.code, code, ended)
        self.assertEqual(len(ended.errors), 1, ended)
        self.assertRegex(ended.errors[0], f"^{pattern}$", ended)
        for trace in ["terminate called", "what():", "Segmentation", "HDF5-DIAG"]:
            self.assertNotIn(trace, ended.err, ended)
        if not options.get("ranks"):
            # Nothing but the log and our line.
            for line in ended.err.splitlines():
                self.assertRegex(line, r"^(\d\d:\d\d:\d\d |tf_\w+: error: )", ended)
        return ended


class SmallDisk:
    """A tmpfs; mounting needs root."""

    def __init__(self, test, size):
        self.folder = tempfile.mkdtemp(prefix="tforge_disk_")
        test.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.folder]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
            test.skipTest("mounting a small disk needs root")
        test.addCleanup(subprocess.run, ["umount", "-l", self.folder], check=True)
