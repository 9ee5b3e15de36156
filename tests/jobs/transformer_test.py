"""A Transformer from text to text: train, resume, grow, train on, evaluate, generate, on several meshes."""

import re
import unittest

from support import CONFIG, JobTest, configured, names_in

TRANSFORMER = """\
[model]
kind = "transformer"
layers = 2
dim = 32
heads = 4
max_seq = 64
ffn_dim = 97
"""
MODEL = CONFIG[:CONFIG.index("[data]")]


class Transformer(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.write("transformer.toml", CONFIG.replace(MODEL, TRANSFORMER))
        for dp, tp in [(1, 1), (2, 1), (1, 2)]:
            cls.finish(cls.run_job("tf_train", *cls.settings(f"run{dp}x{tp}", dp, tp), ranks=dp * tp))
        cls.checkpoint = "run1x1/step_00000006.h5"

    @staticmethod
    def settings(folder, dp, tp, *more):
        return configured("transformer.toml", f"run.dir={folder}", f"parallel.dp={dp}", f"parallel.tp={tp}", *more)

    def test_the_same_run_on_every_mesh(self):
        want = self.losses("run1x1")
        self.assertLess(want[6], want[1] - 0.1)
        for folder in ["run2x1", "run1x2"]:
            got = self.losses(folder)
            for step in want:
                self.assertLess(abs(got[step] / want[step] - 1), 1e-5, f"{folder} step {step}")

    def test_resumes_bit_for_bit_and_on_another_mesh(self):
        for dp, tp in [(1, 1), (2, 1), (1, 2)]:
            stopped = f"stopped{dp}x{tp}"
            self.ok("tf_train", *self.settings(stopped, dp, tp, "train.max_tokens=768"), ranks=dp * tp)
            self.ok("tf_train", *self.settings(stopped, dp, tp), ranks=dp * tp)
            tensors = self.same_tensors(f"run{dp}x{tp}/step_00000006.h5", f"{stopped}/step_00000006.h5")
            self.assertEqual(tensors, 3 * (3 + 2 * 16))  # each with two moments
        self.ok("tf_train", *self.settings("moved", 1, 2, "train.max_tokens=768"), ranks=2)
        self.ok("tf_train", *self.settings("moved", 3, 1), ranks=3)
        self.assertLess(abs(self.losses("moved")[6] / self.losses("run1x1")[6] - 1), 1e-5)

    def test_evaluates_and_generates_on_any_ranks(self):
        want = self.nll(self.checkpoint)
        for ranks, arguments in [(2, ["--tp", 2]), (2, []), (3, ["--tp", 3])]:
            self.assertLess(abs(self.nll(self.checkpoint, *arguments, ranks=ranks) / want - 1), 1e-6)
        command = ["--checkpoint", self.checkpoint, "--prompt", "And God said", "--tokens", 40, "--greedy", "--threads", 1]
        text = self.ok("tf_generate", *command).out
        self.assertGreater(len(text), len("And God said") + 20)
        self.assertEqual(self.ok("tf_generate", *command, "--no-cache").out, text)
        self.assertEqual(self.ok("tf_generate", *command, ranks=2).out, text)

    def test_grows_and_trains_on(self):
        before = self.nll(self.checkpoint)
        grown = self.ok("tf_expand", "--checkpoint", self.checkpoint, "--output", "grown.h5", "--grow",
                        "dim=64,ffn_dim=200,layers=3", "--noise", 0.1, ranks=2)
        self.assertIn("dim        32 ->     64 columns", grown.out)
        self.assertIn("(rule net2net, identity)", grown.out)
        self.assertLess(float(re.search(r"max\|logits\| = (\S+)", grown.out)[1]), 1e-5)
        self.assertLess(abs(self.nll("grown.h5") / before - 1), 1e-5)
        history = self.ok("tf_inspect", "grown.h5").out
        self.assertRegex(history, r"dim +32 -> 64, rule net2net")
        self.assertRegex(history, r"layers +2 -> 3, rule identity")
        self.write("stage2.toml", CONFIG[CONFIG.index("[data]"):])
        for folder, more in [("stage2", []), ("stage2_stopped", ["--set", "train.max_tokens=2304"]), ("stage2_stopped", [])]:
            self.ok("tf_train", "--config", "stage2.toml", "--init", "grown.h5", "--set", f"run.dir={folder}", "--set",
                    "train.steps=12", "--set", "parallel.tp=2", *more, ranks=2)
        self.same_tensors("stage2/step_00000012.h5", "stage2_stopped/step_00000012.h5")
        self.assertLess(self.nll("stage2/step_00000012.h5"), before - 0.05)
        command = ["--checkpoint", "stage2/step_00000012.h5", "--prompt", "And God said", "--tokens", 40, "--greedy", "--threads", 1]
        self.assertEqual(self.ok("tf_generate", *command, "--no-cache").out, self.ok("tf_generate", *command).out)

    def test_inspection(self):
        """Accounting of two blocks of width 32 and 97 neurons, the head tied."""
        shown = self.ok("tf_inspect", self.checkpoint).out
        parts = {"embedding": (400 * 32, 0), "query": (2 * (32 * 32 + 32), 2 * 32 * 32), "key": (2 * (32 * 32 + 32), 2 * 32 * 32),
                 "value": (2 * (32 * 32 + 32), 2 * 32 * 32), "proj": (2 * (32 * 32 + 32), 2 * 32 * 32),
                 "ffn": (2 * (2 * 32 * 97 + 97 + 32), 2 * 2 * 32 * 97), "norms": (2 * 4 * 32, 0), "attention": (0, 2 * 65 * 32),
                 "final norm": (2 * 32, 0), "head": (0, 400 * 32)}
        for part, (parameters, operations) in parts.items():
            self.assertRegex(shown, rf"\n{part} +{parameters} +{operations}\n")
        self.assertRegex(shown, rf"\nall +{sum(p for p, _ in parts.values())} +{sum(o for _, o in parts.values())}\n")
        self.assertIn("growth history: none", shown)

    def test_bad_input(self):
        def fails(message, *settings):
            self.fails(2, message, "tf_train", *self.settings("new", 1, 1, *settings))

        fails('--set model.tokens.ffn: model.tokens.ffn is a key of model.kind = "tokenformer", and model.kind is '
              '"transformer"; remove the one or change the other', "model.tokens.ffn=48")
        fails('--set model.kind: model.kind = "transfomer": there is "tokenformer", "transformer", "memoryformer"; did you mean `transformer`?',
              "model.kind=transfomer")
        fails("--set model.bias=3: model.bias is an integer, want true or false", "model.bias=3")
        fails("--set model.ffn_dim=-1: model.ffn_dim = -1: want at least 0", "model.ffn_dim=-1")
        fails("model.heads = 4 cannot be cut into parallel.virtual_tp = 5 shards; use fewer shards",
              "run.deterministic=layout_independent", "parallel.virtual_tp=5")
        self.fails(2, "model.ffn_dim: 2 #cannot be split over 3 ranks; use at most 2#", "tf_train",
                   *self.settings("new", 1, 3, "model.ffn_dim=2"), ranks=3)
        self.fails(2, f"--set model.ffn_dim: model.ffn_dim = 98 contradicts the checkpoint, which has 97; remove the key, or "
                      "start a new run in another run.dir (tf_expand makes a model larger)", "tf_train",
                   *self.settings("run1x1", 1, 1, "model.ffn_dim=98"))
        command = ["tf_expand", "--checkpoint", self.checkpoint, "--output", "o.h5"]
        self.fails(2, "--grow is missing: what grows, and to how much", *command)
        self.fails(2, "--grow and --tokens are two names of the same; give one", *command, "--grow", "dim=64", "--tokens", "dim=64")
        self.fails(2, "'ffn' is nothing that a transformer grows by; there is dim, ffn_dim, layers", *command, "--grow", "ffn=200")
        self.fails(2, "dim = 36 is no multiple of the 8 dimensions of a head, which stay; ask for 32 or 40", *command, "--grow",
                   "dim=36")
        self.assertNotIn("new", names_in(self.folder))
        self.assertNotIn("o.h5", names_in(self.folder))


if __name__ == "__main__":
    unittest.main()
