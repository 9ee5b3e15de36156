"""tf_plan: what a run takes on layouts that nobody starts, and what a growth plan costs."""

import re
import unittest

from support import JobTest, names_in

PROFILE = """\
[device]
name = "a machine"
date = "2026-11-22"
gflops = 100
gbytes = 10
"""

PLAN = """\
[chain]
dir = "chain"
config = "tiny.toml"
data = "data.h5"
set = ["train.eval_every=0"]

[[stage]]
tokens = 512
ranks = 2
time = "00:10:00"

[[stage]]
tokens = 1000
grow = { ffn = 48 }
ranks = 4
set = ["parallel.tp=2"]

[eval]
split = "test"
"""


class Plan(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.write("profile.toml", PROFILE)
        cls.write("plan.toml", PLAN)

    def number(self, pattern, text):
        found = re.search(pattern, text, re.M)
        self.assertIsNotNone(found, f"{pattern} in {text}")
        return float(found[1])

    def test_any_layout_in_one_process(self):
        before = names_in(self.folder)
        out = self.ok("tf_plan", "--config", "tiny.toml", "--set", "parallel.dp=64", "--set", "parallel.tp=4", "--set",
                      "train.batch=128").out
        self.assertEqual(names_in(self.folder), before)
        self.assertIn("ranks              dp 64 x tp 4\n", out)
        self.assertIn(f"tokens per step    {128 * 64}\n", out)
        self.assertEqual(len(re.findall(r"^  \d: .* = \S+$", out, re.M)), 4)
        for part in [r"^  dp in all +\d+ calls +\d+ bytes$", r"^  tp in all +\d+ calls +\d+ bytes$", r"^  all +\d+ "]:
            self.assertRegex(out, re.compile(part, re.M))
        self.assertNotIn("predicted", out)

    def test_says_what_a_dry_run_says(self):
        lines = self.ok("tf_train", "--config", "tiny.toml", "--dry-run", ranks=2).out.partition("\nparameters ")[2]
        self.assertIn("parameters " + lines, self.ok("tf_plan", "--config", "tiny.toml", "--set", "run.threads=1", "--ranks", 2).out)

    def test_predicts_with_a_profile(self):
        options = ["--config", "tiny.toml", "--device", "profile.toml"]
        alone = self.ok("tf_plan", *options).out
        step = self.number(r"^  step +(\S+) ms", alone)
        computing = self.number(r"^  computing +(\S+) ms", alone)
        self.assertEqual(step, computing)
        flops = self.number(r"^FLOPs per step +(\S+)$", alone)
        rate = self.number(r"^  model FLOPs +(\S+) GFLOP/s", alone)
        self.assertLess(abs(flops / (step / 1e3) / 1e9 / rate - 1), 0.01)
        self.assertLess(abs(self.number(r"utilisation (\S+) %", alone) / rate - 1), 0.05)  # of 100 GFLOP/s
        self.assertIn("not measured, taken at the rates of a large product and sum: ", alone)
        several = self.ok("tf_plan", *options, "--ranks", 4, "--link-gbs", 1, "--link-us", 100).out
        # Twice three messages of each bucket at least, and half of one is not hidden.
        self.assertGreater(self.number(r"^  communication +(\S+) ms", several), 0.6)
        exposed = self.number(r"of which (\S+) ms are not hidden", several)
        self.assertAlmostEqual(self.number(r"^  step +(\S+) ms", several),
                               self.number(r"^  computing +(\S+) ms", several) + exposed, delta=0.02)

    def test_the_cost_of_stages(self):
        out = self.ok("tf_plan", "--stages", "plan.toml", "--device", "profile.toml", "--link-gbs", 1, "--link-us", 10).out
        rows = {line[:12].strip(): line[12:].split() for line in out.splitlines()[1:]}
        def parameters(ffn):
            return 2 * (4 * 12 + ffn) * 2 * 32 + 400 * 32 + 2 * 32
        def flops(ffn):  # of a token
            return 3 * (2 * (2 * (4 * 12 + ffn) * 64 + 4 * 65 / 2 * 32) + 2 * 32 * 400)
        tokens = {"1": 512, "2": 1024, "from scratch": 1536}  # 1000 are rounded up to updates of 256
        for name, ffn in [("1", 24), ("2", 48), ("from scratch", 48)]:
            self.assertEqual(rows[name][0], str(parameters(ffn)), out)
            self.assertEqual(rows[name][3], str(tokens[name]), out)
            self.assertLess(abs(float(rows[name][4]) / (flops(ffn) * tokens[name]) - 1), 1e-3, out)
        self.assertEqual([rows[name][1] for name in ["1", "2", "from scratch"]], ["2", "4", "4"])
        share = (flops(24) * 512 + flops(48) * 1024) / (flops(48) * 1536)
        self.assertIn(f"the plan takes {100 * share:.1f} % of the FLOPs of the last stage's model from scratch", out)
        self.assertIn("rank hours", out)
        self.assertNotIn("rank hours", self.ok("tf_plan", "--stages", "plan.toml").out)

    def test_what_cannot_be_planned(self):
        def refused(message, *options):
            self.fails(2, message, "tf_plan", *options)

        refused("give --config or --stages (tf_plan --help lists all)")
        refused("give --config or --stages (tf_plan --help lists all)", "--config", "tiny.toml", "--stages", "plan.toml")
        refused("--stages takes ranks and settings from the plan: leave out --ranks and --set", "--stages", "plan.toml",
                "--ranks", 2)
        refused("--ranks 0: want 1 or more", "--config", "tiny.toml", "--ranks", 0)
        refused("--link-gbs and --link-us belong together", "--config", "tiny.toml", "--link-gbs", 1)
        refused("--link-gbs 0 --link-us 1: want more than 0", "--config", "tiny.toml", "--link-gbs", 0, "--link-us", 1)
        refused("none.toml: cannot be read: No such file or directory", "--config", "tiny.toml", "--device", "none.toml")
        refused("2 ranks need a link: --link-gbs and --link-us, or [link] in the profile of a machine", "--config",
                "tiny.toml", "--ranks", 2, "--device", "profile.toml")
        refused("parallel.dp = 3 and parallel.tp = 1 want a multiple of 3 ranks, the job has 4", "--config", "tiny.toml",
                "--ranks", 4, "--set", "parallel.dp=3")
        refused("train.batch = 4 gives some of 5 data-parallel ranks no sequence#", "--config", "tiny.toml", "--ranks", 5)
        refused('data.path = "none.h5" is not there, so model.vocab has to be given: --set model.vocab=N', "--config",
                "tiny.toml", "--set", "data.path=none.h5")
        self.ok("tf_plan", "--config", "tiny.toml", "--set", "data.path=none.h5", "--set", "model.vocab=400")
        refused('train.dtype = "f64", and the profile of a machine is of "f32"', "--config", "tiny.toml", "--device",
                "profile.toml", "--set", "train.dtype=f64")
        for message, old, new in [
                ("bad.toml: there is no [chain]", "[chain]", "[eval.chain]"),
                ("bad.toml: stage 1: unknown key token; did you mean `tokens`?", "tokens = 512", "token = 512"),
                ("bad.toml: stage 1: tokens: want an integer", "tokens = 512", "tokens = 5.5"),
                ("bad.toml: stage 1: ranks is missing; give ranks, or nodes and ranks_per_node", "ranks = 2\n", ""),
                ("bad.toml: stage 2: #ffn#", "ffn = 48", "ffn = 2"),
                ("bad.toml: stage 2: --set parallel.tq: unknown key parallel.tq; did you mean `parallel.tp`?",
                 "parallel.tp=2", "parallel.tq=2"),
                ("none.toml: cannot be read#", '"tiny.toml"', '"none.toml"'),
                ("bad.toml:3:#", '"tiny.toml"', "tiny")]:
            self.assertEqual(PLAN.count(old), 1)
            self.write("bad.toml", PLAN.replace(old, new))
            refused(message if not message.startswith("none") else "bad.toml: stage 1: " + message, "--stages", "bad.toml")


if __name__ == "__main__":
    unittest.main()
