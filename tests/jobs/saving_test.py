"""Faults of the disk while tf_train runs, and kills in the middle of a save: the real binaries, from outside."""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import time
import unittest

import h5py

from support import BIN, MPIRUN, Ended, JobTest, SmallDisk, names_in


def content(path):
    """What a checkpoint holds, by its own digests: paths and content digests of all tensors."""
    with h5py.File(path, "r") as file:
        return file["integrity/tensors"][()].tobytes(), file["integrity/content"][()].tobytes()


def state_of(pid):
    """The state's letter and the parent of a process."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        words = file.read().rpartition(")")[2].split()
    return words[0], int(words[1])


class Background:
    """A job that runs on while the test looks at what it writes."""

    def __init__(self, test, *arguments, ranks=2):
        self.log = test.path("background.log")
        command = MPIRUN + [str(ranks), os.path.join(BIN, "tf_train")] + [str(a) for a in arguments]
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=test.folder, start_new_session=True)
        test.addCleanup(self.kill)

    def text(self):
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read()

    def wait_for(self, pattern, after=0):
        """The position behind the first match of `pattern` behind `after`."""
        while True:
            ended = self.process.poll() is not None
            text = self.text()
            found = re.search(pattern, text[after:])
            if found:
                return after + found.end()
            if ended:
                raise AssertionError(f"ended with {self.process.returncode} before {pattern!r}:\n{text}")
            time.sleep(0.01)

    def kill(self):
        """SIGKILL of all ranks, which have process groups of their own, and of the launcher."""
        ranks = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if state_of(name)[1] == self.process.pid:
                    ranks.append(name)
        for pid in [*ranks, self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.process.wait()
        for pid in ranks:
            with contextlib.suppress(OSError):
                while state_of(pid)[0] != "Z":
                    time.sleep(0.001)


class Saving(JobTest):
    LONG = ["--config", "tiny.toml", "--set", "train.steps=1000000", "--set", "train.eval_every=0", "--set", "run.save_every=20",
            "--set", "run.save_retry_s=0.05", "--set", "run.log_every=100000"]
    REFUSED = r"step (\d+) COULD NOT BE SAVED: "

    def test_a_full_disk_with_space_again_later(self):
        disk = SmallDisk(self, "16m")
        job = Background(self, *self.LONG, "--set", f"run.dir={disk.folder}/run")
        at = job.wait_for(r"saved \S+/run/step_\d+\.h5 ")
        with contextlib.suppress(OSError), open(f"{disk.folder}/filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        at = job.wait_for(self.REFUSED + r"\S+/run/step_\d+\.h5: the disk is full", at)
        at = job.wait_for(self.REFUSED, at)  # and again
        whole = [name for name in names_in(f"{disk.folder}/run") if re.fullmatch(r"step_\d+\.h5", name)]
        self.assertTrue(whole)
        self.assertIn("whole    ", self.ok("tf_inspect", "--verify", f"{disk.folder}/run/{whole[-1]}").out)
        os.remove(f"{disk.folder}/filler")
        job.wait_for(r"saved \S+/run/step_\d+\.h5 ", at)
        job.kill()
        lines = self.read(f"{disk.folder}/run/metrics.jsonl").decode().splitlines(keepends=True)
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n") and "loss" in line]
        self.assertEqual(steps, list(range(1, len(steps) + 1)))

    def test_a_folder_that_vanishes(self):
        job = Background(self, *self.LONG, "--set", "run.dir=vanishing")
        at = job.wait_for(r"saved vanishing/step_\d+\.h5 ")
        os.rename(self.path("vanishing"), self.path("vanished"))
        shutil.rmtree(self.path("vanished"))
        # A save that was under way is refused; a later one makes the folder again.
        at = job.wait_for(r"saved vanishing/step_\d+\.h5 ", at)
        job.wait_for(r"saved vanishing/step_\d+\.h5 ", at)
        job.kill()
        self.assertRegex(self.run_job("tf_inspect", "--verify", "vanishing").out, r"whole    vanishing/step_\d+\.h5 ")
        self.assertIn("metrics.jsonl", names_in(self.path("vanishing")))

    def test_a_read_only_folder(self):
        disk = SmallDisk(self, "8m")
        folder = f"{disk.folder}/run"
        job = Background(self, *self.LONG, "--set", f"run.dir={folder}")
        at = job.wait_for(r"saved \S+/run/step_\d+\.h5 ")
        # A mount over the folder that is read-only from its first moment on, as a mount that a file was opened in for
        # writing cannot be made read-only.
        aside = self.path("read_only")
        os.mkdir(aside)
        subprocess.run(["mount", "--bind", folder, aside], check=True)
        self.addCleanup(subprocess.run, ["umount", "--lazy", aside], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", aside], check=True)
        subprocess.run(["mount", "--bind", aside, folder], check=True)
        try:
            at = job.wait_for(self.REFUSED + r"\S+: cannot be \w+.*: Read-only file system", at)
            before = names_in(folder)
            at = job.wait_for(self.REFUSED, at)
            self.assertEqual([n for n in before if n.endswith(".h5")], [n for n in names_in(folder) if n.endswith(".h5")])
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
        job.wait_for(r"saved \S+/run/step_\d+\.h5 ", at)
        job.kill()

    def test_a_limit_of_file_sizes_is_named(self):
        command = ["bash", "-c", f'ulimit -f 64; exec {BIN}/tf_train --config tiny.toml --set run.dir=limited --set run.save_retry_s=0.01']
        done = subprocess.run(command, capture_output=True, cwd=self.folder, timeout=240)
        text = done.stderr.decode()
        self.assertEqual(done.returncode, 3, text)
        self.assertIn("larger than a file may be here; see ulimit -f", text)
        self.assertEqual(names_in(self.path("limited")), ["metrics.jsonl", "starts.json"])

    def test_killed_in_the_middle_of_a_save(self):
        # Large enough that a save can be met; the same steps without and with kills.
        larger = ["--config", "tiny.toml", "--set", "model.dim=128", "--set", "model.tokens.ffn=3000", "--set", "train.steps=30",
                  "--set", "train.batch=2", "--set", "train.eval_every=0", "--set", "run.save_every=2"]
        self.ok("tf_train", *larger, "--set", "run.dir=quiet", ranks=2)
        met = 0
        for saves in [1, 2, 4, 3, 1, 5]:
            job = Background(self, *larger, "--set", "run.dir=killed")
            seen = set()
            while job.process.poll() is None and len(seen) < saves:
                seen.update(glob.glob(self.path("killed/.step_*.h5.????????????????.tmp")))
                time.sleep(0.001)
            if job.process.poll() is None:
                job.kill()
                met += 1
        self.assertGreaterEqual(met, 3, job.text())
        self.ok("tf_train", *larger, "--set", "run.dir=killed", ranks=2)
        self.assertEqual(content(self.path("killed/step_00000030.h5")), content(self.path("quiet/step_00000030.h5")))
        self.assertEqual([n for n in names_in(self.path("killed")) if n.endswith(".tmp")], [])

    def test_a_damaged_newest_is_set_aside(self):
        self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=quiet6", ranks=2)
        shutil.copytree(self.path("quiet6"), self.path("hurt"))
        with h5py.File(self.path("hurt/step_00000006.h5"), "r") as file:
            at = file["optim/layers.0.ffn.keys/m"].id.get_offset() + 7 * 32 * 4
        data = bytearray(self.read("hurt/step_00000006.h5"))
        data[at] ^= 1
        self.write("hurt/step_00000006.h5", bytes(data))
        shutil.copytree(self.path("hurt"), self.path("salvaged"))

        listing = self.run_job("tf_inspect", "--verify", "hurt")
        self.assertEqual(listing.code, 4, listing)
        damage = r"(rank \d: )?hurt/step_00000006\.h5: damaged between bytes 0 and \d+: optim/layers\.0\.ffn\.keys/m row 7"
        self.assertRegex(listing.out, r"^whole    hurt/step_00000003\.h5  step 3\ndamaged  " + damage)
        files = names_in(self.path("hurt"))
        self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=hurt", "--dry-run", ranks=2)
        self.assertEqual(names_in(self.path("hurt")), files)

        ended = self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=hurt", ranks=2)
        self.assertRegex(ended.err, "DAMAGED CHECKPOINT: " + damage)
        self.assertIn("goes on from the OLDER hurt/step_00000003.h5 (step 3)", ended.err)
        self.assertIn("hurt/step_00000006.h5 is kept as hurt/step_00000006.h5.damaged", ended.err)
        self.assertEqual(self.read("hurt/step_00000006.h5.damaged"), bytes(data))
        self.assertEqual(content(self.path("hurt/step_00000006.h5")), content(self.path("quiet6/step_00000006.h5")))

        ended = self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=salvaged", "--set", "train.steps=8", "--salvage", ranks=2)
        self.assertIn("SALVAGE of salvaged/step_00000006.h5: optim/layers.0.ffn.keys/m is damaged", ended.err)
        self.assertIn("state       salvaged = step 6: optim/layers.0.ffn.keys/m",
                      self.ok("tf_inspect", "salvaged/step_00000008.h5").out)

    def test_a_lost_file_is_named(self):
        self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=lost")
        os.remove(self.path("lost/step_00000006.h5"))
        damage = "lost/step_00000006.h5: the file is missing; only its manifest is there"
        listing = self.run_job("tf_inspect", "--verify", "lost")
        self.assertEqual(listing.code, 4, listing)
        self.assertEqual(listing.out, f"whole    lost/step_00000003.h5  step 3\ndamaged  {damage}\n")
        ended = self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=lost")
        self.assertIn(f"DAMAGED CHECKPOINT: {damage}\n", ended.err)
        self.assertIn("goes on from the OLDER lost/step_00000003.h5 (step 3)", ended.err)
        self.assertIn("step_00000006.h5.damaged.manifest", names_in(self.path("lost")))

    def test_what_may_not_be_read_is_no_damage(self):
        self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=locked")
        before = names_in(self.path("locked"))
        os.chmod(self.folder, 0o755)
        for name in ["step_00000006.h5", "step_00000006.h5.manifest"]:
            os.chmod(self.path(f"locked/{name}"), 0)
            ended = self.ends_as_nobody("tf_train", "--config", "tiny.toml", "--set", "run.dir=locked", "--set", "train.steps=9")
            self.assertEqual(ended.code, 2, ended)
            self.assertEqual(ended.errors, [
                f"tf_train: error: locked/{name}: cannot be opened: Permission denied; nothing was trained: mend that, or move the "
                "checkpoint and its manifest away to go on from an older one"])
            os.chmod(self.path(f"locked/{name}"), 0o644)
        self.assertEqual(names_in(self.path("locked")), before)
        ended = self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=locked", "--set", "train.steps=7")
        self.assertIn("goes on from locked/step_00000006.h5 (step 6)", ended.err)

    def ends_as_nobody(self, job, *arguments):
        """For whom permissions count; for root they do not."""
        nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        if subprocess.run(["test", "-x", f"{BIN}/{job}"], **nobody).returncode != 0:
            self.skipTest("the build is not for everybody to run")
        command = [f"{BIN}/{job}", *arguments]
        return Ended(command, subprocess.run(command, capture_output=True, cwd=self.folder, timeout=240, **nobody))

    def test_what_a_killed_expansion_left_is_removed(self):
        self.ok("tf_train", "--config", "tiny.toml", "--set", "run.dir=small")
        left = [f".{name}.0123456789abcdef.tmp" for name in ["big.h5", "big.h5.manifest", "other.h5"]]
        for name in left:
            self.write(name, "x")
        self.ok("tf_expand", "--checkpoint", "small/step_00000006.h5", "--output", "big.h5", "--tokens", "ffn=48", ranks=2)
        self.assertEqual([name for name in names_in(self.folder) if name.endswith(".tmp")], left[2:])

    def test_a_whole_dataset_and_a_damaged_one(self):
        self.assertIn("whole    data.h5  fingerprint ", self.ok("tf_inspect", "--dataset", "data.h5").out)
        data = bytearray(self.read("data.h5"))
        with h5py.File(self.path("data.h5"), "r") as file:
            data[file["train/tokens"].id.get_offset() + 1000] ^= 1
        self.write("data_hurt.h5", bytes(data))
        self.fails(2, "data_hurt.h5 is damaged: its content has fingerprint #, the file says #; make it again with tf_prepare",
                   "tf_inspect", "--dataset", "data_hurt.h5")


if __name__ == "__main__":
    unittest.main()
