"""Signals at any moment, twice, in evaluations, saves, steps and growth; a rank that is stopped for good."""

import json
import os
import re
import signal
import time

from world import DATA, EXPAND, FIRST, LAYOUTS, SECOND, TENSOR, TRAIN, Job, Stage, Strike, require

# Over the whole Bible, nine tenths of it for validation: an evaluation takes far longer than the grace. So does a step
# of LONG_STEPS.
GRACE = ["--set", "run.grace_s=20"]
BIG_DATA = ["--set", "data.path=../big.h5", "--set", "train.micro_batch=1"]
LONG_EVALUATIONS = Stage("evaluation", TRAIN + BIG_DATA + ["--set", "train.eval_every=0"], FIRST.result)
LONG_STEPS = ["--set", "train.batch=600000", "--set", "train.eval_every=0"]
REQUEUE, TIMED_OUT, LEFT = 10, 12, 14


class Signals:
    name, short, long = "signals", 12, 120

    def __init__(self, world):
        self.world = world
        (world.folder / "bible").write_bytes(os.popen("bible -f gen1:1-rev22:21").read().encode())
        command = ["tf_prepare", world.folder / "bible", "--document-start", "^[A-Za-z0-9]+:1 ", "--tokenizer", "bytes",
                   "--validation-fraction", "0.9", "--output", world.folder / "big.h5"]
        Job(world, world.new_folder("big"), command, 0).ends_with(0)

    def trial(self, number, rng):
        kinds = [self.at_any_call, self.in_evaluation, self.in_step, self.at_any_call, self.twice, self.stopped]
        return kinds[number % len(kinds)](number, rng)

    def folder(self, number, stage, layout):
        return self.world.trial_folder(f"signals_{number}", stage, layout)

    def send(self, job, number, rng):
        """To one rank, to all, or through mpirun."""
        pids = sorted(job.pids().values())
        to = rng.choice(["one", "all", "mpirun"])
        if to == "mpirun" and number == signal.SIGUSR1:  # others are no request to the ranks
            pids = [job.process.pid]
        elif to == "one" and pids:
            pids = [rng.choice(pids)]
        for pid in pids:
            job.send(pid, number)

    def stopped_in_time(self, job):
        code = job.end()
        require(code in (0, REQUEUE), f"exit code {code}: {job.words}\n{job.log()}")
        require("the grace (run.grace_s) ends" not in job.log(), f"it did not stop by itself: {job.words}\n{job.log()}")
        if code == REQUEUE:
            found = re.search(r"stopped at step (\d+) of", job.log())
            require(found, f"it does not say where it stopped:\n{job.log()}")
            step = int(found[1])
            # A save that would not be done within the grace is not begun.
            saved = (job.folder / f"work/run/step_{step:08}.h5.manifest").exists()
            require(saved or step == 0 or ", without a save," in job.log(),
                    f"step {step} is not saved:\n{job.log()}")
        return code

    def at_any_call(self, number, rng):
        """Of all that change a file: in saves, between steps, in growth."""
        stage, layout = rng.choice([FIRST, SECOND, SECOND, EXPAND]), rng.choice(LAYOUTS)
        quiet = self.world.quiet(stage, layout)
        rank = rng.randrange(layout.ranks)
        folder = self.folder(number, stage, layout)
        strike = Strike(rank, call=rng.randrange(quiet.calls[rank]))
        job = Job(self.world, folder, layout.command(stage), layout.ranks, strike)
        which = rng.choice([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
        if job.struck():
            pids = job.pids()
            self.send(job, which, rng)
            job.go_on(pids)
        if stage is EXPAND:
            code = job.end()  # it catches no signal
        else:
            code = self.stopped_in_time(job)
        if code != 0:
            self.world.goes_on(stage, layout, folder)
        else:
            self.world.ends_like_the_quiet_run(stage, layout, folder)
        return f"{which.name} in the {stage.name} stage: {'stopped and went on' if code else 'ended before'}"

    def wait_for_step(self, job, step):
        path = job.folder / "work/run/metrics.jsonl"

        def there():
            lines = path.read_text().splitlines() if path.exists() else []
            return any(json.loads(line).get("step") == step for line in lines if line.endswith("}"))
        require(job.wait_for(there), f"it ended before step {step}: {job.words}\n{job.log()}")

    def in_evaluation(self, number, rng):
        layout = rng.choice(LAYOUTS)
        self.world.quiet(LONG_EVALUATIONS, layout)
        folder = self.folder(number, LONG_EVALUATIONS, layout)
        settings = GRACE + ["--set", "train.eval_every=2", "--set", "train.eval_tokens=0"]
        job = Job(self.world, folder, TRAIN + BIG_DATA + layout.settings + settings, layout.ranks)
        self.wait_for_step(job, 2)
        time.sleep(rng.uniform(0, 0.3))
        which = rng.choice([signal.SIGUSR1, signal.SIGTERM])
        self.send(job, which, rng)
        code = self.stopped_in_time(job)
        require(code == REQUEUE, f"it did not stop:\n{job.log()}")
        require("validation loss" not in job.log(), f"the evaluation was finished first:\n{job.log()}")
        self.world.goes_on(LONG_EVALUATIONS, layout, folder)
        return f"{which.name} in an evaluation: given up and went on"

    def in_step(self, number, rng):
        layout = rng.choice(LAYOUTS)
        folder = self.folder(number, FIRST, layout)
        job = Job(self.world, folder, TRAIN + BIG_DATA + layout.settings + GRACE + LONG_STEPS, layout.ranks)
        require(job.wait_for(lambda: "tokens a step" in job.log()), f"it ended: {job.log()}")
        time.sleep(rng.uniform(0, 0.3))
        for pid in job.pids().values():
            job.send(pid, signal.SIGTERM)
        code = self.stopped_in_time(job)
        require(code == REQUEUE and "stopped at step 0 of" in job.log(), f"the step was not given up:\n{job.log()}")
        return "SIGTERM in a step longer than the grace: given up"

    def twice(self, number, rng):
        """Rank 1 hangs, so that rank 0 cannot end for the first signal."""
        stage, layout = rng.choice([FIRST, SECOND]), rng.choice([TENSOR, DATA])
        quiet = self.world.quiet(stage, layout)
        folder = self.folder(number, stage, layout)
        job = Job(self.world, folder, layout.command(stage), 2, Strike(1, call=rng.randrange(quiet.calls[1])))
        code = 0
        if job.struck():
            pids = job.pids()
            job.send(pids[0], rng.choice([signal.SIGUSR1, signal.SIGTERM]))
            time.sleep(1.3)  # sooner, and it would be taken for the same one
            job.send(pids[0], signal.SIGTERM)
            time.sleep(1.3)
            job.send(pids[0], signal.SIGTERM)
            code = job.end()
            require(code == LEFT, f"exit code {code}, want {LEFT}:\n{job.log()}")
        else:
            job.ends_with(0)
        if code:
            self.world.goes_on(stage, layout, folder)
        return f"a second signal: {'left at once and went on' if code else 'ended before'}"

    def stopped(self, number, rng):
        """SIGSTOP of one rank at any call."""
        stage, layout = rng.choice([FIRST, SECOND]), rng.choice([TENSOR, DATA])
        quiet = self.world.quiet(stage, layout)
        rank = rng.randrange(2)
        folder = self.folder(number, stage, layout)
        job = Job(self.world, folder, layout.command(stage) + ["--set", "parallel.timeout_s=6"], 2,
                  Strike(rank, call=rng.randrange(quiet.calls[rank])))
        if not job.struck():
            job.ends_with(0)
            return "SIGSTOP: ended before"
        pids = job.pids()
        code = job.end()
        require(code == TIMED_OUT, f"exit code {code}, want {TIMED_OUT}:\n{job.log()}")
        require(re.search(rf"rank {rank} \(.*pid {pids[rank]}\) is missing", job.log()),
                f"rank {rank} is not named:\n{job.log()}")
        self.world.goes_on(stage, layout, folder)
        return "SIGSTOP of a rank: named, ended, went on"
