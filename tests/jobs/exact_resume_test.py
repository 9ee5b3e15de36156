"""run.deterministic = "layout_independent" through tf_train: one run on five layouts, and killed between three of them."""

import json
import os
import re
import signal
import subprocess
import time
import unittest

import h5py

from support import BIN, CONFIG, MPIRUN, JobTest, names_in

STEPS = 100
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]


def descendants(pid):
    """The processes that `pid` has started, and theirs."""
    children = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry))
    found = children.get(pid, [])
    for child in list(found):
        found = found + descendants(child)
    return found


class LayoutIndependent(JobTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        settings = 'deterministic = "layout_independent"\nsave_every = 10\nkeep_last = 2\n'
        config = CONFIG.replace("steps = 6\n", f"steps = {STEPS}\n").replace("save_every = 3\n", settings)
        config = config.replace("eval_every = 3\n", "eval_every = 25\n")
        cls.write("exact.toml", config)
        cls.runs = {}
        for dp, tp in LAYOUTS:
            cls.runs[dp, tp] = cls.finish(cls.run_job("tf_train", *cls.arguments(f"run{dp}x{tp}", dp, tp), ranks=dp * tp))

    @staticmethod
    def arguments(folder, dp, tp):
        return ["--config", "exact.toml", "--set", f"run.dir={folder}", "--set", f"parallel.dp={dp}", "--set",
                f"parallel.tp={tp}"]

    def losses(self, folder):
        """The text of every number of metrics.jsonl that training decides, by kind and step."""
        texts = {}
        for line in self.read(f"{folder}/metrics.jsonl").decode().splitlines():
            step = str(json.loads(line).get("step"))
            for name in ["loss", "grad_norm", "eval_loss"]:
                found = re.search(rf'"{name}": ?([^,}}]+)', line)
                if found:
                    self.assertNotIn((name, step), texts)
                    texts[name, step] = found[1]
        return texts

    def contents(self, folder):
        """The bytes of all parameters and moments at the end."""
        with h5py.File(self.path(f"{folder}/step_{STEPS:08d}.h5"), "r") as file:
            found = {}
            for group in ["model", "optim"]:
                file[group].visititems(lambda name, item: found.update({f"{group}/{name}": item[()].tobytes()})
                                       if isinstance(item, h5py.Dataset) else None)
            return found

    def expect_same_run(self, folder, other):
        a, b = self.losses(folder), self.losses(other)
        self.assertEqual(len([key for key in b if key[0] == "loss"]), STEPS)
        self.assertEqual(len([key for key in b if key[0] == "eval_loss"]), STEPS // 25)
        self.assertEqual(a, b)
        a, b = self.contents(folder), self.contents(other)
        self.assertEqual(len(a), 3 * (1 + 2 * 10 + 2))
        self.assertEqual([name for name in a if a[name] != b.get(name)], [])

    def test_five_layouts_are_one_run(self):
        for dp, tp in LAYOUTS[1:]:
            self.expect_same_run(f"run{dp}x{tp}", "run1x1")
        losses = self.losses("run1x1")
        self.assertLess(float(losses["loss", str(STEPS)]), float(losses["loss", "1"]) - 1)

    def test_the_price_is_printed(self):
        for (dp, tp), ended in self.runs.items():
            self.assertRegex(ended.err, rf"layout independent: 4 x 4 virtual shards, {4 // dp} x {4 // tp} of them on rank 0; "
                                        r"it holds [+-]\S+ MiB beside the ordinary mode and sends \S+ MB a step instead of \S+")
        self.assertIn("layout independent: ", self.ok("tf_train", *self.arguments("dry", 2, 1), "--dry-run", ranks=2).out)

    def train_until_killed(self, folder, dp, tp, step):
        """Starts on dp x tp ranks and kills every process at once when that step is in the metrics."""
        command = MPIRUN + [str(dp * tp), os.path.join(BIN, "tf_train")] + self.arguments(folder, dp, tp)
        job = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 200
        while job.poll() is None and time.time() < deadline:
            try:
                lines = self.read(f"{folder}/metrics.jsonl").splitlines(True)
                steps = [json.loads(line)["step"] for line in lines if line.endswith(b"\n") and b'"loss"' in line]
            except OSError:
                steps = []
            if steps and steps[-1] >= step:
                break
            time.sleep(0.002)
        self.assertIsNone(job.poll(), "the run ended before it was killed")
        for pid in descendants(job.pid) + [job.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        job.wait()
        self.assertNotIn(f"step_{STEPS:08d}.h5", names_in(self.path(folder)))

    def test_killed_and_restarted_on_other_layouts(self):
        self.train_until_killed("chain", 4, 1, 25)
        self.train_until_killed("chain", 1, 2, 55)
        ended = self.ok("tf_train", *self.arguments("chain", 2, 2), ranks=4)
        self.assertIn("goes on from chain/step_", ended.err)
        self.expect_same_run("chain", "run1x1")

    def test_other_numbers_of_shards_are_refused(self):
        self.fails(2, "--set parallel.virtual_tp: parallel.virtual_tp = 2 contradicts the checkpoint, which has 4 virtual "
                   "shards; remove the key, or give up the same bits with run.deterministic = \"same_layout\"",
                   "tf_train", *self.arguments("run1x1", 1, 1), "--set", "parallel.virtual_tp=2", "--set",
                   f"train.steps={STEPS + 1}")
        self.fails(2, "--set parallel.dp: parallel.dp = 5 is more than the parallel.virtual_dp = 4 shards that can be dealt",
                   "tf_train", *self.arguments("none", 5, 1))


if __name__ == "__main__":
    unittest.main()
