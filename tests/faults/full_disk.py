"""The disk refuses a save at any of its bytes, for a while. The run says so, trains on, and ends like a quiet run."""

import errno
import os
import re
import subprocess

from world import FIRST, LAYOUTS, SECOND, Job, require

ERRORS = [errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO]
RETRY = ["--set", "run.save_retry_s=0.3"]


class FullDisk:
    name, short, long = "full_disk", 8, 80

    def __init__(self, world):
        self.world = world

    def trial(self, number, rng):
        stage, layout = rng.choice([FIRST, SECOND]), rng.choice(LAYOUTS)
        quiet = self.world.quiet(stage, layout)
        folder = self.world.trial_folder(f"full_disk_{number}", stage, layout)
        if os.geteuid() != 0 or rng.random() < 0.5:
            return "calls refused: " + self.check(self.refuse_calls(folder, stage, layout, quiet, rng), stage, layout)
        try:
            return "a full tmpfs: " + self.check(self.fill_disk(folder, stage, layout, quiet, rng), stage, layout)
        finally:
            subprocess.run(["umount", "-l", folder / "work"], check=True)

    def refuse_calls(self, folder, stage, layout, quiet, rng):
        rank = rng.randrange(layout.ranks)
        refuse = f"{rng.randrange(quiet.calls[rank])} {rng.choice([1, 2, 10, 40])} {rng.choice(ERRORS)}"
        return Job(self.world, folder, layout.command(stage) + RETRY, layout.ranks, FAULTS_REFUSE=refuse,
                   FAULTS_RANK=rank)

    def fill_disk(self, folder, stage, layout, quiet, rng):
        """Up to some bytes; once the run complains there is space again."""
        inputs = {path.name: path.read_bytes() for path in (folder / "work").iterdir()}
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder / "work"], check=True)
        for name, content in inputs.items():
            (folder / "work" / name).write_bytes(content)
        saved = (quiet.folder / "work" / stage.result).stat().st_size
        free = os.statvfs(folder / "work")
        filler = folder / "work/filler"
        filler.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - rng.randrange(4 * saved))))
        job = Job(self.world, folder, layout.command(stage) + RETRY, layout.ranks)
        job.wait_for(lambda: "COULD NOT BE SAVED" in job.log())
        filler.unlink()
        return job

    def check(self, job, stage, layout):
        code, log = job.end(), job.log()
        require(code in (0, 2, 3), f"exit code {code}: {job.words}\n{log}")
        said = "COULD NOT BE SAVED" in log or "cannot be written" in log
        if code != 0:
            # Refused when it opened its files, or for longer than it tries: it says so, and the next start goes on.
            require(re.search("^tf_train: error: ", log, re.M), f"no line of error:\n{log}")
            Job(self.world, job.folder, layout.command(stage), layout.ranks).ends_with(0)
        self.world.ends_like_the_quiet_run(stage, layout, job.folder)
        Job(self.world, job.folder, ["tf_inspect", "--verify", "work/run"], 0).ends_with(0)
        return "ended, said so and went on" if code else "said so and trained on" if said else "no save was hit"
