"""A MemoryFormer from text to text: train, resume, inspect, grow by tables and by a bit, train on, evaluate, generate."""

import json
import re
import unittest

import h5py

from support import CONFIG, JobTest, configured, names_in

# Tables of 16 rows of 32, 8 for each of q, k and v; the Memory Block is 8 * 6 wide. In f64 no sum in another order
# flips the sign of a coordinate.
MEMORYFORMER = """\
[model]
kind = "memoryformer"
layers = 2
dim = 32
heads = 4
max_seq = 64
[model.hash_bits]
attention = 4
ffn_in = 4
ffn_out = 6
"""
MODEL = CONFIG[:CONFIG.index("[data]")]
END = "step_00000006.h5"


class MemoryFormer(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        text = CONFIG.replace(MODEL, MEMORYFORMER)
        cls.write("memory.toml", text.replace("[train]\n", '[train]\ndtype = "f64"\n'))
        cls.write("stage2.toml", text[text.index("[data]"):].replace("[train]\n", '[train]\ndtype = "f64"\nsteps = 12\n').replace("steps = 6\n", ""))
        for tp in [1, 2]:
            cls.finish(cls.run_job("tf_train", *cls.settings(f"run{tp}", f"parallel.tp={tp}"), ranks=tp))
        cls.checkpoint = f"run1/{END}"
        cls.grown = cls.finish(cls.run_job("tf_expand", "--checkpoint", cls.checkpoint, "--output", "tables.h5", "--grow",
                                           "attention.tables=10,ffn_in.tables=9,ffn_out.tables=9", "--seed", 3, ranks=2))

    @staticmethod
    def settings(folder, *more, config="memory.toml"):
        return configured(config, f"run.dir={folder}", *more)

    def change(self, ended):
        return float(re.search(r"max\|logits\| = (\S+)", ended.out)[1])

    def test_the_same_run_on_two_ranks(self):
        one, two = self.losses("run1"), self.losses("run2")
        self.assertLess(one[6], one[1] - 0.1)
        for step in one:
            self.assertLess(abs(two[step] / one[step] - 1), 1e-8, f"step {step}")

    def test_resumes_bit_for_bit(self):
        """Also with rows that no token hit left as they are."""
        for number, more in enumerate([[], ["train.dtype=f32", "train.idle_rows=skip"]]):
            whole, stopped = f"whole{number}", f"stopped{number}"
            if more:
                self.ok("tf_train", *self.settings(whole, *more))
            self.ok("tf_train", *self.settings(stopped, "train.max_tokens=768", *more))
            self.ok("tf_train", *self.settings(stopped, *more))
            self.same_tensors(f"{whole if more else 'run1'}/{END}", f"{stopped}/{END}")

    def test_inspection(self):
        """Accounting of two blocks, and what the paper counts: 6 K d + 2 T d for a block at K = 8, T = 64."""
        shown = self.ok("tf_inspect", self.checkpoint).out
        parts = {"query": (2 * (128 * 32 + 32), 2 * 8 * 32), "ffn in": (2 * (128 * 48 + 48), 2 * 8 * 48),
                 "ffn out": (2 * (512 * 32 + 32), 2 * 8 * 32), "norms": (2 * (4 * 32 + 2 * 48), 0), "embedding": (400 * 32, 0)}
        for part, (parameters, operations) in parts.items():
            self.assertRegex(shown, rf"\n{part} +{parameters} +{operations}\n")
        everything = parts["query"][0] * 3 + sum(parts[part][0] for part in parts if part != "query") + 2 * 32
        self.assertRegex(shown, rf"\nall +{everything} ")
        self.assertIn(f"whole attention): {2 * (6 * 8 * 32 + 2 * 64 * 32):.4g} multiply-adds", shown)
        self.assertIn("growth history: none", shown)
        self.assertRegex(shown, r"layers\.0\.attention\.query\.tables +f64 \[128, 32\]")
        self.assertEqual(json.loads(self.ok("tf_inspect", "--json", self.checkpoint).out)["parameters"], everything)
        self.assertEqual(self.ok("tf_inspect", "--verify", "run2", ranks=2).out.count("whole "), 2)

    def test_grows_by_tables_and_trains_on(self):
        before = self.nll(self.checkpoint)
        self.assertIn("attention.tables      8 ->     10 tables a layer", self.grown.out)
        self.assertIn("(rule zero-tables)", self.grown.out)
        self.assertLess(self.change(self.grown), 1e-12)
        self.assertLess(abs(self.nll("tables.h5") / before - 1), 1e-12)
        shown = self.ok("tf_inspect", "tables.h5").out
        for text in [r"stage 1 at step 6 .*: attention.tables 8 -> 10, rule zero-tables, seed 3", r"ffn_out.tables 8 -> 9, "]:
            self.assertRegex(shown, text)
        self.assertIn("table_seed = 3", self.ok("tf_inspect", "--config", "tables.h5").out)
        self.assertRegex(shown, r"hash/attention +i32 \[1, 32\]")
        with h5py.File(self.path("tables.h5"), "r") as file:
            self.assertEqual(sorted(file["hash/ffn_out"][0]), list(range(48)))
        # On ranks that are added with the tables, stopped and gone on with.
        append = ["parallel.tp=2", "parallel.token_shards=append"]
        for folder, more in [("stage2", []), ("stage2_stopped", ["train.max_tokens=2304"]), ("stage2_stopped", [])]:
            ended = self.ok("tf_train", *self.settings(folder, *append, *more, config="stage2.toml"), "--init", "tables.h5", ranks=2)
        self.assertIn("goes on from stage2_stopped/step_00000009.h5 (step 9)", ended.err)
        self.same_tensors("stage2/step_00000012.h5", "stage2_stopped/step_00000012.h5")
        self.assertLess(self.nll("stage2/step_00000012.h5"), before - 0.05)
        with h5py.File(self.path("stage2/step_00000012.h5"), "r") as file:
            new = file["model/layers.1.attention.key.tables"][128:]
        self.assertEqual(new.shape, (32, 32))
        self.assertGreater(abs(new).max(), 0)

    def test_grows_by_a_bit(self):
        """After tables: exact, each row twice; with the new coordinate in the weight it is not, and says by how much."""
        before = self.nll("tables.h5")
        command = ["tf_expand", "--checkpoint", "tables.h5", "--grow", "attention.bits=5,ffn_out.bits=7", "--threads", 1]
        bits = self.ok(*command, "--output", "bits.h5")
        self.assertIn("ffn_out.bits      6 ->      7 bits a table", bits.out)
        self.assertIn("(rule keep-weight)", bits.out)
        self.assertLess(self.change(bits), 1e-12)
        self.assertLess(abs(self.nll("bits.h5", "--tp", 2, ranks=2) / before - 1), 1e-9)
        with h5py.File(self.path("tables.h5"), "r") as old, h5py.File(self.path("bits.h5"), "r") as new:
            for path in ["model/layers.0.ffn.out.tables", "optim/layers.0.ffn.out.tables/v"]:
                for copy in [0, 1]:
                    self.assertEqual(old[path][:].tobytes(), new[path][copy::2].tobytes(), path)
        extended = self.ok(*command, "--output", "extended.h5", "--rule", "extend-weight", ranks=2)
        self.assertGreater(self.change(extended), 1e-3)
        self.assertGreater(abs(self.nll("extended.h5") / before - 1), 1e-6)
        history = json.loads(self.ok("tf_inspect", "--json", "extended.h5").out)["growth_history"]
        self.assertEqual([(r["layer_group"], r["tokens_before"], r["tokens_after"], r["rule"]) for r in history[3:]],
                         [("attention.bits", 4, 5, "extend-weight"), ("ffn_out.bits", 6, 7, "extend-weight")])
        self.assertEqual(f"{history[3]['probe_error']:.3g}", f"{self.change(extended):.3g}")

    def test_generates(self):
        for checkpoint in [self.checkpoint, "tables.h5"]:
            command = ["--checkpoint", checkpoint, "--prompt", "And God said", "--tokens", 40, "--greedy", "--threads", 1]
            text = self.ok("tf_generate", *command).out
            self.assertGreater(len(text), len("And God said") + 20)
            self.assertEqual(self.ok("tf_generate", *command, "--no-cache").out, text)
            self.assertEqual(self.ok("tf_generate", *command, ranks=2).out, text)

    def test_what_a_growth_would_make_of_a_configuration(self):
        before = names_in(self.folder)
        command = ["tf_expand", *self.settings("unused"), "--grow", "attention.tables=10,ffn_in.tables=9,ffn_out.tables=9", "--seed", 3]
        shown = self.ok(*command).out
        self.assertEqual(shown.partition("model.")[0], self.grown.out.partition("probe: ")[0])
        self.assertEqual(re.findall(r"^(model\.\S+): .* -> (\d+)$", shown, re.M),
                         [("model.memory_width", "48"), ("model.table_seed", "3"), ("model.tables.attention", "10"), ("model.tables.ffn_in", "9"),
                          ("model.tables.ffn_out", "9"), ("model.chunk_bits.attention", "4"), ("model.chunk_bits.ffn_in", "4"),
                          ("model.chunk_bits.ffn_out", "6"), ("model.weight_bits.attention", "4"), ("model.weight_bits.ffn_in", "4"),
                          ("model.weight_bits.ffn_out", "6")])
        for message, words in [("--config only says what would grow; --checkpoint and --output are not for it", [*command, "--output", "o.h5"]),
                               ("--set overrides keys of --config, which is missing", ["tf_expand", "--set", "train.lr=1", "--grow", "ffn=1"]),
                               ("--checkpoint is missing", ["tf_expand", "--output", "o.h5", "--grow", "ffn=1"]),
                               ("--output is missing", ["tf_expand", "--checkpoint", self.checkpoint, "--grow", "attention.bits=5"])]:
            self.fails(2, message, *words)
        self.assertEqual(names_in(self.folder), before)

    def test_bad_input(self):
        command = ["tf_expand", "--checkpoint", self.checkpoint, "--output", "o.h5", "--grow"]
        for message, words in [
                ("'tables' is nothing that a memoryformer grows by; there is attention.tables, ffn_in.tables, ffn_out.tables, attention.bits, #",
                 ["tables=10"]),
                (f"{self.checkpoint} has 8 attention.tables tables a layer and cannot shrink to 4; ask for more than 8", ["attention.tables=4"]),
                ("a memoryformer grows without noise, so --noise 0.1 is not for it", ["attention.tables=9", "--noise", 0.1]),
                ("'net2net' is no rule of a memoryformer's growth; there are keep-weight and extend-weight", ["attention.bits=5", "--rule", "net2net"]),
                ("model.hash_bits.ffn_out = 17: want 1 to 16", ["ffn_out.bits=17"])]:
            self.fails(2, message, *command, *words)
        self.fails(2, "--set model.tables.attention: model.tables.attention = 10 contradicts the checkpoint, which has 0; remove the key, or start a "
                      "new run in another run.dir (tf_expand makes a model larger)", "tf_train", *self.settings("run1", "model.tables.attention=10"))
        self.assertNotIn("o.h5", names_in(self.folder))


if __name__ == "__main__":
    unittest.main()
