"""The jobs on devices, which are emulated ones: train, resume, evaluate and generate on them and on the CPU in turn."""

import json
import os
import re
import unittest

from support import CONFIG, JobTest, configured

DEVICE = ["run.device=cuda"]


class Device(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # Few rows: an emulated device is slow.
        cls.write("tiny.toml", CONFIG.replace("max_seq = 64", "max_seq = 32"))
        cls.finish(cls.run_job("tf_train", *cls.settings("cpu")))
        cls.finish(cls.run_job("tf_train", *cls.settings("bf16", *DEVICE, "train.dtype=bf16")))

    @staticmethod
    def settings(folder, *more):
        return configured("tiny.toml", f"run.dir={folder}", "train.eval_tokens=128", *more)

    def near(self, losses, bound):
        want = self.losses("cpu")
        self.assertEqual(losses.keys(), want.keys())
        for step in want:
            self.assertLess(abs(losses[step] / want[step] - 1), bound, f"step {step}")

    def test_trains_as_the_cpu_does(self):
        self.ok("tf_train", *self.settings("f32", *DEVICE))
        self.near(self.losses("f32"), 1e-5)
        self.near(self.losses("bf16"), 0.01)
        self.assertNotEqual(self.losses("bf16"), self.losses("f32"))
        self.ok("tf_train", *self.settings("tf32", *DEVICE, "train.tf32=true"))
        self.near(self.losses("tf32"), 1e-3)
        self.assertNotEqual(self.losses("tf32"), self.losses("f32"))

    def test_several_devices_and_a_shared_one(self):
        self.ok("tf_train", *self.settings("dp", *DEVICE, "parallel.dp=2"), ranks=2, env={"TFORGE_EMULATOR_DEVICES": "2"})
        self.near(self.losses("dp"), 1e-5)
        self.ok("tf_train", *self.settings("tp", *DEVICE, "parallel.tp=2", "train.dtype=bf16"), ranks=2,
                env={"TFORGE_EMULATOR_DEVICES": "2"})
        self.near(self.losses("tp"), 0.01)
        self.ok("tf_train", *self.settings("shared", *DEVICE, "parallel.tp=2", "parallel.share_device=true"), ranks=2)
        self.near(self.losses("shared"), 1e-5)
        self.fails(2, 'run.device = "cuda": ranks 0 and 1 would use the same device of #, where 2 ranks are; start as many '
                   "ranks as there are devices, or let ranks share one with parallel.share_device = true",
                   "tf_train", *self.settings("refused", *DEVICE, "parallel.tp=2"), ranks=2)

    def test_resumes_there_and_back(self):
        stop = "train.max_tokens=384"  # 3 updates
        self.ok("tf_train", *self.settings("stopped", *DEVICE, "train.dtype=bf16", stop))
        self.ok("tf_train", *self.settings("stopped", *DEVICE, "train.dtype=bf16"))
        self.same_tensors("bf16/step_00000006.h5", "stopped/step_00000006.h5")
        self.ok("tf_train", *self.settings("moved", *DEVICE, stop))
        resumed = self.ok("tf_train", *self.settings("moved"))
        self.assertIn('run.device: "cuda" -> "cpu"', resumed.err)
        self.near(self.losses("moved"), 1e-5)

    def test_algorithms_are_measured_once_and_kept(self):
        # Which algorithm of a product is the fastest changes from start to start, as far as the emulated clock tells.
        devices = {"TFORGE_EMULATOR_DEVICES": "2"}

        def train(folder, fastest, *more, **env):
            return self.ok("tf_train", *self.settings(folder, *DEVICE, "run.products=measured", "parallel.dp=2", *more),
                           ranks=2, env={**devices, "TFORGE_EMULATOR_FASTEST": fastest, **env})

        train("measured", "2")
        with open(self.path("measured/algorithms.json"), encoding="utf-8") as file:
            kept = json.load(file)
        self.assertEqual(kept["depends_on"], "an emulated device of 1 multiprocessors, cuBLASLt 1, NCCL 0")
        self.assertGreater(len(kept["algorithms"]), 10)
        stop = "train.max_tokens=384"  # 3 updates
        for folder in ["kept", "removed", "moved"]:
            train(folder, "2", stop)
        resumed = train("kept", "3")
        self.assertIn(f'{len(kept["algorithms"])} algorithms of products are those of kept/algorithms.json', resumed.err)
        self.same_tensors("measured/step_00000006.h5", "kept/step_00000006.h5")
        os.unlink(self.path("removed/algorithms.json"))
        self.assertIn("there is no removed/algorithms.json: algorithms are measured anew, and bits may not be those of an "
                      "uninterrupted run", train("removed", "3").err)
        with self.assertRaises(AssertionError):  # else the test shows nothing
            self.same_tensors("measured/step_00000006.h5", "removed/step_00000006.h5")
        self.assertIn("the run was on an emulated device of 1 multiprocessors, cuBLASLt 1, NCCL 0 and goes on on another of 1 "
                      "multiprocessors, cuBLASLt 1, NCCL 0: from here on its bits are not those of an uninterrupted run",
                      train("moved", "2", TFORGE_EMULATOR_NAME="another").err)
        with open(self.path("moved/algorithms.json"), "w", encoding="utf-8") as file:
            file.write("{")
        self.fails(2, "moved/algorithms.json is damaged; remove it, and algorithms are measured anew", "tf_train",
                   *self.settings("moved", *DEVICE, "run.products=measured", "train.steps=9"))

    def test_evaluates_and_generates(self):
        checkpoint = "cpu/step_00000006.h5"
        want = self.nll(checkpoint, "--max-tokens", 256)
        self.assertLess(abs(self.nll(checkpoint, "--max-tokens", 256, "--device", "cuda") / want - 1), 1e-5)
        # What was trained in bf16 is evaluated so on a device, and in f32 on the CPU.
        narrow = [self.nll("bf16/step_00000006.h5", "--max-tokens", 256, "--device", d) for d in ["cpu", "cuda"]]
        self.assertLess(abs(narrow[1] / narrow[0] - 1), 0.01)
        self.assertNotEqual(narrow[0], narrow[1])
        command = ["--checkpoint", checkpoint, "--prompt", "And God", "--tokens", 12, "--greedy", "--threads", 1]
        text = self.ok("tf_generate", *command).out
        self.assertEqual(self.ok("tf_generate", *command, "--device", "cuda").out, text)
        self.assertEqual(self.ok("tf_generate", *command, "--device", "cuda", "--share-device", ranks=2).out, text)
        self.fails(2, "--device gpu: there are cpu and cuda", "tf_generate", *command, "--device", "gpu")

    def test_without_a_device(self):
        none = {"TFORGE_EMULATOR_DEVICES": "0"}
        ended = self.run_job("tf_train", *self.settings("none", *DEVICE), env=none)
        self.assertEqual(ended.code, 3, ended)
        self.assertTrue(re.match(r'tf_train: error: run.device = "cuda": there is none here: ', ended.errors[0]), ended)
        self.assertEqual(len(ended.errors), 1, ended)


if __name__ == "__main__":
    unittest.main()
