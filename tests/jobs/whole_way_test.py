"""Prepare, train, expand, train on, evaluate, generate, inspect: the real binaries on real text."""

import os
import re
import unittest

import h5py

from support import CONFIG, JOBS, JobTest, names_in


def evaluations(lines):
    return [line for line in lines if "eval_loss" in line]


class WholeWay(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.train()
        cls.expanded = cls.finish(cls.run_job("tf_expand", "--checkpoint", cls.checkpoint, "--output", "grown.h5",
                                              "--tokens", "query=24,key=24,value=24,proj=24,ffn=48", "--threads", 1))
        # Without [model]: the checkpoint says what the model is.
        cls.write("stage2.toml", CONFIG[CONFIG.index("[data]"):])
        cls.stage2 = cls.finish(cls.run_job("tf_train", "--config", "stage2.toml", "--init", "grown.h5", "--set",
                                            "run.dir=stage2", "--set", "train.steps=12", ranks=2))

    def test_prepared_documents_are_the_chapters(self):
        with h5py.File(self.path("data.h5"), "r") as file:
            documents = sum(len(file[split]["offsets"]) - 1 for split in ["train", "validation", "test"])
        self.assertEqual(documents, 20)

    def test_training_writes_metrics_and_checkpoints(self):
        self.assertEqual(names_in(self.path("run")), ["metrics.jsonl", "step_00000003.h5", "step_00000003.h5.manifest",
                                                      "step_00000006.h5", "step_00000006.h5.manifest"])
        steps = [line for line in self.metrics("run") if "loss" in line]
        self.assertEqual([line["step"] for line in steps], [1, 2, 3, 4, 5, 6])
        self.assertEqual([line["tokens"] for line in steps], [256 * i for i in range(1, 7)])
        self.assertLess(steps[-1]["loss"], steps[0]["loss"] - 0.1)
        self.assertEqual([line["step"] for line in evaluations(self.metrics("run"))], [3, 6])

    def test_growth_is_exact_and_training_goes_on(self):
        self.assertIn("ffn        24 ->     48 tokens a layer", self.expanded.out)
        change = float(re.search(r"max\|logits\| = (\S+)", self.expanded.out)[1])
        self.assertLess(change, 1e-5)
        self.assertIn("goes on from grown.h5 (step 6)", self.stage2.err)
        steps = [line for line in self.metrics("stage2") if "loss" in line]
        self.assertEqual([line["step"] for line in steps], list(range(7, 13)))
        self.assertTrue(all(line["stage"] == 1 for line in steps))
        for line in steps:
            self.assertTrue(0 < line["communication_exposed_seconds"] <= line["communication_seconds"])
            self.assertGreater(line["communication_bytes"], 0)
        before = self.evaluate(self.checkpoint)["nll"]
        right_after = self.evaluate("grown.h5")["nll"]
        end = self.evaluate("stage2/step_00000012.h5")["nll"]
        self.assertLess(abs(right_after / before - 1), 1e-5)
        self.assertLess(end, before - 0.05)

    def test_evaluation_is_the_same_on_any_ranks_and_batch(self):
        want = self.evaluate(self.checkpoint)
        with h5py.File(self.path("data.h5"), "r") as file:
            offsets = file["validation"]["offsets"][:]
        # Every token but the first of each document is scored, once.
        self.assertEqual(want["scored_tokens"], int(offsets[-1]) - (len(offsets) - 1))
        self.assertEqual(want["documents"], len(offsets) - 1)
        for ranks, arguments in [(1, ["--batch", 1]), (1, ["--batch", 7]), (2, ["--batch", 3]), (2, ["--tp", 2]),
                                 (3, []), (3, ["--tp", 3, "--batch", 5]), (4, ["--tp", 2]), (4, ["--batch", 1000])]:
            got = self.evaluate(self.checkpoint, *arguments, ranks=ranks)
            for key in ["nll", "token_perplexity", "word_perplexity", "bits_per_byte"]:
                self.assertLess(abs(got[key] / want[key] - 1), 1e-6, f"{key} on {ranks} ranks, {arguments}")
            self.assertEqual(got["scored_tokens"], want["scored_tokens"])

    def test_evaluation_agrees_with_training(self):
        """The run's own evaluation at its end, and the job's over the same tokens with the same windows."""
        inside = evaluations(self.metrics("run"))[-1]["eval_loss"]
        outside = self.evaluate(self.checkpoint, "--context", 64, "--stride", 64, "--max-tokens", 512)["nll"]
        self.assertLess(abs(outside / inside - 1), 1e-6)

    def test_generation_with_and_without_cache_gives_the_same_text(self):
        for options in [["--greedy"], ["--temperature", 0.9, "--top-k", 40, "--seed", 3],
                        ["--top-p", 0.8, "--seed", 4, "--tokens", 90, "--slide"]]:
            command = ["--checkpoint", "stage2/step_00000012.h5", "--prompt", "And God said", "--tokens", 40, "--threads", 1]
            if "--tokens" in options:
                command = command[:4] + command[6:]
            cached = self.ok("tf_generate", *command, *options)
            self.assertTrue(cached.out.startswith("And God said"), cached)
            self.assertGreater(len(cached.out), len("And God said") + 20)
            self.assertEqual(self.ok("tf_generate", *command, *options, "--no-cache").out, cached.out)
            self.assertEqual(self.ok("tf_generate", *command, *options, ranks=2).out, cached.out)

    def test_samples_come_one_after_the_other(self):
        command = ["tf_generate", "--checkpoint", "stage2/step_00000012.h5", "--prompt", "And God said", "--tokens", 30]
        alone = self.ok(*command, "--seed", 3)
        several = self.ok(*command, "--seed", 3, "--samples", 3, ranks=2).out
        parts = re.split(r"^--- sample (\d) of 3\n", several, flags=re.MULTILINE)
        self.assertEqual(parts[::2][0], "")
        self.assertEqual(parts[1::2], ["1", "2", "3"])
        self.assertEqual(parts[2], alone.out + "\n")
        self.assertEqual(len(set(parts[2::2])), 3)

    def test_generation_stops_at_the_trained_length(self):
        ended = self.ok("tf_generate", "--checkpoint", self.checkpoint, "--tokens", 200, "--threads", 1)
        self.assertIn("stopped at 64 tokens, the length that the model was trained on; --slide goes on past it", ended.err)

    def test_inspection_shows_the_history(self):
        self.assertIn("growth history: none", self.ok("tf_inspect", self.checkpoint).out)
        shown = self.ok("tf_inspect", "stage2/step_00000012.h5").out
        history = shown[shown.index("growth history"):]
        self.assertEqual(len(re.findall("stage 1 at step 6 ", history)), 5)
        self.assertRegex(history, r"ffn +24 -> 48, rule zero-key, seed 1, scale 4\.898\S* -> 4\.898")
        self.assertIn("layers.1.ffn.keys", shown)
        whole = self.ok("tf_inspect", "stage2").out.splitlines()
        self.assertTrue(whole and all(line.startswith("whole ") for line in whole), whole)
        self.assertIn("ffn = 48", self.ok("tf_inspect", "stage2/step_00000012.h5", "--config").out)

    def test_a_finished_run_has_nothing_left_to_do(self):
        before = self.read("run/step_00000006.h5"), self.read("run/metrics.jsonl")
        ended = self.ok("tf_train", "--config", "tiny.toml", ranks=2)
        self.assertIn("run/step_00000006.h5 is the end of the run: nothing is left to do", ended.err)
        self.assertEqual((self.read("run/step_00000006.h5"), self.read("run/metrics.jsonl")), before)

    def test_a_stopped_run_goes_on_bit_for_bit(self):
        self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=stopped", "--set", "train.max_tokens=768", ranks=2)
        self.assertIn("step_00000003.h5", names_in(self.path("stopped")))
        ended = self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=stopped", ranks=2)
        self.assertIn("goes on from stopped/step_00000003.h5 (step 3)", ended.err)
        self.assertIn("changed: train.max_tokens: 768 -> 0", ended.err)
        with h5py.File(self.path("run/step_00000006.h5"), "r") as whole:
            with h5py.File(self.path("stopped/step_00000006.h5"), "r") as parts:
                for name in ["model/layers.1.ffn.keys", "optim/layers.0.attention.query.values/v"]:
                    self.assertEqual(whole[name][:].tobytes(), parts[name][:].tobytes(), name)

    def test_a_run_out_of_time_is_saved_and_asks_for_more(self):
        ended = self.run_job("tf_train", "--config", "tiny.toml", "--set", "run.dir=timed", "--set", "train.max_time=0.001")
        self.assertEqual(ended.code, 10, ended)
        self.assertIn("train.max_time is over: stopped at step 1 of 6; run again to go on", ended.err)
        self.assertIn("step_00000001.h5", names_in(self.path("timed")))

    def test_another_dataset_with_the_models_tokenizer(self):
        for tokenizer in ["data.h5", self.checkpoint]:
            self.ok("tf_prepare", "kjv.txt", "--document-start", "^Ge[0-9]+:[15] ", "--tokenizer", tokenizer, "--output",
                    "verses.h5", "--force")
            self.fails(2, "verses.h5 is not the dataset that run/step_00000006.h5 was trained on (fingerprints # and #); "
                       "--new-dataset goes on with it from its first sample",
                       "tf_train", "--config", "tiny.toml", "--set", "data.path=verses.h5", "--set", "run.dir=verses",
                       "--set", "train.steps=7", "--init", self.checkpoint)
        self.ok("tf_train", "--config", "tiny.toml", "--set", "data.path=verses.h5", "--set", "run.dir=verses", "--set",
                "train.steps=7", "--init", self.checkpoint, "--new-dataset")
        # A resume of the run is refused on the dataset of before, and goes on with it where that is asked for.
        resume = ["tf_train", "--config", "tiny.toml", "--set", "run.dir=verses", "--set", "train.steps=8"]
        files = names_in(self.path("verses"))
        self.fails(2, "data.h5 is not the dataset that verses/step_00000007.h5 was trained on (fingerprints # and #); #", *resume)
        self.assertEqual(names_in(self.path("verses")), files)
        ended = self.ok(*resume, "--new-dataset")
        self.assertIn("goes on from verses/step_00000007.h5 (step 7)", ended.err)
        self.assertIn("data.h5 is another dataset than before; its samples begin anew", ended.err)
        # From then on it is the run's dataset.
        ended = self.ok(*resume[:-1], "train.steps=9")
        self.assertNotIn("another dataset", ended.err)
        self.assertIn("step_00000009.h5", names_in(self.path("verses")))

    def test_a_difference_over_the_tolerance_has_a_code_of_its_own(self):
        golden = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../golden/tokenformer_softmax.h5")
        self.ok("tf_inspect", "--compare", golden)
        ended = self.run_job("tf_inspect", "--compare", golden, "--tolerance", 0, ranks=2)
        self.assertEqual(ended.code, 5, ended)


class Words(JobTest):
    """--help, --version and --dry-run."""

    def test_help(self):
        for job in JOBS:
            for option in ["--help", "-h"]:
                ended = self.ok(job, option)
                self.assertTrue(ended.out.startswith(f"Usage: {job} [options]"), ended)
                for part in ["Options:", "--version", "\nExamples:\n  "]:
                    self.assertIn(part, ended.out)
                self.assertEqual(ended.err, "")
                self.assertLessEqual(max(len(line) for line in ended.out.split("\nExamples:")[0].splitlines()), 100)
        self.assertEqual(self.ok("tf_train", "--help", ranks=2).out.count("Usage:"), 1)

    def test_version_is_one_line_and_the_same_for_all(self):
        lines = {self.ok(job, "--version").out for job in JOBS}
        self.assertEqual(len(lines), 1)
        self.assertRegex(lines.pop(), r"^tokenforge \d+\.\d+\.\d+, commit \S+, GNU \S+ \w+, OpenBLAS \S+, Open MPI \S+, "
                                      r"HDF5 \S+, CUDA \S+\n$")

    def test_dry_run_prints_the_plan_and_writes_nothing(self):
        before = names_in(self.folder)
        ended = self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=deep/er", "--dry-run", ranks=2)
        self.assertEqual(names_in(self.folder), before)
        parameters = 2 * (4 * 12 + 24) * 2 * 32 + 400 * 32 + 2 * 32
        forward = 2 * (2 * (4 * 12 + 24) * 64 + 4 * 65 / 2 * 32) + 2 * 32 * 400
        for part in ["vocab = 400", "lr = 0.003", 'dir = "deep/er"', f"parameters         {parameters}\n",
                     "ranks              dp 2 x tp 1\n", "tokens per step    256\n",
                     f"without the ends   {parameters - 400 * 32} (embedding and head)\n",
                     f"FLOPs per token    {forward:.0f} forward, {3 * forward:.0f} training\n",
                     f"2 calls {4 * parameters:>16} bytes, while backward runs\n", "memory per rank"]:
            self.assertIn(part, ended.out, ended)

    def test_planned_memory_is_what_the_run_takes(self):
        larger = ["model.dim=128", "model.layers=4", "model.max_seq=128", "train.batch=8", "model.tokens.query=96",
                  "model.tokens.key=96", "model.tokens.value=96", "model.tokens.proj=96", "model.tokens.ffn=384",
                  "train.steps=3", "train.eval_every=2", "run.save_every=2"]
        for number, (ranks, more) in enumerate([(1, []), (2, []), (2, ["parallel.tp=2"]), (2, ["parallel.zero=1"]),
                                                (1, ["train.micro_batch=2"]), (1, ["run.save=blocking"]),
                                                (1, ["model.norm=softmax"]), (2, ["model.norm=gelu_l2_norm", "parallel.tp=2"]),
                                                (2, ["run.deterministic=layout_independent"]),
                                                (2, ["run.deterministic=layout_independent", "parallel.tp=2"]),
                                                (1, ["train.dtype=f64"]), (1, ["model.layers=1"]), (1, ["run.threads=2"]),
                                                # evaluation of all windows at once would take far more than training
                                                (1, ["train.micro_batch=1", "model.layers=1", "train.eval_tokens=0"])]):
            options = ["--config", "tiny.toml"]
            for setting in larger + more + [f"run.dir=memory{number}"]:
                options += ["--set", setting]
            plan = self.ok("tf_train", *options, "--dry-run", ranks=ranks).out
            planned = float(re.search(r"^  0: .* = (\S+)$", plan, re.M)[1])
            peak = float(re.search(r"peak tensor memory, MiB: .*all (\S+)$", self.ok("tf_train", *options, ranks=ranks).err,
                                   re.M)[1])
            self.assertLess(abs(planned / peak - 1), 0.03, f"planned {planned}, peak {peak} MiB on {ranks} ranks with {more}")


if __name__ == "__main__":
    unittest.main()
