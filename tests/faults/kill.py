"""SIGKILL of a rank, of all ranks, of mpirun, at any moment of a stage; started again, it must end like a quiet run."""

import signal
import time

from world import EXPAND, FIRST, LAYOUTS, SECOND, Job, Strike


class Kill:
    name, short, long = "kill", 16, 200

    def __init__(self, world):
        self.world = world

    def strike(self, rng, quiet):
        """At a call that changes a file, hence in saves, at ends of steps and around them; else at any time."""
        if rng.random() < 0.25:
            return Strike(seconds=rng.uniform(0, quiet.seconds))
        rank = rng.randrange(len(quiet.calls))
        calls = quiet.calls[rank]
        # Half of them in the beginning of the stage, where growth is carried out.
        return Strike(rank, call=rng.randrange(calls // 3 + 1 if rng.random() < 0.5 else calls))

    def trial(self, number, rng):
        stage, layout = rng.choice([FIRST, FIRST, EXPAND, SECOND, SECOND, SECOND]), rng.choice(LAYOUTS)
        quiet = self.world.quiet(stage, layout)
        folder = self.world.trial_folder(f"kill_{number}", stage, layout)
        for _ in range(rng.choice([1, 1, 2])):
            # On a slow disk training goes on for steps while a save is being written.
            job = Job(self.world, folder, layout.command(stage), layout.ranks, self.strike(rng, quiet),
                      FAULTS_DELAY=rng.choice([0, 0, 5]))
            victim, later = rng.choice(["a rank", "all ranks", "mpirun"]), rng.uniform(0, 0.003)
            if job.struck():
                time.sleep(later)
                self.kill(job, victim, rng)
            if job.end() == 0:
                self.world.ends_like_the_quiet_run(stage, layout, folder)
                return "ended before"
        self.world.goes_on(stage, layout, folder)
        return f"{victim} killed in the {stage.name} stage: went on"

    @staticmethod
    def kill(job, victim, rng):
        ranks = job.pids()
        pids = {"a rank": rng.sample(sorted(ranks.values()), min(1, len(ranks))), "all ranks": ranks.values(),
                "mpirun": [job.process.pid]}
        for pid in pids[victim]:
            job.send(pid, signal.SIGKILL)
        job.go_on(ranks)
