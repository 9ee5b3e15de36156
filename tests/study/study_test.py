"""The study of what growing saves: plans that cannot be, what is read off curves, and the smoke plan of configs/ from end
to end, killed on the way and gone on with."""

import csv
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

SOURCE, BUILD = os.environ["TFORGE_SOURCE_DIR"], os.environ["TFORGE_BUILD_DIR"]
SCRIPT = os.path.join(SOURCE, "scripts", "study.py")
PLAN = os.path.join(SOURCE, "configs", "study_smoke.toml")
sys.path.insert(0, os.path.join(SOURCE, "scripts"))


class StudyTest(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="tforge_study_")
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)

    @classmethod
    def command(cls, word, *options, plan=PLAN):
        return [sys.executable, SCRIPT, word, plan, "--build", BUILD, "--set", f'study.dir="{cls.folder}/study"', *options]

    def study(self, word, *options, plan=PLAN):
        done = subprocess.run(self.command(word, *options, plan=plan), capture_output=True, text=True, timeout=800)
        self.assertNotIn("Traceback", done.stderr)
        return done

    def bad(self, message, *options, plan=PLAN, code=2):
        done = self.study("run", *options, plan=plan)
        lines = done.stderr.splitlines()
        self.assertEqual((done.returncode, len(lines)), (code, 1), done)
        self.assertTrue(lines[0].startswith("study: error: "), done)
        self.assertIn(message, lines[0])
        self.assertFalse(glob.glob(f"{self.folder}/study/pieces/*"), done)


class Plans(StudyTest):
    def changed(self, old, new):
        with open(PLAN, encoding="utf-8") as file:
            text = file.read()
        self.assertEqual(text.count(old), 1, old)
        path = os.path.join(self.folder, "plan.toml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text.replace(old, new))
        return path

    def test_each_wrong_plan_is_one_line_with_its_place(self):
        for old, new, message in [
            ("[budget]", "[budgets]", "unknown key budgets; did you mean `budget`?"),
            ("decay = 0.2", "decay = 2", "[budget]: decay = 2: want a number between 0 and 1"),
            ("points = [0.25, 0.5, 1.0]", "points = [0.5, 0.25, 1.0]", "points = [0.5, 0.25, 1.0]: want shares of the budget in"),
            ("tokens_per_parameter = 1", "", "[budget]: tokens_per_parameter is missing"),
            ('reference = "TokenFormer from scratch"', 'reference = "TokenFormer"', "reference: there is no TokenFormer; did you"),
            ('control = "TokenFormer, small, trained on"', 'control = "x"', "[study]: control: there is no x"),
            ('{ model = "memory" }', '{ model = "memroy" }', "model: there is no memroy; did you mean `memory`?"),
            ('{ model = "memory" }', '{ model = "memory", until = 0.5 }', "until: the last stage goes to the end"),
            ('{ model = "memory" }', '{ model = "memory", rule = "mirror" }', "rule is about growth, and nothing grows here"),
            ('{ model = "memory" }', '{ model = "memory", until = 0.3 }, { model = "tf_large" }',
             "memory cannot become tf_large: dim is 64 and 16"),
            ('{ model = "memory" }', '{ model = "tf_large", until = 0.3 }, { model = "tf_small" }',
             "tf_large cannot become tf_small: tokens.ffn shrinks from 128 to 32"),
            ('{ model = "memory" }', '{ model = "tf_small", until = 0.9 }, { model = "tf_large" }',
             "the last decay begins at 0.8 of the budget"),
            ("train.lr = 1.5e-2", "train.steps = 5", "the study decides train.steps"),
            ("lr = 5e-3\n", "lr = 5e-3\nlearning_rate = 1\n", "row 1 (TokenFormer from scratch): unknown key train.learning_rate"),
            ('kind = "memoryformer"', 'kind = "memory"', "[model.memory]: kind is missing or none of tokenformer"),
            ('like = "transformer_small"', 'like = "transformer"', "[model.transformer_large]: like: there is no transformer; did"),
            ("heads = 4\nmax_seq = 64\ntied", "heads = 5\nmax_seq = 64\ntied", "row 8 (MemoryFormer from scratch): stage 1: "),
            ('command = "bible -f gen1:1-exo40:38"', 'command = "exit 7"', "[corpus.genesis]: command ended with exit code 7"),
            ('command = "bible -f gen1:1-exo40:38"', 'files = ["none.txt"]', "[corpus.genesis]: files: none.txt: there is no such"),
            ('command = "bible -f gen1:1-exo40:38"', 'files = ["$NO_SUCH_THING/a"]', "that variable is not set"),
            ("point = 0.25", "point = 0.3", "[forgetting]: point = 0.3 is none of the budget's points"),
            ("sequences = [64, 128, 256]", "sequences = [96]", "tokens = 256 is no multiple of the sequence length 96"),
            ("warmup_steps = 2\nfinal", "warmup_steps = 900\nfinal", "within the 900 of train.warmup_steps"),
            ("tokens_per_parameter = 1", "tokens_per_parameter = 0.01", "is too small: "),
        ]:
            with self.subTest(message):
                self.bad(message, plan=self.changed(old, new))

    def test_files_and_overrides(self):
        self.bad("cannot be read: No such file", plan=self.folder + "/none.toml")
        self.bad("Expected", plan=self.changed("[budget]", "[budget"))
        self.bad("[study]: workers = 0: want a whole number from 1", "--set", "study.workers=0")
        self.bad("unknown key worker; did you mean `workers`?", "--set", "study.worker=1")
        self.bad("want KEY=VALUE", "--set", "workers")


class Curves(unittest.TestCase):
    """What is read off the curves, on curves whose answer is known."""

    @classmethod
    def setUpClass(cls):
        import study_report
        cls.report = study_report

    def test_flops_at_a_loss(self):
        curve = [(1e6, 4.0), (4e6, 3.0), (16e6, 2.5)]
        self.assertEqual(self.report.flops_at(curve, 4.0), (1e6, False))
        self.assertEqual(self.report.flops_at(curve, 4.5), (1e6, True))
        flops, early = self.report.flops_at(curve, 3.5)
        self.assertAlmostEqual(flops, 2e6)  # half the way over the logarithm
        self.assertFalse(early)
        self.assertAlmostEqual(self.report.flops_at(curve, 2.75)[0], 8e6)
        self.assertIsNone(self.report.flops_at(curve, 2.4))

    def test_ratio(self):
        scratch = [(1e6, 4.0), (4e6, 3.0), (16e6, 2.5)]
        better = self.report.Ratio([(1e6, 3.5), (4e6, 2.5), (16e6, 2.0)], scratch)
        self.assertEqual((str(better), better.difference), ("0.25", -0.5))
        worse = self.report.Ratio([(1e6, 4.5), (4e6, 3.5), (16e6, 3.0)], scratch)
        self.assertEqual((str(worse), worse.difference), ("4.00", 0.5))
        self.assertEqual(str(self.report.Ratio([(1e6, 2.0), (16e6, 1.0)], scratch)), "< 0.06")
        self.assertEqual(str(self.report.Ratio([(1e6, 9.0), (16e6, 8.0)], scratch)), "> 16.00")

    def test_spread(self):
        self.assertEqual(self.report.spread([], "{:.1f}"), "-")
        self.assertEqual(self.report.spread([2], "{:.1f}"), "2.0")
        self.assertEqual(self.report.spread([3, 1, 9], "{:.1f}"), "3.0 (1.0 to 9.0)")


class Smoke(StudyTest):
    def results(self):
        """{piece: when it was done}"""
        return {path: os.stat(path).st_mtime_ns for path in glob.glob(f"{self.folder}/study/pieces/*/result.json")}

    def read(self, name):
        with open(f"{self.folder}/study/{name}", encoding="utf-8") as file:
            return file.read()

    def rows(self, name):
        with open(f"{self.folder}/study/results/{name}.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def kill_after(self, pieces, number):
        """Starts the study and ends it with a signal when so many pieces are done. Returns its exit code."""
        process = subprocess.Popen(self.command("run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(self.results()) < pieces:
            self.assertIsNone(process.poll(), "it ended before it was stopped")
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait()

    def go_on(self):
        """Until the programs of a killed study have stopped, it refuses to begin: two never work at once."""
        for _ in range(100):
            done = self.study("run")
            if done.returncode != 3:
                return done
            self.assertIn("is being worked on by another study", done.stderr)
            time.sleep(0.2)
        return done

    def test_from_end_to_end(self):
        self.assertEqual(self.kill_after(5, signal.SIGKILL), -signal.SIGKILL)
        after_kill = self.results()
        stopped = self.go_on_until_stopped(len(after_kill) + 10)
        self.assertEqual(stopped, 10)
        after_stop = self.results()
        self.assertGreater(len(after_stop), len(after_kill))
        done = self.go_on()
        self.assertEqual(done.returncode, 0, done)
        results = self.results()
        for earlier in [after_kill, after_stop]:
            self.assertEqual(earlier, {path: results[path] for path in earlier}, "a finished piece was done again")
        self.assertEqual(re.search(r"(\d+) of (\d+): ", done.stdout.splitlines()[-20])[2], str(len(results)))
        self.assertEqual(glob.glob(f"{self.folder}/study/pieces/*/run/*.h5"), [], "checkpoints that nobody needs are left")

        again = self.study("run")
        self.assertEqual(again.returncode, 0, again)
        self.assertIn(" 0 of them to do", again.stdout)
        self.assertEqual(self.results(), results)
        self.check_report()
        self.check_flops(results)

    def go_on_until_stopped(self, pieces):
        for _ in range(100):
            process = subprocess.Popen(self.command("run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and len(self.results()) < pieces:
                time.sleep(0.02)
            if process.poll() == 3:  # the killed one's programs still work
                time.sleep(0.2)
                continue
            process.send_signal(signal.SIGTERM)
            return process.wait()
        return None

    def check_report(self):
        text = self.read("results.md")
        self.assertNotIn("Not complete", text)
        for line in text.splitlines():
            if line.startswith("|"):
                cells = [cell.strip() for cell in line.strip("|").split("|")]
                self.assertNotIn("-", cells, f"a cell is empty: {line}")
        for part in ["## The answer", "## Against not growing", "## Validation perplexity", "## Rows", "## Growth",
                     "## Forgetting", "## Length"]:
            self.assertIn(part, text)
        for name in re.findall(r"\]\((results/\w+\.svg)\)", text):
            self.assertIn("</svg>", self.read(name), name)
        points = self.rows("points")
        self.assertEqual(len(points), 3 * (3 * 2 + 8))  # three points of 3 rows with two seeds and 8 with one
        for point in points:
            self.assertLess(float(point["perplexity"]), 400, point)  # the vocabulary has 400 pieces
        ends = {row["row"]: float(row["flops"]) for row in points if row["share"] == "1.0"}
        self.assertLess(max(ends.values()) / min(ends.values()), 1.03, "rows got different budgets")
        self.assertEqual(len(self.rows("forgetting")), 6)
        self.assertEqual(len(self.rows("length")), 6)
        growth = self.rows("growth")
        self.assertEqual(len(growth), 2 * 2 + 1 + 1 + 1)
        for row in growth:
            change = abs(float(row["loss_after"]) - float(row["loss_before"]))
            if row["rule"] == "public":
                self.assertGreater(change, 1e-4, row)
            elif row["rule"] != "mirror":
                self.assertLess(change, 1e-5, row)

    def check_flops(self, results):
        """The FLOPs of a grown row are those of its stages, as tf_inspect's accounting has them."""
        points = [row for row in self.rows("points") if row["row"] == "TokenFormer grown, zero keys" and row["seed"] == "1"]
        self.assertEqual([row["model"] for row in points], ["tf_small", "tf_medium", "tf_large"])

        def per_update(n):  # 4 sequences of 64; attention over the causal half; forward and twice that
            return 4 * 64 * 3 * 2 * (2 * (2 * 16 * (4 * n + 4 * n) + 65 * 16) + 400 * 16)
        grown = [row for row in self.rows("growth") if row["row"] == "TokenFormer grown, zero keys" and row["seed"] == "1"]
        first, second = (int(row["update"]) for row in grown)
        want = first * per_update(8) + (second - first) * per_update(16) + (int(points[2]["update"]) - second) * per_update(32)
        self.assertEqual(int(points[2]["flops"]), want)
        self.assertEqual(int(points[0]["flops"]), int(points[0]["update"]) * per_update(8))
        # Both rows begin with the same small model: its pieces are there once.
        pieces = [os.path.basename(os.path.dirname(path)) for path in results]
        self.assertEqual(sum(piece.startswith(f"train-tf_small_seed1_{first}-") for piece in pieces), 1)


if __name__ == "__main__":
    unittest.main()
