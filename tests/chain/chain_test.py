"""Growth chains: plans that cannot be, the chain under mpirun and as SLURM jobs, stopped and gone on with."""

import glob
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import unittest

import h5py

import slurm_cluster
from support import BIN, CONFIG, MPIRUN, Ended, JobTest, names_in

SCRIPT = os.path.join(os.environ["TFORGE_SLURM_DIR"], "submit_stages")

# Updates have 4 * 64 tokens: 2, then 40 (one of them begun by half), then 4.
PLAN = """\
[chain]
dir = "chain"
config = "tiny.toml"
data = "data.h5"
set = ["train.eval_every=0", "run.save_every=2"]

[[stage]]
tokens = 512
ranks = 2
time = "00:10:00"

[[stage]]
tokens = 10_200
grow = { query = 16, key = 16, value = 16, proj = 16, ffn = 40 }
rule = "mirror"
ranks = 2
nodes = 2
set = ["parallel.tp=2", "parallel.token_shards=append"]

[[stage]]
tokens = 1024
grow = { query = 20, ffn = 48 }
ranks = 3

[expand]
ranks = 2

[eval]
split = "test"
ranks = 2
"""
STEPS = ["train1", "grow2", "train2", "grow3", "train3", "eval"]


class ChainTest(JobTest):
    PLAN, END = PLAN, "stage3/step_00000046.h5"

    @classmethod
    def plan(cls, name, *changes):
        """Writes NAME.toml for a chain in the folder NAME."""
        text = cls.PLAN.replace('dir = "chain"', f'dir = "{name}"')
        for old, new in changes:
            if text.count(old) != 1:
                raise AssertionError(f"{old!r} is {text.count(old)} times in the plan")
            text = text.replace(old, new)
        return cls.write(f"{name}.toml", text)

    @classmethod
    def command(cls, *words):
        command = [sys.executable, SCRIPT, *words]
        if words[0] == "local" and "--launcher" not in words:
            command += ["--launcher", " ".join(MPIRUN)]
        return command

    @classmethod
    def environment(cls, more=None):
        environment = {**os.environ, "PATH": BIN + ":" + os.environ["PATH"], **(more or {})}
        environment.pop("TFORGE_PREFIX", None)
        return environment

    @classmethod
    def stages(cls, *words, env=None):
        command = cls.command(*words)
        done = subprocess.run(command, capture_output=True, cwd=cls.folder, timeout=300, env=cls.environment(env))
        ended = Ended(command, done)
        ended.errors = [line for line in ended.err.splitlines() if line.startswith("submit_stages: error: ")]
        return ended

    def good(self, *words, **options):
        ended = self.stages(*words, **options)
        self.assertEqual((ended.code, ended.errors), (0, []), ended)
        return ended

    def bad(self, code, message, *words, **options):
        ended = self.stages(*words, **options)
        self.assertEqual(ended.code, code, ended)
        self.assertEqual(len(ended.errors), 1, ended)
        pattern = re.escape(message).replace(r"\#", ".*")
        self.assertRegex(ended.errors[0].removeprefix("submit_stages: error: "), pattern, ended)
        self.assertNotIn("Traceback", ended.err)
        return ended

    def standing(self, plan, **options):
        """{"train1": "done", ...}"""
        report = json.loads(self.good("status", plan, "--json", **options).out)
        return {step["step"]: step["state"] for step in report["steps"]}

    def assert_same_end(self, one, other):
        """Two chains ended with the same bits and the same state."""
        different = []
        with h5py.File(self.path(f"{one}/{self.END}")) as a, h5py.File(self.path(f"{other}/{self.END}")) as b:
            def compare(name, item):
                if isinstance(item, h5py.Dataset) and item[...].tobytes() != b[name][...].tobytes():
                    different.append(name)
            for group in ("model", "optim"):
                self.assertEqual(sorted(a[group]), sorted(b[group]))
                a[group].visititems(lambda name, item, group=group: compare(f"{group}/{name}", item))
            self.assertEqual(different, [])
            self.assertEqual(dict(a["state"].attrs), dict(b["state"].attrs))
        results = [json.loads(self.read(f"{chain}/eval.json")) for chain in (one, other)]
        self.assertEqual(results[0]["nll_sum"], results[1]["nll_sum"])


class Plans(ChainTest):
    """Nothing of this trains."""

    def refused(self, message, old, new, *command):
        plan = self.plan("bad", (old, new))
        before = names_in(self.folder)
        self.bad(2, message, *(command or ["submit"]), plan)
        self.assertEqual(names_in(self.folder), before)

    def test_files(self):
        for command in ["local", "status"]:
            self.refused("bad.toml: [chain]: dir is missing", 'dir = "bad"\n', "", command)
        self.bad(2, "none.toml: cannot be read: No such file or directory", "status", "none.toml")
        self.refused("bad.toml: Expected '=' after a key", "tokens = 512", "tokens 512")
        self.refused(f"bad.toml: [chain]: config: there is no file {self.folder}/none.toml (paths are seen from the plan's folder)",
                     '"tiny.toml"', '"none.toml"')
        self.refused(f"bad.toml: [chain]: data: there is no file {self.folder}/none.h5", '"data.h5"', '"none.h5"')
        self.refused("bad.toml: [chain]: dir is missing", 'dir = "bad"\n', "")

    def test_keys(self):
        self.refused("bad.toml: unknown section evall; did you mean `eval`?", "[eval]", "[evall]")
        self.refused("bad.toml: stage 1: unknown key tokns; did you mean `tokens`?", "tokens = 512", "tokns = 512")
        self.refused("bad.toml: stage 1: tokens = -512: want a whole number from 1", "tokens = 512", "tokens = -512")
        self.refused("bad.toml: stage 1: tokens = true: want a whole number from 1", "tokens = 512", "tokens = true")
        self.refused("bad.toml: stage 1: tokens is missing", "tokens = 512\n", "")
        self.refused("bad.toml: stage 1: ranks is missing; give ranks, or nodes and ranks_per_node", 'ranks = 2\ntime', "time")
        self.refused('bad.toml: stage 1: time = "soon": want a time as sbatch takes it', '"00:10:00"', '"soon"')
        self.refused("bad.toml: stage 2: nodes = 3 is more than the 2 ranks", "nodes = 2", "nodes = 3")
        self.refused("bad.toml: stage 2: ranks = 2, but nodes * ranks_per_node = 8; leave one out", "nodes = 2",
                     "nodes = 2\nranks_per_node = 4")
        self.refused('bad.toml: stage 2: rule = 3: want a text of one line', '"mirror"', '3')
        self.refused("bad.toml: stage 1: rule is about growth, and nothing grows here", "tokens = 512", 'tokens = 512\nrule = "mirror"')
        self.refused('bad.toml: [eval]: split = "tests": want one of train, validation, test', '"test"', '"tests"')

    def test_what_the_plan_itself_decides(self):
        self.refused('bad.toml: stage 2: set = ["train.steps=9"]: want a list of texts like "train.lr=3e-4", none of them a key '
                     "that the plan decides: data.path, train.steps", '"parallel.tp=2", "parallel.token_shards=append"', '"train.steps=9"')
        self.refused('bad.toml: [slurm]: options = ["--dependency=afterok:1"]: want a list of sbatch options', "[chain]",
                     '[slurm]\noptions = ["--dependency=afterok:1"]\n[chain]')
        self.refused('bad.toml: [slurm]: options = ["-p", "x"]: want a list of sbatch options', "[chain]",
                     '[slurm]\noptions = ["-p", "x"]\n[chain]')

    def test_growth_that_cannot_be(self):
        self.refused("bad.toml: stage 3: tf_expand: the model has 40 ffn tokens a layer and cannot shrink to 24; ask for more than 40",
                     "ffn = 48", "ffn = 24")
        self.refused("bad.toml: stage 2: tf_expand: nothing grows: ask for more than the model has of at least one of query, key, value, ",
                     "query = 16, key = 16, value = 16, proj = 16, ffn = 40", "query = 12, ffn = 24")
        self.refused("bad.toml: stage 3: tf_expand: 'qery' is nothing that a tokenformer grows by; there is query, key, value, proj, ffn; "
                     "did you mean `query`?", "query = 20", "qery = 20")
        self.refused("bad.toml: stage 2: tf_expand: 'mirrror' is no growth rule; there are zero-key, ", '"mirror"', '"mirrror"')
        for wrong in ["{ ffn = true }", "{ ffn = 0 }", "{}", "{ ffn = {} }", '"ffn=48"', '{ "ffn=48,query" = 20 }']:
            self.refused("bad.toml: stage 3: grow = #: want counts after the growth by the names of tf_expand --grow, like { ffn = 768 } or "
                         "{ attention.tables = 80 }", "{ query = 20, ffn = 48 }", wrong)
        self.refused("bad.toml: stage 1: grow: there is no model yet; [chain] config and set say what the first stage trains",
                     "tokens = 512", "tokens = 512\ngrow = { ffn = 48 }")
        self.refused("bad.toml: stage 2: set: model.tokens.ffn=40: the model is that of stage 1; `grow` makes it larger",
                     '"parallel.tp=2"', '"model.tokens.ffn=40"')

    def test_what_the_jobs_refuse(self):
        self.refused("bad.toml: stage 2: tf_expand: --set train.lrr: unknown key train.lrr; did you mean `train.lr`?",
                     '"parallel.tp=2"', '"train.lrr=2"')
        self.refused("bad.toml: stage 1: tf_train: --set model.heads: model.heads = 5 does not divide model.dim = 32",
                     '"train.eval_every=0"', '"model.heads=5"')
        self.refused("bad.toml: stage 1: 1 updates are fewer than the 2 of train.warmup_steps and train.decay_steps; train more "
                     "tokens or lower them", "tokens = 512", "tokens = 256")

    def test_layouts(self):
        """The plan refuses the layouts that tf_train refuses, and takes those that it takes."""
        for ranks, settings in [(3, ["parallel.tp=2"]), (2, ["parallel.dp=2", "parallel.tp=2"]), (4, ["parallel.dp=2", "parallel.tp=1"]),
                                (4, ["train.batch=3"]), (3, ["parallel.tp=3", "model.heads=2"]), (4, ["parallel.dp=2", "parallel.tp=2"]),
                                (4, ["parallel.dp=2", "parallel.tp=0"]), (3, ["parallel.tp=3"]), (4, ["parallel.dp=4"])]:
            options = ["--config", "tiny.toml", "--dry-run"]
            for setting in settings:
                options += ["--set", setting]
            truth = self.run_job("tf_train", *options, ranks=ranks).code
            self.write("layout.toml", f"""[chain]\ndir = "layout"\nconfig = "tiny.toml"\ndata = "data.h5"
                [[stage]]\ntokens = 512\nranks = {ranks}\nset = {settings}""")
            ended = self.stages("submit", "layout.toml", "--dry-run")
            self.assertEqual(ended.code, truth, f"{ranks} ranks with {settings}: {ended}")

    def test_tokens_that_added_ranks_cannot_share(self):
        self.refused("bad.toml: stage 2: 0 more of model.tokens.key cannot be split over 1 added ranks; grow more, add fewer ranks, or use "
                     "parallel.token_shards=even", "key = 16, ", "")

    def test_submission_as_it_would_be(self):
        ended = self.good("submit", self.plan("dry"), "--dry-run")
        self.assertFalse(os.path.exists(self.path("dry")))
        lines = [line for line in ended.out.splitlines() if ": sbatch " in line]
        self.assertEqual([line.split(":")[1].strip() for line in lines], STEPS)
        folder = self.path("dry")
        for line, parts in zip(lines, [
                ["--job-name=dry.train1", "--dependency=singleton ", "--ntasks=2 --time=00:10:00", "slurm/train.sbatch " + self.path("tiny.toml"),
                 "--set train.steps=2 ", f"--set run.dir={folder}/stage1"],
                ["--dependency=afterok:train1,singleton --kill-on-invalid-dep=yes", "expand.sbatch --checkpoint "
                 f"{folder}/stage1/step_00000002.h5 --output {folder}/grown2.h5 --grow query=16,key=16,value=16,proj=16,ffn=40 --rule mirror --expect-ranks 2"],
                ["--dependency=afterok:grow2", "--ntasks=2 --nodes=2", "train.steps=42", "model.tokens.ffn=40", f"--init {folder}/grown2.h5",
                 "--set parallel.tp=2 --set parallel.token_shards=append"],
                ["--grow query=20,ffn=48 "],
                ["--ntasks=3", "train.steps=46", f"--set run.dir={folder}/stage3"],
                ["eval.sbatch --checkpoint", f"{folder}/stage3/step_00000046.h5", "--split test"]]):
            for part in parts:
                self.assertIn(part, line)

    def test_one_schedule_for_the_whole_chain(self):
        plan = self.plan("continued", ('"train.eval_every=0"', '"train.growth.schedule=continue"'))
        lines = [line for line in self.good("submit", plan, "--dry-run").out.splitlines() if "train.sbatch" in line]
        for line, tokens in zip(lines, [512, 10752, 11776]):
            self.assertIn(f"--set train.steps=46 --set train.max_tokens={tokens} ", line)

    def test_nothing_is_done_yet(self):
        plan = self.plan("fresh")
        self.assertEqual(self.standing(plan), dict.fromkeys(STEPS, "to do"))
        self.assertIn("train1 is next and no job of it is waiting or running", self.good("status", plan).out)
        self.assertNotIn("fresh", names_in(self.folder))

    def test_exit_codes(self):
        """Which of them stop the chain, and which are tried again until that is in vain."""
        self.write("launcher", "#!/bin/sh\nexit $1\n")
        os.chmod(self.path("launcher"), 0o755)
        for code, ends, message, starts in [
                (11, 11, "train1 ended with exit code 11: the training diverged", 1), (13, 13, "restarts without progress", 1), (14, 14, "a second signal", 1),
                (2, 2, "ended with exit code 2", 1), (4, 4, "a checkpoint is damaged", 1), (3, 3, "exit code 3", 1),
                (70, 70, "a defect", 1), (1, 1, "failed", 1), (253, 253, "failed", 1),
                (10, 13, "train1: 3 restarts without a newer checkpoint, the last ended with exit code 10", 3),
                (12, 13, "3 restarts without a newer checkpoint", 3), (137, 13, "3 restarts without a newer checkpoint", 3)]:
            ended = self.bad(ends, message, "local", self.plan("codes"), "--launcher", f"{self.path('launcher')} {code}")
            self.assertEqual(ended.out.count("train1: " + self.path("launcher")), starts, ended)
        self.bad(70, "train1 ended well, but what it should have made is not in", "local", self.plan("codes"), "--launcher",
                 f"{self.path('launcher')} 0")
        self.bad(3, "none is not on the PATH; --launcher names another", "local", self.plan("codes"), "--launcher", "none")


class Local(ChainTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.whole = cls.finish(cls.stages("local", cls.plan("whole")))

    def test_the_whole_chain(self):
        self.assertIn("whole: everything is done", self.whole.out)
        self.assertEqual(self.standing("whole.toml"), dict.fromkeys(STEPS, "done"))
        info = json.loads(self.ok("tf_inspect", "--json", f"whole/{self.END}").out)
        self.assertEqual((info["step"], info["retention"], info["state"]["tokens"]), (46, "stage_end", 46 * 256))
        self.assertEqual([(r["step"], r["layer_group"], r["tokens_before"], r["tokens_after"], r["rule"]) for r in info["growth_history"]],
                         [(2, group, 12, 16, "mirror") for group in ["query", "key", "value", "proj"]] +
                         [(2, "ffn", 24, 40, "mirror"), (42, "query", 16, 20, "zero-key"), (42, "ffn", 40, 48, "zero-key")])
        result = json.loads(self.read("whole/eval.json"))
        self.assertEqual((result["uuid"], result["split"]), (info["uuid"], "test"))
        self.assertIn(f"{result['bits_per_byte']:.6f} bits per byte", self.good("status", "whole.toml").out)

    def test_nothing_is_done_twice(self):
        files = {path: os.stat(path).st_mtime_ns for path in glob.glob(self.path("whole/**/*"), recursive=True)}
        ended = self.good("local", "whole.toml")
        self.assertEqual(ended.out, "submit_stages: whole: everything is done\n")
        self.assertEqual({path: os.stat(path).st_mtime_ns for path in glob.glob(self.path("whole/**/*"), recursive=True)}, files)

    def kill_in_stage_2(self, plan, chain, number):
        """Starts the chain and signals submit_stages when the second stage has saved; returns its exit code."""
        with open(self.path(f"{chain}.log"), "wb") as log:
            process = subprocess.Popen(self.command("local", plan), cwd=self.folder, env=self.environment(), stdout=log, stderr=log)
        try:
            while not glob.glob(self.path(f"{chain}/stage2/*.manifest")):
                self.assertIsNone(process.poll(), self.read(f"{chain}.log").decode())
                time.sleep(0.005)
            process.send_signal(number)
            code = process.wait(60)
        finally:
            process.kill()
        self.assertFalse(os.path.exists(self.path(f"{chain}/stage3")))
        return code

    def go_on(self, plan):
        """The ranks of a submit_stages that was killed need a moment to stop."""
        for _ in range(100):
            ended = self.stages("local", plan)
            if "is being worked on by another submit_stages" not in ended.err:
                break
            time.sleep(0.1)
        self.assertEqual(ended.code, 0, ended)
        return ended

    def test_killed_and_gone_on_with(self):
        plan = self.plan("killed")
        self.assertEqual(self.kill_in_stage_2(plan, "killed", signal.SIGKILL), -signal.SIGKILL)
        ended = self.go_on(plan)
        self.assertNotIn("train1: ", ended.out)
        self.assertIn("/killed/stage2/step_", ended.err)
        self.assert_same_end("whole", "killed")

    def test_asked_to_stop_and_gone_on_with(self):
        plan = self.plan("stopped")
        self.assertEqual(self.kill_in_stage_2(plan, "stopped", signal.SIGTERM), 10)
        self.assertIn("stopped by a signal; train2 ended with exit code", self.read("stopped.log").decode())
        self.go_on(plan)
        self.assert_same_end("whole", "stopped")

    def test_out_of_time_again_and_again(self):
        """Exit code 10 after each update of the first stage."""
        plan = self.plan("timed", ('time = "00:10:00"', 'set = ["train.max_time=0.001"]'))
        ended = self.good("local", plan)
        self.assertEqual(ended.out.count("train1: ended with exit code 10; goes on"), 1, ended)
        self.assert_same_end("whole", "timed")

    def copy_of_whole(self, name, *gone):
        """A chain of its own that has all that the whole one made but `gone`."""
        subprocess.run(["cp", "-a", self.path("whole"), self.path(name)], check=True)
        for path in gone:
            subprocess.run(["rm", "-r", self.path(f"{name}/{path}")], check=True)
        return self.plan(name)

    def test_a_damaged_checkpoint_between_stages(self):
        plan = self.copy_of_whole("damaged", "stage3", "eval.json")
        with open(self.path("damaged/grown3.h5"), "r+b") as file:
            file.seek(-5000, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-5000, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        ended = self.good("local", plan)
        self.assertIn("WARNING: ", ended.out)
        self.assertIn("damaged/grown3.h5: damaged between bytes", ended.out)
        self.assertIn("damaged/grown3.h5.damaged, and made again", ended.out)
        self.assertIn("grow3: ", ended.out)
        self.assertNotIn("train2: ", ended.out)
        self.assert_same_end("whole", "damaged")

    def test_old_checkpoints_may_go(self):
        plan = self.copy_of_whole("thin", "stage1", "grown2.h5", "grown2.h5.manifest", "stage2")
        self.assertEqual(self.standing(plan), dict.fromkeys(STEPS, "done"))

    def test_a_plan_that_was_changed_afterwards(self):
        self.copy_of_whole("changed")
        said = "the plan was changed after this was made; restore it, or give [chain] another dir"
        self.bad(2, said, "local", self.plan("changed", ("ffn = 48", "ffn = 50")))
        self.bad(2, said, "status", self.plan("changed", ("tokens = 512", "tokens = 1024")))
        self.bad(2, said, "status", self.plan("changed", ("tokens = 1024", "tokens = 512")))
        # Growing as before at the end, but in another way on the way there: only the history knows.
        plan = self.copy_of_whole("history", "stage1", "stage2", "stage3", "eval.json", "grown2.h5", "grown2.h5.manifest")
        self.plan("history", ("{ query = 20, ffn = 48 }", "{ query = 20, proj = 16, ffn = 48 }"), ("proj = 16, ffn = 40", "ffn = 40"),
                  (', "parallel.token_shards=append"', ""))
        self.bad(2, said, "local", plan)

    def test_more_training_at_the_end(self):
        self.copy_of_whole("longer")
        plan = self.plan("longer", ("tokens = 1024", "tokens = 1536"))
        self.assertEqual([s for s, state in self.standing(plan).items() if state != "done"], ["train3", "eval"])
        self.good("local", plan)
        self.assertTrue(os.path.exists(self.path("longer/stage3/step_00000048.h5")))


class Kinds:
    """A chain of each other kind of model: all that it can grow, and an end that is the same however it was reached."""

    MODEL, STEPS, HISTORY, PARAMETERS = "", [], [], 0

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.write("model.toml", CONFIG.replace(CONFIG[:CONFIG.index("[data]")], cls.MODEL))
        cls.finish(cls.stages("local", cls.plan("whole")))

    def test_the_whole_chain(self):
        self.assertEqual(self.standing("whole.toml"), dict.fromkeys(self.STEPS, "done"))
        shown = self.good("status", "whole.toml").out
        for update, name, before, after, _ in self.HISTORY:
            self.assertIn(f"{name} {before} -> {after}", shown)
        info = json.loads(self.ok("tf_inspect", "--json", f"whole/{self.END}").out)
        self.assertEqual([(r["step"], r["layer_group"], r["tokens_before"], r["tokens_after"], r["rule"]) for r in info["growth_history"]],
                         self.HISTORY)
        self.assertEqual((info["retention"], info["parameters"]), ("stage_end", self.PARAMETERS))
        self.assertEqual(self.good("local", "whole.toml").out, "submit_stages: whole: everything is done\n")

    def test_stopped_and_gone_on_with(self):
        """The last stage has begun, and what it grew from is gone."""
        subprocess.run(["cp", "-a", self.path("whole"), self.path("stopped")], check=True)
        last = self.END.partition("/")[0]
        for gone in [f"{self.END}.manifest", "eval.json", f"grown{last[-1]}.h5", f"grown{last[-1]}.h5.manifest"]:
            os.remove(self.path(f"stopped/{gone}"))
        plan = self.plan("stopped")
        self.assertEqual([state for state in self.standing(plan).values() if state != "done"], ["begun", "to do"])
        ended = self.good("local", plan)
        self.assertNotIn("tf_expand", ended.out)
        self.assertIn("goes on from", ended.err)
        self.assert_same_end("whole", "stopped")


class Transformer(Kinds, ChainTest):
    MODEL = """\
[model]
kind = "transformer"
layers = 1
dim = 32
heads = 4
max_seq = 64
"""
    PLAN = """\
[chain]
dir = "chain"
config = "model.toml"
data = "data.h5"
set = ["train.eval_every=0", "run.save_every=1"]

[[stage]]
tokens = 512
ranks = 1
set = ["model.ffn_dim=40"]

[[stage]]
tokens = 512
grow = { dim = 48, ffn_dim = 65, layers = 2 }
noise = 0.1
seed = 7
ranks = 2
set = ["parallel.tp=2", "parallel.token_shards=append"]

[eval]
"""
    END = "stage2/step_00000004.h5"
    STEPS = ["train1", "grow2", "train2", "eval"]
    HISTORY = [(2, "dim", 32, 48, "net2net"), (2, "ffn_dim", 40, 65, "net2net"), (2, "layers", 1, 2, "identity")]
    # The table, final norm; of a block: its norms, q, k, v and proj, the MLP.
    PARAMETERS = (400 * 48 + 2 * 48) + 2 * (4 * 48 + 4 * (48 * 48 + 48) + 2 * 48 * 65 + 65 + 48)

    def test_growth_that_cannot_be(self):
        for message, old, new in [
                ("'ffn' is nothing that a transformer grows by; there is dim, ffn_dim, layers", "ffn_dim = 65", "ffn = 65"),
                ("dim = 50 is no multiple of the 8 dimensions of a head, which stay; ask for 48 or 56", "dim = 48", "dim = 50"),
                ("'mirror' is no growth rule of a transformer; there is net2net", "seed = 7", 'rule = "mirror"')]:
            plan = self.plan("bad", (old, new))
            self.bad(2, f"bad.toml: stage 2: tf_expand: {message}", "local", plan)
            self.assertFalse(os.path.exists(self.path("bad")))
        plan = self.plan("bad", ("ranks = 2", "ranks = 8"), ("parallel.tp=2", "parallel.tp=8"))
        self.bad(2, "bad.toml: stage 2: model.heads = 6 cannot be split over parallel.tp = 8 ranks", "submit", plan)


class MemoryFormer(Kinds, ChainTest):
    MODEL = """\
[model]
kind = "memoryformer"
layers = 1
dim = 32
heads = 4
max_seq = 64
[model.hash_bits]
attention = 4
ffn_in = 4
ffn_out = 6
"""
    PLAN = """\
[chain]
dir = "chain"
config = "model.toml"
data = "data.h5"
set = ["train.eval_every=0", "run.save_every=1"]

[[stage]]
tokens = 512
ranks = 1

[[stage]]
tokens = 512
grow = { attention.tables = 10, ffn_in.tables = 9, "ffn_out.tables" = 9 }
seed = 3
ranks = 2
set = ["parallel.tp=2", "parallel.token_shards=append"]

[[stage]]
tokens = 512
grow = { attention.bits = 5, ffn_out.bits = 7 }
rule = "extend-weight"
ranks = 2

[eval]
"""
    END = "stage3/step_00000006.h5"
    STEPS = ["train1", "grow2", "train2", "grow3", "train3", "eval"]
    HISTORY = [(2, "attention.tables", 8, 10, "zero-tables"), (2, "ffn_in.tables", 8, 9, "zero-tables"),
               (2, "ffn_out.tables", 8, 9, "zero-tables"), (4, "attention.bits", 4, 5, "extend-weight"),
               (4, "ffn_out.bits", 6, 7, "extend-weight")]
    # The table, final norm; norms of the block and in the Memory Block; tables and biases of q, k and v, ffn_in, ffn_out.
    PARAMETERS = (400 * 32 + 2 * 32) + (2 * 2 * 32 + 2 * 48) + 3 * (10 * 32 * 32 + 32) + (9 * 16 * 48 + 48) + (9 * 128 * 32 + 32)

    def test_growth_that_cannot_be(self):
        for message, old, new in [
                ("stage 2: tf_expand: 'attention' is nothing that a memoryformer grows by; there is attention.tables, ", "attention.tables = 10",
                 "attention = 10"),
                ("stage 2: tf_expand: the model has 8 attention.tables tables a layer and cannot shrink to 7; ask for more than 8",
                 "attention.tables = 10", "attention.tables = 7"),
                ("stage 3: tf_expand: 'mirror' is no rule of a memoryformer's growth; there are keep-weight and extend-weight", "extend-weight",
                 "mirror"),
                ("stage 3: tf_expand: a memoryformer grows without noise, so --noise 0.1 is not for it", 'rule = "extend-weight"', "noise = 0.1"),
                ("stage 2: 0 more of model.tables.ffn_in cannot be split over 1 added ranks; grow more, ", "ffn_in.tables = 9, ", "")]:
            self.bad(2, f"bad.toml: {message}", "submit", self.plan("bad", (old, new)))
            self.assertFalse(os.path.exists(self.path("bad")))

    def test_tables_instead_of_bits(self):
        """Twice the tables have as many rows as one bit more: only the history knows, and the configuration."""
        said = "the plan was changed after this was made; restore it, or give [chain] another dir"
        bits, tables = "grow = { attention.bits = 5, ffn_out.bits = 7 }", "grow = { attention.tables = 20, ffn_out.tables = 18 }"
        subprocess.run(["cp", "-a", self.path("whole"), self.path("tables")], check=True)
        subprocess.run(["rm", "-r", self.path("tables/stage3"), self.path("tables/eval.json")], check=True)
        plan = self.plan("tables", (bits, tables), ('rule = "extend-weight"\n', ""))
        self.bad(2, said, "local", plan)
        plan = self.plan("tables", (", ffn_out.bits = 7", ""))
        self.bad(2, f"grown3.h5 has {self.PARAMETERS} parameters, but the model of # has #: {said}", "status", plan)


@unittest.skipIf(slurm_cluster.missing(), slurm_cluster.missing())
class Cluster(ChainTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.cluster = slurm_cluster.SlurmCluster(cls.path("cluster"), nodes=3, cpus=2, gpus=2)
        cls.addClassCleanup(cls.cluster.stop)
        cls.cluster.start()
        cls.finish(cls.stages("local", cls.plan("whole")))

    @classmethod
    def command(cls, *words):
        return [*cls.cluster.inside, *super().command(*words)]

    @classmethod
    def stages(cls, *words, env=None):
        return super().stages(*words, env={**cls.cluster.environment, "PATH": BIN + ":" + cls.cluster.environment["PATH"], **(env or {})})

    def wait_for_empty_queue(self):
        self.cluster.wait_for(lambda: not self.cluster.queue(), "end of the chain")

    def submitted(self, ended):
        """{"train1": "12", ...} of a submission."""
        words = [line.split() for line in ended.out.splitlines() if "submitted as job" in line]
        return {line[1].rstrip(":"): line[-1] for line in words}

    def logs(self, chain):
        return "\n".join(path.name + "\n" + path.read_text() for path in sorted(pathlib.Path(self.path(chain), "logs").iterdir()))

    def test_a_chain_with_a_requeue(self):
        # The first stage stops with 10 after its first update, and is requeued.
        plan = self.plan("chain", ('time = "00:10:00"', 'time = "00:10:00"\nset = ["train.max_time=0.001"]'))
        jobs = self.submitted(self.good("submit", plan))
        self.assertEqual(list(jobs), STEPS)
        self.assertRegex(self.good("status", plan).out, r"train3 .*; job \d+ PENDING \(Dependency\)")
        again = self.good("submit", plan)
        self.assertEqual(self.submitted(again), {})
        self.assertIn(f"eval: job {jobs['eval']} is there already", again.out)
        self.wait_for_empty_queue()
        self.assertEqual(self.standing(plan), dict.fromkeys(STEPS, "done"), self.logs("chain"))
        ended = {step: self.cluster.job(job) for step, job in jobs.items()}
        self.assertEqual({step: job["JobState"] for step, job in ended.items()}, dict.fromkeys(STEPS, "COMPLETED"))
        self.assertEqual({step: job["Restarts"] for step, job in ended.items() if job["Restarts"] != "0"}, {"train1": "1"})
        self.assertEqual(ended["train2"]["NumNodes"], "2")
        self.assertIn("ended with 10; requeues itself, restart 1", self.logs("chain"))
        self.assertEqual(self.good("submit", plan).out, "submit_stages: chain: everything is done\n")
        self.assert_same_end("whole", "chain")

    def test_a_link_that_breaks_takes_the_rest_along_and_is_mended(self):
        held = self.plan("broken", ("[eval]", '[slurm]\noptions = ["--hold"]\n[eval]'))
        jobs = self.submitted(self.good("submit", held))
        self.cluster.run("scancel", jobs["train1"])
        self.wait_for_empty_queue()
        self.assertIn("train1 is next and no job of it is waiting or running", self.good("status", held).out)
        jobs = self.submitted(self.good("submit", self.plan("broken")))
        self.assertEqual(list(jobs), STEPS)
        self.wait_for_empty_queue()
        self.assert_same_end("whole", "broken")

    def test_a_job_that_slurm_holds_is_released(self):
        configuration = self.cluster.configuration.read_text()
        self.cluster.configuration.write_text(configuration + "Prolog=/bin/false\n")
        self.cluster.run("scontrol", "reconfigure")
        try:
            plan = self.plan("held")
            jobs = self.submitted(self.good("submit", plan))
            self.cluster.wait_for(lambda: any("launch failed requeued held" in line for line in self.cluster.queue()), "held job")
            self.assertIn(f"job {jobs['train1']} PENDING (launch failed requeued held)", self.good("status", plan).out)
        finally:
            self.cluster.configuration.write_text(configuration)
            self.cluster.run("scontrol", "reconfigure")
            for i in self.cluster.numbers():
                self.cluster.run("scontrol", "update", f"nodename=n{i}", "state=resume", check=False)
        again = self.good("submit", plan)
        self.assertIn(f"train1: released job {jobs['train1']}, which SLURM held after a node had failed to start it", again.out)
        self.assertEqual(self.submitted(again), {})
        self.wait_for_empty_queue()
        self.assertEqual(self.standing(plan), dict.fromkeys(STEPS, "done"), self.logs("held"))

    def test_the_job_that_requeues_itself(self):
        """train.sbatch, with a stand-in for tf_train that only waits for signals."""
        self.write("tf_train", "#!/bin/bash\n"
                   "trap 'echo got USR1; exit 10' USR1\ntrap 'exit 10' TERM\n"
                   'echo "begun ${SLURM_RESTART_COUNT:-0}, GPU $CUDA_VISIBLE_DEVICES, end $SLURM_JOB_END_TIME"\n'
                   'if [[ $3 == end ]]; then exit "$4"; fi\nwhile true; do sleep 0.05; done\n')
        os.chmod(self.path("tf_train"), 0o755)
        path = {"PATH": self.folder + ":" + self.cluster.environment["PATH"], "TFORGE_MAX_REQUEUES": "2"}

        def job(name, *arguments, options=("--time=60",)):
            return self.cluster.run("sbatch", "--parsable", "-N1", "-n2", f"--output={self.path(name)}", *options,
                                    os.path.join(os.environ["TFORGE_SLURM_DIR"], "train.sbatch"), "x", *arguments, env=path).stdout.strip()

        def begun(name, restarts):
            def both():
                return os.path.exists(self.path(name)) and self.read(name).decode().count(f"begun {restarts}, ") == 2
            self.cluster.wait_for(both, f"start {restarts} of {name}")

        def ended(number, state):
            self.cluster.wait_for(lambda: self.cluster.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "end")
            self.assertEqual(self.cluster.job(number)["JobState"], state)

        signalled, stopped = job("signalled"), job("stopped")
        diverged = job("diverged", "end", 11, options=("--gpus-per-node=2",))
        begun("stopped", 0)
        self.cluster.run("scancel", stopped)
        begun("signalled", 0)
        self.cluster.run("scancel", "--signal=USR1", signalled)  # to the ranks
        ended(stopped, "CANCELLED")
        ended(diverged, "FAILED")
        self.assertRegex(self.read("diverged").decode(), r"(?s)GPU 0.*GPU 1|GPU 1.*GPU 0")
        self.assertRegex(self.read("stopped").decode(), r"begun 0, GPU , end \d+\n")
        begun("signalled", 1)
        self.cluster.run("scancel", "--batch", "--signal=USR1", signalled)  # to the script
        begun("signalled", 2)
        self.cluster.run("scancel", "--signal=USR1", signalled)
        ended(signalled, "FAILED")
        self.assertEqual(self.read("signalled").decode().count("got USR1"), 6)
        self.assertIn("train.sbatch: ended with 10; 2 restarts are all that TFORGE_MAX_REQUEUES allows", self.read("signalled").decode())

    def test_what_slurm_refuses_is_refused_before_anything_is_submitted(self):
        self.bad(3, "sbatch: ", "submit", self.plan("refused", ("ranks = 3", "ranks = 3\nnodes = 3\noptions = [\"--partition=none\"]")))
        self.assertEqual([line for line in self.cluster.queue() if "refused" in line], [])


if __name__ == "__main__":
    unittest.main()
