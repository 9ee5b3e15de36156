"""tf_prepare killed at any moment leaves the old dataset, the new one, or none where there was none."""

import shutil
import signal

from world import Job, Strike, read_log, require


class Outputs:
    name, short, long = "outputs", 6, 60

    def __init__(self, world):
        self.world = world
        self.command = world.prepare_command + ["--vocab", "420", "--force", "--output", "work/data.h5"]
        folder = world.new_folder("prepare_quiet")
        Job(world, folder, self.command, 0, FAULTS_LOG=folder / "events").ends_with(0)
        self.calls = sum(event.when != "END" for event in read_log(folder / "events"))
        self.new = self.fingerprint(folder)

    def fingerprint(self, folder):
        """Of the whole dataset, every byte of it compared."""
        job = Job(self.world, folder, ["tf_inspect", "--dataset", "work/data.h5"], 0).ends_with(0)
        line = [line for line in job.log().splitlines() if line.startswith("whole")][-1]
        return line.rpartition(" ")[2]

    def trial(self, number, rng):
        folder = self.world.new_folder(f"outputs_{number}")
        output = folder / "work/data.h5"
        old = rng.random() < 0.5
        if old:
            shutil.copyfile(self.world.data, output)
        before = self.fingerprint(folder) if old else None
        require(before != self.new, "old and new dataset are the same")
        # Half of them at the end, where one file takes the place of another.
        first = rng.choice([0, max(0, self.calls - 8)])
        job = Job(self.world, folder, self.command, 0, Strike(call=rng.randrange(first, self.calls)))
        if job.struck():
            job.send(job.process.pid, signal.SIGKILL)
        job.ends_with(-signal.SIGKILL, 0)
        if not output.exists():
            require(not old, "the old dataset is gone")
            ending = "none yet"
        else:
            found = self.fingerprint(folder)
            require(found in (before, self.new), f"fingerprint {found}, want {before} or {self.new}")
            ending = "the new one" if found == self.new else "the old one"
        Job(self.world, folder, self.command, 0).ends_with(0)
        require(self.fingerprint(folder) == self.new, "prepared again, it is another dataset")
        return f"tf_prepare killed: {ending}"
