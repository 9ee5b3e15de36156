"""tf_train under signals, time limits, stopped processes and crashes."""

import glob
import json
import os
import re
import signal
import subprocess
import time
import unittest

from support import BIN, MPIRUN, JobTest, names_in

LONG = ["train.steps=100000", "train.eval_every=0", "run.save_every=0", "run.log_every=100000"]
# A step of seconds in many micro-batches.
SLOW = LONG + ["model.dim=256", "model.layers=4", "model.tokens.query=256", "model.tokens.key=256", "model.tokens.value=256",
               "model.tokens.proj=256", "model.tokens.ffn=1024", "train.micro_batch=2",
               "train.batch=" + ("48" if "TFORGE_SLOW_BUILD" in os.environ else "192")]


class StopTest(JobTest):
    def start(self, run, settings, ranks=2, env=None):
        """A tf_train in the background, writing to run.log; killed at the end of the test."""
        command = (MPIRUN + [str(ranks)] if ranks else []) + [os.path.join(BIN, "tf_train"), "--config", "tiny.toml"]
        for setting in settings + [f"run.dir={run}"]:
            command += ["--set", setting]
        log = open(self.path(f"{run}.log"), "ab")
        self.addCleanup(log.close)
        process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env={**os.environ, **(env or {})})
        process.run, process.ranks = run, ranks
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def log(self, process):
        return self.read(f"{process.run}.log").decode("utf-8", "replace")

    def wait_for(self, process, condition):
        while not condition():
            self.assertIsNone(process.poll(), self.log(process))
            time.sleep(0.01)

    def metrics(self, process):
        if not os.path.exists(self.path(f"{process.run}/metrics.jsonl")):
            return []
        text = self.read(f"{process.run}/metrics.jsonl").decode()
        return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]

    def wait_for_steps(self, process, steps):
        self.wait_for(process, lambda: sum("loss" in line for line in self.metrics(process)) >= steps)

    def rank_pids(self, process):
        """Process ids in rank order."""
        if not process.ranks:
            return [process.pid]
        pids = {}
        for entry in glob.glob("/proc/[0-9]*/environ"):
            pid = int(entry.split("/")[2])
            try:
                with open(f"/proc/{pid}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                with open(entry, "rb") as file:
                    rank = re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", file.read())
            except OSError:
                continue
            if parent == process.pid and rank:
                pids[int(rank[1])] = pid
        self.assertEqual(sorted(pids), list(range(process.ranks)))
        return [pids[rank] for rank in sorted(pids)]

    def end(self, process, code):
        process.wait(timeout=120)
        self.assertEqual(process.returncode, code, self.log(process))
        self.assertNotIn("the grace (run.grace_s) ends", self.log(process))
        return self.log(process)

    def stopped_at(self, process, log, reason):
        """The step of the line that says so; it is saved and whole."""
        found = re.search(rf"{reason}: stopped at step (\d+) of \d+; run again to go on", log)
        self.assertTrue(found, log)
        step = int(found[1])
        self.assertEqual([name for name in names_in(self.path(process.run)) if name.endswith(".tmp")], [])
        self.ok("tf_inspect", f"{process.run}/step_{step:08}.h5")
        return step


class Signals(StopTest):
    def test_usr1_saves_and_stops_and_the_run_goes_on_bit_for_bit(self):
        settings = [s for s in LONG if "steps" not in s] + ["train.steps=60"]
        process = self.start("usr1", settings, ranks=3)
        self.wait_for_steps(process, 3)
        process.send_signal(signal.SIGUSR1)  # mpirun hands it on
        step = self.stopped_at(process, self.end(process, 10), "SIGUSR1 or SIGINT")
        self.assertGreaterEqual(step, 3)
        for run in ["usr1", "whole"]:
            self.end(self.start(run, settings, ranks=3), 0)
        self.assertNotIn("starts.json", names_in(self.path("usr1")))
        loss = [line["loss"] for line in self.metrics(process) if "loss" in line]
        process.run = "whole"
        self.assertEqual(loss, [line["loss"] for line in self.metrics(process) if "loss" in line])

    def test_a_signal_to_one_rank_stops_all_at_one_step(self):
        process = self.start("one", LONG)
        self.wait_for_steps(process, 2)
        os.kill(self.rank_pids(process)[1], signal.SIGUSR1)
        self.stopped_at(process, self.end(process, 10), "SIGUSR1 or SIGINT")

    def test_term_gives_up_a_step_that_the_grace_is_too_short_for(self):
        # Half of what a step takes here and now, however busy the machine is.
        process = self.start("term", SLOW)
        self.wait_for_steps(process, 1)
        process.send_signal(signal.SIGUSR1)
        first = self.stopped_at(process, self.end(process, 10), "SIGUSR1 or SIGINT")
        grace = [line["step_seconds"] for line in self.metrics(process) if "loss" in line][-1] / 2
        # Once a save has been measured; the guess before it may be longer than the grace.
        process = self.start("term", SLOW + [f"run.grace_s={grace}", f"run.save_every={first + 1}"])
        self.wait_for_steps(process, first + 3)
        time.sleep(grace / 10)
        for pid in self.rank_pids(process):
            os.kill(pid, signal.SIGTERM)
        # Where saves are slow just then there is no time for one either.
        self.assertRegex(self.end(process, 10), r"SIGTERM: stopped at step \d+ of \d+"
                         r"(, without a save, for which the time is too short)?; run again to go on")

    def test_term_in_the_first_step_saves_nothing_and_does_not_count(self):
        process = self.start("first", SLOW + ["run.grace_s=60"])
        self.wait_for(process, lambda: "parameters, " in self.log(process))
        for pid in self.rank_pids(process):
            os.kill(pid, signal.SIGTERM)
        self.end(process, 10)
        if not self.metrics(process):  # else the step was done in time
            self.assertEqual(json.loads(self.read("first/starts.json"))["starts"], 0)

    def test_an_evaluation_is_given_up(self):
        for ranks, name in [(2, "USR1"), (3, "TERM")]:
            process = self.start(f"evaluation{ranks}", SLOW + ["train.batch=3", "train.micro_batch=1", "train.eval_every=2",
                                                               "train.eval_tokens=0"], ranks=ranks)
            self.wait_for_steps(process, 2)
            for pid in self.rank_pids(process):
                os.kill(pid, getattr(signal, "SIG" + name))
            log = self.end(process, 10)
            self.assertEqual(self.stopped_at(process, log, f"SIG{name}(?: or SIGINT)?"), 2)
            self.assertFalse(any("eval_loss" in line for line in self.metrics(process)), log)

    def test_a_second_signal_leaves_at_once(self):
        process = self.start("twice", SLOW + ["run.grace_s=600"])
        self.wait_for_steps(process, 1)
        pid = self.rank_pids(process)[0]
        os.kill(pid, signal.SIGTERM)
        time.sleep(1.1)
        if process.poll() is None:
            os.kill(pid, signal.SIGUSR1)
        self.assertIn("a second signal: this rank leaves at once", self.end(process, 14))

    def test_interrupt_from_the_keyboard_saves(self):
        process = self.start("keyboard", LONG, ranks=0)
        self.wait_for_steps(process, 2)
        process.send_signal(signal.SIGINT)
        self.stopped_at(process, self.end(process, 10), "SIGUSR1 or SIGINT")


class Limits(StopTest):
    def test_the_end_of_the_job_is_kept_without_a_signal(self):
        process = self.start("job_end", LONG, env={"SLURM_JOB_END_TIME": str(int(time.time()) + 12)})
        step = self.stopped_at(process, self.end(process, 10), r"the job's time ends \(SLURM_JOB_END_TIME\)")
        self.assertGreater(step, 0)

    def test_restarts_without_a_new_step_end_in_13(self):
        settings = ["train.lr=1e38", "train.warmup_steps=0", "train.max_bad_steps=1", "run.max_restarts=1", "run.save_every=0"]
        for expected in [11, 11, 13, 13]:
            process = self.start("loop", settings)
            log = self.end(process, expected)
        self.assertRegex(log, r"tf_train: error: 2 starts from step 0 have saved no later step; .*loop/starts.json; "
                              "run.max_restarts = 1 is the limit")
        settings[0] = "train.lr=1e-3"
        self.end(self.start("loop", settings), 0)


class Hangs(StopTest):
    def test_a_stopped_rank_is_named(self):
        for rank in [0, 2]:
            process = self.start(f"stopped{rank}", LONG + ["parallel.timeout_s=3"], ranks=3)
            self.wait_for_steps(process, 2)
            pid = self.rank_pids(process)[rank]
            os.kill(pid, signal.SIGSTOP)
            log = self.end(process, 12)
            self.assertRegex(log, rf"error: rank {rank} \(.*, pid {pid}\) is missing: no .*heartbeat")

    def test_a_suspended_job_goes_on(self):
        process = self.start("suspended", LONG + ["parallel.timeout_s=3"])
        self.wait_for_steps(process, 2)
        pids = self.rank_pids(process)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4.5)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        steps = len(self.metrics(process))
        self.wait_for_steps(process, steps + 5)
        process.send_signal(signal.SIGUSR1)
        self.stopped_at(process, self.end(process, 10), "SIGUSR1 or SIGINT")

    def test_a_slow_rank_is_named(self):
        """One that may run for a small part of the time, until the others have waited for it for long enough."""
        process = self.start("slow", LONG + ["train.batch=192"])
        self.wait_for_steps(process, 1)
        pid = self.rank_pids(process)[1]

        def named():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
            return "warning: rank " in self.log(process)
        self.wait_for(process, named)
        process.send_signal(signal.SIGUSR1)
        log = self.end(process, 10)
        found = re.search(r"rank (\d) \((.*)\) has computed more than 1.2 times as long as ranks with the same share in 20 steps in "
                          r"a row; in step (\d+): ", log)
        self.assertEqual((found[1], found[2]), ("1", os.uname().nodename), log)
        steps = [line["slowest_rank"] for line in self.metrics(process) if "loss" in line and 0 <= int(found[3]) - line["step"] < 20]
        self.assertEqual(steps, [1] * 20)

    def test_the_slowest_rank_is_in_the_metrics(self):
        process = self.start("metrics", ["train.steps=3"], ranks=3)
        self.end(process, 0)
        for line in self.metrics(process):
            if "loss" in line:
                self.assertIn(line["slowest_rank"], [0, 1, 2])
                self.assertTrue(0 < line["median_compute_seconds"] <= line["slowest_compute_seconds"] <= line["step_seconds"] * 3)


if __name__ == "__main__":
    unittest.main()
