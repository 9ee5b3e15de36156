"""Each kind of attention from text to text: train, resume, evaluate, generate, grow, inspect, and what is refused."""

import unittest

from support import CONFIG, JobTest, configured, names_in

MODEL = CONFIG[:CONFIG.index("[data]")]
KINDS = {
    "linformer": ["model.attention.block=8", "model.attention.slots=3"],
    "performer": ["model.attention.features=24", "model.attention.feature_seed=5"],
    "cosformer": ["model.rotary_fraction=0"],
}


class Attention(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.write("model.toml", CONFIG.replace(MODEL, """\
[model]
kind = "transformer"
layers = 2
dim = 32
heads = 4
max_seq = 64
"""))
        for kind in KINDS:
            for tp in [1, 2]:
                cls.finish(cls.run_job("tf_train", *cls.settings(kind, f"{kind}{tp}", f"parallel.tp={tp}"), ranks=tp))

    @staticmethod
    def settings(kind, folder, *more):
        return configured("model.toml", f"run.dir={folder}", f"model.attention.kind={kind}", *KINDS.get(kind, []), *more)

    @staticmethod
    def checkpoint(kind, tp=1):
        return f"{kind}{tp}/step_00000006.h5"

    def test_the_same_run_on_two_ranks(self):
        for kind in KINDS:
            one, two = self.losses(f"{kind}1"), self.losses(f"{kind}2")
            self.assertLess(one[6], one[1] - 0.1, kind)
            for step in one:
                self.assertLess(abs(two[step] / one[step] - 1), 1e-5, f"{kind} step {step}")

    def test_resumes_bit_for_bit(self):
        for kind in KINDS:
            stopped = f"stopped_{kind}"
            self.ok("tf_train", *self.settings(kind, stopped, "train.max_tokens=768"))
            self.ok("tf_train", *self.settings(kind, stopped))
            self.assertEqual(self.losses(stopped)[6], self.losses(f"{kind}1")[6], kind)

    def test_evaluates_and_generates(self):
        for kind in KINDS:
            want = self.nll(self.checkpoint(kind))
            self.assertLess(abs(self.nll(self.checkpoint(kind, 2), "--tp", 2, ranks=2) / want - 1), 1e-4, kind)
            command = ["--checkpoint", self.checkpoint(kind), "--prompt", "And God said", "--tokens", 50, "--greedy",
                       "--threads", 1]
            text = self.ok("tf_generate", *command).out
            self.assertGreater(len(text), len("And God said") + 20, kind)
            self.assertEqual(self.ok("tf_generate", *command, "--no-cache").out, text, kind)
            self.assertEqual(self.ok("tf_generate", *command, ranks=2).out, text, kind)

    def test_inspects_and_grows(self):
        for kind, words in [("linformer", "attention: linformer, a causal substitute and not the published form"),
                            ("performer", "attention: performer, 24 orthogonal random features a head of seed 5"),
                            ("cosformer", "attention: cosformer over 64 positions")]:
            self.assertIn(words, self.ok("tf_inspect", self.checkpoint(kind)).out)
            before = self.nll(self.checkpoint(kind))
            self.ok("tf_expand", "--checkpoint", self.checkpoint(kind), "--output", f"{kind}_grown.h5", "--grow",
                    "dim=64,layers=3")
            self.assertLess(abs(self.nll(f"{kind}_grown.h5") / before - 1), 1e-5, kind)

    def test_bad_input(self):
        def fails(message, kind, *settings):
            self.fails(2, message, "tf_train", *self.settings(kind, "new", *settings))

        fails('--set model.attention.kind=perfomer: model.attention.kind = "perfomer": want one of #; did you mean '
              "`performer`?", "perfomer")
        fails('--set model.attention.slots: model.attention.slots is a key of model.attention.kind = "linformer", and '
              'model.attention.kind is "performer"; remove the one or change the other', "performer",
              "model.attention.slots=4")
        fails('--set model.attention.features: model.attention.features is a key of model.attention.kind = "performer", and '
              'model.attention.kind is "softmax"; remove the one or change the other', "softmax",
              "model.attention.features=4")
        fails("--set model.attention.block: model.attention.block = 65: want 1 to 64, the smaller of model.max_seq and 65536",
              "linformer", "model.attention.block=65")
        fails("--set model.attention.slots: model.attention.slots = 9: want 1 to the 8 positions of model.attention.block",
              "linformer", "model.attention.slots=9")
        fails("--set model.attention.features=-1: model.attention.features = -1: want 0 to 65536", "performer",
              "model.attention.features=-1")
        fails('--set model.rotary_fraction: model.rotary_fraction = 0.25: model.attention.kind = "cosformer" weighs positions '
              "itself and is defined on keys that are not rotated; set it to 0", "cosformer", "model.rotary_fraction=0.25")
        fails("--set train.seq: train.seq = 65 is longer than model.max_seq = 64", "cosformer", "train.seq=65")
        self.fails(2, '--set model.attention.kind: model.attention.kind = "softmax" contradicts the checkpoint, which has '
                      '"linformer"; remove the key, or start a new run #', "tf_train", "--config", "model.toml", "--set", "run.dir=linformer1", "--set",
                   "model.attention.kind=softmax")
        self.fails(2, "the prompt has 70 tokens, the model was trained on 64; shorten the prompt", "tf_generate",
                   "--checkpoint", self.checkpoint("performer"), "--prompt", "x" * 70)
        self.assertNotIn("new", names_in(self.folder))


if __name__ == "__main__":
    unittest.main()
