"""Checkpoints are damaged on the disk. What is loaded then is one of them, bit for bit, or nothing, with the reason."""

import json
import os
import queue
import shutil

from world import DATA, FIRST, Failed, Loader, manifest_of, name_of, require


def flip_bits(path, rng, _):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng, _):
    size = path.stat().st_size
    sizes = [0, size - 1, size // 2, rng.randrange(size), size + 1, size + rng.randrange(1, 9000)]
    os.truncate(path, rng.choice(sizes))


def a_range(size, rng):
    """Of bytes, of sectors or of pages."""
    unit = rng.choice([1, 512, 4096])
    first = rng.randrange(size) // unit * unit
    return first, min(size, first + unit * rng.choice([1, 1, 4, 16]))


def zero(path, rng, _):
    data = bytearray(path.read_bytes())
    first, last = a_range(len(data), rng)
    data[first:last] = bytes(last - first)
    path.write_bytes(data)


def mix(path, rng, others):
    """A range of bytes is that of another file, or comes from elsewhere in the file."""
    data = bytearray(path.read_bytes())
    first, last = a_range(len(data), rng)
    source = rng.choice([path, *others]).read_bytes()
    at = rng.choice([first, rng.randrange(len(source))])
    data[first:last] = source[at:at + last - first].ljust(last - first, b"\0")
    path.write_bytes(data)


def rows_moved(path, rng, _):
    """Two pages change places."""
    data = bytearray(path.read_bytes())
    pages = max(1, len(data) // 4096)
    a, b = rng.randrange(pages) * 4096, rng.randrange(pages) * 4096
    data[a:a + 4096], data[b:b + 4096] = data[b:b + 4096], data[a:a + 4096]
    path.write_bytes(data)


def swap(path, rng, others):
    other = rng.choice([o for o in others if o.suffix == path.suffix])
    between = path.with_name("between")
    for a, b in ((path, between), (other, path), (between, other)):
        a.rename(b)


def rename(path, rng, others):
    """To the name of another, which is lost, or to a name that no checkpoint has."""
    same_kind = [o for o in others if o.suffix == path.suffix]
    end = ".manifest" if path.suffix == ".manifest" else ""
    path.rename(rng.choice([*same_kind, path.with_name(name_of(14) + end), path.with_name("best.h5" + end)]))


def lose(path, rng, _):
    path.unlink()


def no_file(path, rng, others):
    """Something else under its name."""
    path.unlink()
    what = rng.randrange(4)
    if what == 0:
        path.mkdir()
    elif what == 1:
        path.symlink_to(rng.choice(others).name)
    elif what == 2:
        path.symlink_to("nowhere")
    else:
        path.write_bytes(rng.randbytes(rng.choice([1, 100, 5000])))


def rewrite(path, rng, _):
    """A manifest that says something else and does not know it."""
    path = path if path.suffix == ".manifest" else manifest_of(path)
    found = json.loads(path.read_text())
    key = rng.choice(sorted(found))
    value = found[key]
    if isinstance(value, int):
        found[key] = rng.choice([0, -1, value + 1, 2**63 - 1, 2**64, 1e300])
    elif isinstance(value, str):
        found[key] = rng.choice(["", value[:-1], value[::-1], "../" + value])
    else:
        found[key] = rng.choice([[], value[:-1], value[::-1], {}, None])
    if rng.random() < 0.2:
        del found[key]
    path.write_text(json.dumps(found, sort_keys=True, separators=(",", ":")))


KINDS_OF_DAMAGE = [flip_bits, flip_bits, cut, zero, mix, rows_moved, swap, rename, lose, no_file, rewrite]


class Damage:
    name, short, long = "damage", 150, 1000

    def __init__(self, world):
        self.world = world
        self.source = world.quiet(FIRST, DATA).folder / "work/run"
        self.steps = sorted(int(p.name[5:13]) for p in self.source.glob("step_*.h5"))
        require(len(self.steps) == 3, f"want three checkpoints, there are {self.steps}")
        self.loaders = queue.SimpleQueue()
        config = world.new_folder("damage") / "tiny.toml"
        for ranks in (0, 0, 2):
            self.loaders.put(Loader(world, config, ranks))
        self.whole = {}
        for step in self.steps:
            folder = self.folder_of(f"whole_{step}", [step])
            loader = self.loaders.get()
            for _ in range(3):  # every loader, the one of two ranks as well
                answer = loader.ask(folder, "auto")
                require(answer[:2] == ["state", str(step)] and answer == self.whole.setdefault(step, answer), answer)
                self.loaders.put(loader)
                loader = self.loaders.get()
            self.loaders.put(loader)
        require(len({answer[2] for answer in self.whole.values()}) == 3, "digests tell nothing apart")

    def folder_of(self, name, steps):
        folder = self.world.folder / name
        folder.mkdir()
        for step in steps:
            path = self.source / name_of(step)
            for each in (path, manifest_of(path)):
                shutil.copyfile(each, folder / each.name)
        return folder

    def intact(self, folder, step):
        """Whether both files are there and have not changed."""
        path = self.source / name_of(step)
        for each in (path, manifest_of(path)):
            here = folder / each.name
            if here.is_symlink() or not here.is_file() or here.read_bytes() != each.read_bytes():
                return False
        return True

    def trial(self, number, rng):
        folder = self.folder_of(f"damage_{number}", self.steps)
        done = []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.is_symlink() and p.stat().st_size > 0]
            # Mostly the newest, which would be taken.
            newest = [p for p in files if p.name.startswith(name_of(self.steps[-1]))]
            path = rng.choice(newest if newest and rng.random() < 0.7 else files)
            how = rng.choice(KINDS_OF_DAMAGE)
            try:
                how(path, rng, [p for p in files if p != path])
            except (ValueError, IndexError, OSError):
                continue  # two kinds of damage that do not go together
            done.append(f"{how.__name__} {path.name}")
        intact = [step for step in self.steps if self.intact(folder, step)]
        salvage = rng.random() < 0.2
        named = rng.random() < 0.2
        asked = name_of(rng.choice(self.steps)) if named else ""
        there = sorted({p.name.removesuffix(".manifest") for p in folder.glob("step_*.h5*") if p.is_file()})

        loader = self.loaders.get()
        try:
            answer = loader.ask(folder, folder / asked if named else "auto", "salvage" if salvage else "")
            ending = self.judge(answer, intact, there, asked, salvage)
            if answer[0] == "state" and not named:
                again = loader.ask(folder, "auto", "salvage" if salvage else "")
                require(again[:5] == answer[:5], f"a second start finds something else: {again}")
        except Failed as failed:
            how = f"asked for {asked or 'the newest'}{', salvage' if salvage else ''}"
            raise Failed(f"after {', '.join(done)} ({how}): {failed}")
        finally:
            self.loaders.put(loader)
        return ending

    def judge(self, answer, intact, there, asked, salvage):
        wanted = [step for step in intact if not asked or name_of(step) == asked]
        if answer[0] == "refused":
            require(answer[1] in ("2", "3", "4"), f"refused as no damage: {answer}")
            require(not wanted, f"refused, though {wanted} are whole: {answer}")
            require((asked or "step_") in answer[2], f"the line names no file: {answer}")
            return "refused, and said which file"
        if answer[0] == "new":
            require(not there, f"a new model beside {there}: {answer}")
            return "no checkpoint left, a new run"
        step = int(answer[1])
        require(step in self.whole, f"WRONG: {answer}")
        right = self.whole[step]
        if salvage and answer[4]:
            require(step not in intact and answer[3] == right[3], f"WRONG parameters salvaged: {answer} {right}")
            return "salvaged, and said what was lost"
        require(answer[2] == right[2], f"WRONG state: {answer} {right}")
        require(not wanted or step >= wanted[-1], f"{wanted} are whole, but taken was {answer}")
        if step not in intact:
            return "no difference"
        for newer in there:
            if not asked and newer > name_of(step):
                require(any(newer in line for line in answer[5:]), f"{newer} was passed over and not named: {answer}")
        return "newest untouched" if step == self.steps[-1] else "named, older one taken"

    def close(self):
        while not self.loaders.empty():
            self.loaders.get().close()
