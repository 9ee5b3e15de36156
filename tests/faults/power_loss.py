"""Power is lost: each state is rebuilt that the disk may be in, given what a run had written and synced until then.

The calls of whole runs are recorded (record_io.c). After each of them the power may go. What was synced is on the disk;
of the rest anything may be: bytes of a file not at all, as zeros or in part, a length without its bytes, names in a
folder before the bytes they lead to, or later ones without earlier ones. In each state the run must go on from the last
checkpoint whose save had returned, or from a whole newer one.
"""

import collections
import hashlib
import queue
import threading

from world import DATA, FIRST, ONE, TENSOR, Failed, Job, Loader, manifest_of, name_of, read_log, require

# Which of the changes that were not synced have reached the disk, of names and of bytes.
REACHED = ["none", "all", "some"]


class File:
    """A file as bytes that are safe and changes that are not."""

    def __init__(self):
        self.changes = []  # (index of the event, offset, bytes) or (index, length, None)
        self.synced = 0    # changes with a smaller index are safe

    def content(self, until, which, rng):
        data = bytearray()
        for index, at, new in self.changes:
            if index >= until:
                break
            new_part = new
            if index >= self.synced:
                if which == "none":
                    continue
                if which == "some":
                    if rng.random() < 0.4:
                        continue
                    if new is not None and rng.random() < 0.3:
                        # The length has grown, but of the bytes only the first or none are there.
                        keep = rng.choice([0, rng.randrange(len(new) + 1), len(new) // 512 * 512])
                        new_part = new[:keep].ljust(len(new), b"\0")
            if new is None:
                if at < len(data):
                    del data[at:]
                else:
                    data.extend(bytes(at - len(data)))
            else:
                if at > len(data):
                    data.extend(bytes(at - len(data)))
                data[at:at + len(new_part)] = new_part
        return bytes(data)


class Disk:
    """What has been done until an event, and in which states the disk may be."""

    def __init__(self, events, until):
        self.until = until
        by_inode, here = {}, {}
        self.names = []         # (index, {name: file or None})
        self.names_synced = 0
        begun = {}
        renamed, self.committed = {}, None
        for index, event in enumerate(events[:until]):
            path = event.paths[0]
            if event.name == "create":
                # A number that is free again may be that of a new file.
                by_inode[event.inode] = here[path] = File()
                self.names.append((index, {path: here[path]}))
            elif event.name in ("write", "truncate", "allocate"):
                file = by_inode[event.inode]
                if event.name == "write":
                    file.changes.append((index, event.offset, event.data))
                elif event.name == "truncate" or event.offset > len(file.content(index, "all", None)):
                    file.changes.append((index, event.offset, None))
            elif event.name == "rename":
                target = event.paths[1]
                here[target] = here.pop(path)
                self.names.append((index, {path: None, target: here[target]}))
                if target.endswith(".h5.manifest"):
                    renamed[int(target[5:13])] = index
            elif event.name == "remove":
                here.pop(path, None)
                self.names.append((index, {path: None}))
            elif event.when == "BEGIN":
                begun[event.rank, event.inode] = index
            elif event.when == "END":
                since = begun[event.rank, event.inode]
                if event.inode in by_inode:
                    by_inode[event.inode].synced = max(by_inode[event.inode].synced, since)
                else:
                    self.names_synced = max(self.names_synced, since)
                    self.committed = max([s for s, i in renamed.items() if i < self.names_synced], default=None)

    def state(self, names, content, rng):
        """{name: bytes} of the folder after the loss."""
        there = {}
        for index, change in self.names:
            if index >= self.names_synced and (names == "none" or (names == "some" and rng.random() < 0.4)):
                continue
            there.update(change)
        return {name: file.content(self.until, content, rng) for name, file in there.items() if file is not None}


class PowerLoss:
    """A trial is a moment; it has several states."""

    name, short = "power_loss", 120

    def __init__(self, world):
        self.world = world
        self.config = world.new_folder("power_loss") / "tiny.toml"
        self.recordings = []
        self.moments = []
        self.seen, self.lock = set(), threading.Lock()
        for layout, save in [(ONE, "async"), (TENSOR, "async"), (DATA, "blocking")]:
            # A run for the answers, which keeps everything, and one for the calls.
            settings = ["--set", "train.steps=6", "--set", f"run.save={save}"]
            kept = world.new_folder(f"power_kept_{layout.name}")
            command = layout.command(FIRST) + settings
            Job(world, kept, command + ["--set", "run.keep_last=9"], layout.ranks).ends_with(0)
            folder = world.new_folder(f"power_recorded_{layout.name}")
            command += ["--set", "run.keep_last=1"]
            Job(world, folder, command, layout.ranks, FAULTS_LOG=folder / "events").ends_with(0)
            events = read_log(folder / "events")
            number = len(self.recordings)
            self.recordings.append((events, self.answers(kept)))
            self.moments += [(number, until) for until in range(len(events) + 1)]
            require(Disk(events, len(events)).committed == 6, f"the recorded run has not saved its end: {folder}")
        self.long = len(self.moments)
        self.loaders = queue.SimpleQueue()
        for _ in range(2):
            self.loaders.put(Loader(world, self.config))

    def answers(self, kept):
        """What the loader says of each checkpoint alone."""
        loader = Loader(self.world, self.config)
        answers = {}
        for path in sorted((kept / "work/run").glob("step_*.h5")):
            alone = kept / path.stem
            alone.mkdir()
            for each in (path, manifest_of(path)):
                each.rename(alone / each.name)
            answer = loader.ask(alone)
            require(answer[0] == "state", answer)
            answers[int(answer[1])] = answer
        loader.close()
        require(sorted(answers) == [2, 4, 6], answers)
        return answers

    def trial(self, number, rng):
        # Spread over the whole recordings, also when only some are tried.
        recording, until = self.moments[number * 7919 % len(self.moments)]
        events, answers = self.recordings[recording]
        disk = Disk(events, until)
        endings = collections.Counter()
        for names in REACHED:
            for content in REACHED:
                for _ in range(3 if "some" in (names, content) else 1):
                    state = disk.state(names, content, rng)
                    digest = hashlib.sha256(repr((recording, disk.committed, sorted(state.items()))).encode()).digest()
                    with self.lock:
                        if digest in self.seen:
                            continue
                        self.seen.add(digest)
                    try:
                        endings[self.judge(state, disk.committed, answers, number)] += 1
                    except Failed as failed:
                        before = events[until - 1] if until else None
                        after = f"{before.name} {before.when} {before.paths}" if before else "nothing"
                        there = sorted((name, len(data)) for name, data in state.items())
                        raise Failed(f"power lost after {after} (event {until} of recording {recording}); names: "
                                     f"{names}, bytes: {content}; {disk.committed} was saved; on the disk: {there}: "
                                     f"{failed}")
        return endings

    def judge(self, state, committed, answers, number):
        folder = self.world.folder / f"power_loss_{number}"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, content in state.items():
            (folder / name).write_bytes(content)
        loader = self.loaders.get()
        try:
            answer = loader.ask(folder)
            again = loader.ask(folder)
        finally:
            self.loaders.put(loader)
        require(again[:4] == answer[:4], f"first {answer}, then {again}")
        if answer[0] == "new":
            require(committed is None, f"{name_of(committed or 0)} is lost")
            return "nothing saved yet, a new run"
        require(answer[0] == "state", answer)
        step = int(answer[1])
        require(answer[:4] == answers[step][:4], f"WRONG: {answer} {answers[step]}")
        require(step >= (committed or 0), f"{name_of(committed or 0)} is lost: {answer}")
        require(not answer[5:], f"what a lost save left is taken for damage: {answer}")
        return "the newest that was saved" if step == committed else "a newer one, whole"

    def close(self):
        while not self.loaders.empty():
            self.loaders.get().close()
