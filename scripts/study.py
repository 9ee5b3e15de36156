#!/usr/bin/env python3
"""What growing saves: runs a plan of trainings and says what they show.

  study.py run PLAN       does every piece that is missing, then writes the report
  study.py status PLAN    says what is done; --measure also how long the rest takes, from a few updates of each model
  study.py report PLAN    writes the report of what is done so far

The plan is one TOML file, configs/study_smoke.toml for example; `--set budget.tokens_per_parameter=5` overrides a key.
A study is made of pieces: prepare a corpus, train from one update to another, grow, evaluate, time a step. Each has a
folder whose name follows from all that its result depends on, and is done when the folder has a result.json. So any
stop is survived by the same command, runs that begin alike share their beginning, and a changed plan does again only
what it changes. A plan that cannot work ends with one line and exit code 2 before anything is trained.
"""
import sys

if sys.version_info < (3, 11):
    print("study: error: Python 3.11 or newer is needed, for TOML", file=sys.stderr)
    sys.exit(2)

import argparse
import ctypes
import dataclasses
import fcntl
import functools
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import tomllib

from study_plan import BAD_INPUT, INTERNAL, NO_RESOURCES, STOPPED, GROWTH_KEYS, Plan, Row, StudyError, flat, step_bench_words

MOST_POINTS = 20  # of the loss of a piece, each a mean over neighbouring updates


def say(text):
    print(f"study: {text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces.


@dataclasses.dataclass(frozen=True)
class Shape:
    """What tf_train says that a configuration is."""
    config: dict  # resolved, by section
    parameters: int
    inner: int  # without embedding and head
    update_tokens: int
    train_flops: int  # of a token

    @property
    def update_flops(self):
        return self.train_flops * self.update_tokens


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Piece:
    """One process and its result. `definition` is all that the result depends on beside the pieces it builds on."""

    def __init__(self, study, kind, label, definition, parents):
        self.study, self.kind, self.label, self.definition, self.parents = study, kind, label, definition, parents
        name = re.sub(r"[^A-Za-z0-9_.]+", "_", label)
        self.id = f"{kind}-{name}-{digest([kind, definition, [p.id for p in parents]])}"
        self.folder = f"{study.plan.dir}/pieces/{self.id}"
        self.children = []
        self.step = self.tokens = self.flops = 0  # of the checkpoint that it leaves, counted from birth
        self.shape = None

    def path(self, name):
        return f"{self.folder}/{name}"

    @functools.cached_property
    def result(self):
        """None until it is done."""
        try:
            with open(self.path("result.json"), encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StudyError(f"{self.path('result.json')}: {error}; remove the folder to do the piece again", NO_RESOURCES) from None

    def set_result(self, result):
        temporary = self.path("result.json.new")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(result, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path("result.json"))
        self.result = result

    @property
    def checkpoint(self):
        """What it leaves for the pieces that build on it; none for a piece that leaves a result alone."""
        return {"train": self.path(f"run/step_{self.step:08d}.h5"), "grow": self.path("grown.h5")}.get(self.kind)

    def has_checkpoint(self):
        return self.checkpoint is None or (os.path.exists(self.checkpoint) and os.path.exists(self.checkpoint + ".manifest"))

    def remove_checkpoints(self):
        for pattern in ("run/*.h5", "run/*.manifest", "grown.h5*"):
            for path in glob.glob(glob.escape(self.folder) + "/" + pattern):
                os.unlink(path)

    # Of each kind: the command, after what it reads is written; and the result when it has ended well.
    def command(self):
        plan, define = self.study.plan, self.definition
        threads = ["--threads", str(plan.threads)]
        if self.kind == "train":
            machine = {"data.path": self.study.data(define["corpus"]), "run.dir": "run", "run.threads": plan.threads,
                       "run.keep_last": 1}
            machine.update({k: v for k, v in flat(plan.config).items() if k.startswith(("run.", "parallel."))})
            with open(self.path("config.toml"), "w", encoding="utf-8") as file:
                for key, value in {**define["config"], **machine}.items():
                    file.write(f"{key} = {json.dumps(value)}\n")
            words = ["--config", "config.toml"]
            for parent in self.parents[:1]:
                words += ["--init", parent.checkpoint]
            return [*self.launcher(), self.study.program("tf_train"), *words,
                    *(["--new-dataset"] if define["new_dataset"] else [])]
        if self.kind == "grow":
            counts = ",".join(f"{name}={count}" for name, count in define["counts"].items())
            # What a killed attempt left is no checkpoint, and tf_expand replaces nothing.
            self.remove_checkpoints()
            words = ["--checkpoint", self.parents[0].checkpoint, "--output", self.checkpoint, "--grow", counts,
                     "--seed", str(define["seed"]), *threads]
            for key, value in define["growth"].items():
                words += [f"--{key}", str(value)]
            return [*self.launcher(), self.study.program("tf_expand"), *words]
        if self.kind == "eval":
            words = ["--checkpoint", self.parents[0].checkpoint, "--data", self.study.data(define["corpus"]),
                     "--split", "validation", "--json", "eval.json", *threads]
            for key, value in define["eval"].items():
                words += [f"--{key.replace('_', '-')}", str(value)]
            return [*self.launcher(), self.study.program("tf_eval"), *words]
        return [self.study.program("step_bench"), *define["words"], *threads]

    def launcher(self):
        plan = self.study.plan
        return [*plan.launcher, str(plan.ranks)] if plan.ranks > 1 else []

    def finish(self):
        result = {"definition": self.definition, "label": self.label, "finished": time.strftime("%Y-%m-%d", time.gmtime())}
        if self.kind == "train":
            updates, seconds = [], 0.0
            with open(self.path("run/metrics.jsonl"), encoding="utf-8") as file:
                for line in map(json.loads, file):
                    if line.get("loss") is not None:
                        updates.append((line["tokens"], line["loss"]))
                        seconds += line["step_seconds"]
            width = -(-len(updates) // MOST_POINTS)
            groups = [updates[i:i + width] for i in range(0, len(updates), width)]
            result["curve"] = [[g[-1][0], round(statistics.fmean(loss for _, loss in g), 5)] for g in groups]
            result["seconds"] = round(seconds, 3)
        elif self.kind == "eval":
            with open(self.path("eval.json"), encoding="utf-8") as file:
                found = json.load(file)
            result.update({key: found[key] for key in ("nll", "token_perplexity", "bits_per_byte", "scored_tokens", "bytes")})
        else:
            with open(self.path("log.txt"), encoding="utf-8", errors="replace") as file:
                text = file.read()
            if self.kind == "grow":
                change = re.search(r"max\|logits\| = (\S+)", text)
                result["probe_change"] = float(change[1])
            else:
                result.update(json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{"))))
        self.set_result(result)

    def about(self):
        """A few words on the result."""
        result = self.result
        if self.kind == "train":
            last = f"loss {result['curve'][-1][1]:.3f}, " if result["curve"] else ""
            return f"{last}{result['seconds']:.1f} s"
        if self.kind == "eval":
            return f"loss {result['nll']:.4f}"
        return f"probe change {result['probe_change']:.2g}" if self.kind == "grow" else f"{result['ms_min']:.0f} ms"


@dataclasses.dataclass
class Point:
    """The end of a decay branch: a point of a row's curve."""
    row: Row
    seed: int
    share: float
    stage: int
    branch: Piece
    evaluation: Piece


@dataclasses.dataclass
class Life:
    """A row with one seed: its trunk and what hangs on it."""
    row: Row
    seed: int
    trunk: list  # of pieces, in order
    growths: list  # (grow piece, evaluation before, evaluation after)
    points: list


@dataclasses.dataclass
class Forgotten:
    """A row of the forgetting experiment with one seed. Evaluations are pairs: first corpus, second."""
    name: str
    origin: str  # the row that it goes on from
    seed: int
    source: Piece
    end: Piece
    before: tuple
    grown: tuple | None
    after: tuple


class Study:
    """The plan, what tf_train says about its models, and the pieces that follow from both."""

    def __init__(self, plan, build):
        self.plan, self.build = plan, os.path.abspath(build)
        self.pieces = {}  # by id, parents before children
        self.shapes = {}

    def program(self, name):
        folder = "bench" if name.endswith("_bench") else "jobs"
        path = f"{self.build}/{folder}/{name}"
        if not os.access(path, os.X_OK):
            raise StudyError(f"{path} is missing; run scripts/build.sh, or name another build folder with --build", NO_RESOURCES)
        return path

    def captured(self, where, command):
        """What a program of TokenForge prints. Throws with its own line, without the place in a file that we wrote."""
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace",
                              stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
        if done.returncode != 0:
            code = done.returncode if done.returncode in (BAD_INPUT, NO_RESOURCES) else INTERNAL
            raise StudyError(f"{where}: {re.sub(r'[^ ]*config.toml(:[0-9]+)*: ', '', own_error(done.stderr))}", code)
        return done.stdout

    # Corpora. They are needed before anything can be said about models, whose vocabulary they decide.
    def data(self, corpus):
        return f"{self.plan.dir}/corpora/{corpus}-{self.corpus_digest(corpus)}.h5"

    @functools.cache
    def corpus_digest(self, name):
        plan = self.plan
        corpus = plan.corpora[name]
        text = corpus.get("command") or [file_digest(path) for path in self.corpus_files(name)]
        own = [text, corpus.get("document_start"), plan.prepare]
        return digest(own if name == plan.corpus else [own, self.corpus_digest(plan.corpus)])

    def corpus_files(self, name):
        paths = []
        for text in self.plan.corpora[name]["files"]:
            where = f"{self.plan.path}: [corpus.{name}]: files: {text}"
            path = os.path.expandvars(text)
            if "$" in path:
                raise StudyError(f"{where}: that variable is not set")
            path = os.path.normpath(pathlib.Path(self.plan.path).absolute().parent / path)
            if not os.path.isfile(path):
                raise StudyError(f"{where}: there is no such file")
            paths.append(path)
        return paths

    def prepare_corpora(self):
        plan = self.plan
        os.makedirs(f"{plan.dir}/corpora", exist_ok=True)
        second = [plan.forgetting["corpus"]] if plan.forgetting else []
        for name in dict.fromkeys([plan.corpus, *second]):
            corpus, output = plan.corpora[name], self.data(name)
            if os.path.exists(output + ".txt"):
                continue
            where = f"{plan.path}: [corpus.{name}]"
            with tempfile.TemporaryDirectory(dir=f"{plan.dir}/corpora") as folder:
                if "command" in corpus:
                    files = [f"{folder}/{name}.txt"]
                    with open(files[0], "wb") as file:
                        done = subprocess.run(["bash", "-c", f"set -o pipefail\n{corpus['command']}"], stdout=file, text=True,
                                              stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
                    if done.returncode != 0:
                        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                        raise StudyError(f"{where}: command ended with exit code {done.returncode}: {last}")
                else:
                    files = self.corpus_files(name)
                words = ["--output", output, "--force"]  # what a killed attempt left
                if "document_start" in corpus:
                    words += ["--document-start", corpus["document_start"]]
                options = dict(plan.prepare)
                if name != plan.corpus:  # one vocabulary for both
                    options.pop("vocab", None)
                    options["tokenizer"] = self.data(plan.corpus)
                for key, value in options.items():
                    words += [f"--{key.replace('_', '-')}", value]
                say(f"{name}: prepares {output}")
                text = self.captured(where, [self.program("tf_prepare"), *words, *files])
                pathlib.Path(output + ".new").write_text(text, encoding="utf-8")
                os.replace(output + ".new", output + ".txt")

    def prepared_text(self, corpus):
        """What tf_prepare said about a corpus."""
        return pathlib.Path(self.data(corpus) + ".txt").read_text(encoding="utf-8")

    def shape(self, where, keys):
        """What tf_train makes of a configuration, as if nothing had been trained yet."""
        ask = {**keys, "data.path": self.data(self.plan.corpus), "run.dir": "none", "parallel.dp": 1, "parallel.tp": 1,
               "train.seed": 1, "train.steps": 1_000_000_000}
        known = digest(ask)
        if known not in self.shapes:
            with tempfile.TemporaryDirectory() as folder:
                config = f"{folder}/config.toml"
                with open(config, "w", encoding="utf-8") as file:
                    for key, value in ask.items():
                        file.write(f"{key} = {json.dumps(value)}\n")
                text = self.captured(where, [self.program("tf_train"), "--config", config, "--dry-run"])

            def found(pattern):
                return int(re.search(pattern, text, re.M)[1])
            self.shapes[known] = Shape(tomllib.loads(text.partition("\nparameters ")[0]), found(r"^parameters +(\d+)$"),
                                       found(r"^without the ends +(\d+)"), found(r"^tokens per step +(\d+)$"),
                                       found(r", (\d+) training$"))
        return self.shapes[known]

    # The pieces of the plan.
    def piece(self, kind, label, definition, *parents):
        """The one piece of this definition, however often it is asked for."""
        piece = Piece(self, kind, label, definition, list(parents))
        if piece.id not in self.pieces:
            self.pieces[piece.id] = piece
            for parent in parents:
                parent.children.append(piece)
        return self.pieces[piece.id]

    def training(self, label, keys, to, schedule, parent, shape, corpus=None, new_dataset=False):
        """From the parent's checkpoint (none: from birth) to update `to`."""
        keys = {k: v for k, v in keys.items() if not k.startswith(("run.", "parallel."))}
        definition = {"config": {**keys, **schedule, "train.steps": to}, "corpus": corpus or self.plan.corpus,
                      "data": self.corpus_digest(corpus or self.plan.corpus), "new_dataset": new_dataset}
        piece = self.piece("train", f"{label}_{to}", definition, *([parent] if parent else []))
        updates = to - (parent.step if parent else 0)
        piece.step, piece.shape = to, shape
        piece.tokens = (parent.tokens if parent else 0) + updates * shape.update_tokens
        piece.flops = (parent.flops if parent else 0) + updates * shape.update_flops
        return piece

    def growth(self, where, label, before, after, growth, seed, parent, shape):
        counts = self.plan.growth_counts(where, before, after)
        piece = self.piece("grow", label, {"counts": counts, "growth": growth, "seed": seed}, parent)
        piece.step, piece.tokens, piece.flops, piece.shape = parent.step, parent.tokens, parent.flops, shape
        return piece

    def evaluation(self, source, corpus=None):
        corpus = corpus or self.plan.corpus
        return self.piece("eval", f"{source.kind}_{source.label}_on_{corpus}",
                          {"corpus": corpus, "data": self.corpus_digest(corpus), "eval": self.plan.eval}, source)

    def make(self):
        """All pieces. First it is found where each trunk has to be cut, so that rows which begin alike share pieces."""
        plan = self.plan
        self.prepare_corpora()
        reference = self.shape(plan.reference.where, plan.settings(plan.reference, 0, 1))
        self.budget = plan.tokens_per_parameter * reference.inner * reference.train_flops
        self.trunk_schedule = {"train.schedule": "constant"}
        cuts = {}
        # The first seed of all rows comes first.
        seeds = range(1, max(row.seeds for row in plan.rows.values()) + 1)
        lives = [(row, seed, self.survey(row, seed)) for seed in seeds for row in plan.rows.values() if seed <= row.seeds]
        for _, _, stages in lives:
            for stage in stages:
                cuts.setdefault(stage["key"], set()).update(stage["cuts"])
        self.lives, self.forgetting, self.lengths = [], [], []
        for number_ in seeds:
            self.lives += [self.live(row, seed, stages, cuts) for row, seed, stages in lives if seed == number_]
            if plan.forgetting and number_ <= plan.forgetting.get("seeds", 1):
                self.forgetting += [self.forget(i, number_) for i in range(len(plan.forgetting["row"]))]
            if plan.length and number_ == 1:
                self.lengths = self.measure_lengths()

    def survey(self, row, seed):
        """For each stage its shape, its first and last update, and the updates at which something hangs on the trunk."""
        plan, stages, key = self.plan, [], []
        step = flops = 0
        for i, stage in enumerate(row.stages):
            settings = plan.settings(row, i, seed)
            shape = self.shape(f"{row.where}: stage {i + 1}", settings)
            key = [*key, {k: v for k, v in settings.items() if not k.startswith(("run.", "parallel."))}, stage.growth, step]

            def at(share, first=step, spent=flops, shape=shape):
                return first + round((share * self.budget - spent) / shape.update_flops)
            end = at(stage.until) if stage.until else None
            branches = {}
            for point in plan.points:
                start = point * (1 - plan.decay)
                if (i == 0 or start > row.stages[i - 1].until) and (not stage.until or start <= stage.until):
                    branches[point] = (at(start), at(point))
            steps = sorted({first for first, _ in branches.values()} | ({end} if end else set()))
            for first, last in [*((step, first) for first in steps), *branches.values()]:
                if last <= first:
                    raise StudyError(f"{row.where}: the budget of {self.budget:.3g} FLOPs is too small: {stage.model} would train "
                                     f"from update {first} to {last}; raise budget.tokens_per_parameter or lower train.batch")
            growth = shape.config["train"]["growth"]["schedule"]
            begun, warm = step if growth == "restart" else 0, shape.config["train"]["warmup_steps"]
            if steps and steps[0] - begun < warm:
                raise StudyError(f"{row.where}: {stage.model} is needed at update {steps[0]}, within the {warm} of "
                                 f"train.warmup_steps that began at {begun}; lower them or raise budget.tokens_per_parameter")
            stages.append({"shape": shape, "settings": settings, "key": json.dumps(key, sort_keys=True), "cuts": steps,
                           "branches": branches, "first": step, "last": end})
            if end:
                step, flops = end, flops + (end - step) * shape.update_flops
        return stages

    def live(self, row, seed, stages, cuts):
        plan, parent = self.plan, None
        life = Life(row, seed, [], [], [])
        for i, (stage, found) in enumerate(zip(row.stages, stages)):
            label, shape, keys = f"{stage.model}_seed{seed}", found["shape"], found["settings"]
            if i > 0:
                before = row.stages[i - 1].model
                grown = self.growth(row.where, f"{before}_to_{label}", before, stage.model, stage.growth, seed, parent, shape)
                life.growths.append((grown, self.evaluation(parent), self.evaluation(grown)))
                parent = grown
            for cut in sorted(cut for cut in cuts[found["key"]] if cut <= max(found["cuts"])):
                if cut > parent.step if parent else cut > 0:
                    parent = self.training(label, keys, cut, self.trunk_schedule, parent, shape)
                    life.trunk.append(parent)
                for point, (first, last) in found["branches"].items():
                    if first != cut:
                        continue
                    schedule = {"train.schedule": "wsd", "train.decay_steps": last - first}
                    branch = self.training(f"{label}_decay", keys, last, schedule, parent, shape)
                    life.points.append(Point(row, seed, point, i, branch, self.evaluation(branch)))
        return life

    def forget(self, index, seed):
        plan, table = self.plan, self.plan.forgetting
        entry = table["row"][index]
        row, where = plan.rows[entry["from"]], f"{plan.path}: [forgetting]: row {index + 1} ({entry['name']})"
        life = next(life for life in self.lives if (life.row.name, life.seed) == (row.name, seed))
        point = next(point for point in life.points if point.share == table["point"])
        source = parent = point.branch
        model = row.stages[point.stage].model
        keys, grown = plan.settings(row, point.stage, seed), None
        if "model" in entry:
            keys = {k: v for k, v in keys.items() if not k.startswith("model.")}
            keys.update(flat({"model": plan.models[entry["model"]]}))
        keys.update(flat(entry.get("config", {})))
        shape = self.shape(where, keys)
        if "model" in entry:
            growth = {key: entry[key] for key in GROWTH_KEYS if key in entry}
            parent = self.growth(where, f"{model}_to_{entry['model']}_seed{seed}", model, entry["model"], growth, seed, source, shape)
            grown = self.both(parent)
        # One schedule for all, grown or not: down from a fraction of the rate.
        updates = max(1, round(table["tokens"] / shape.update_tokens))
        keys |= {"train.lr": shape.config["train"]["lr"] * table.get("lr_fraction", 1.0), "train.growth.schedule": "continue"}
        end = self.training(f"{entry.get('model', model)}_seed{seed}_{table['corpus']}", keys, source.step + updates,
                            {"train.schedule": "wsd", "train.decay_steps": updates}, parent, shape, table["corpus"], True)
        return Forgotten(entry["name"], row.name, seed, source, end, self.both(source), grown, self.both(end))

    def both(self, source):
        return self.evaluation(source), self.evaluation(source, self.plan.forgetting["corpus"])

    def measure_lengths(self):
        """(model, sequence length, shape, piece)"""
        plan, table, found = self.plan, self.plan.length, []
        where = f"{plan.path}: [length]"
        for name in table["models"]:
            for length in table["sequences"]:
                model = {**plan.models[name], "max_seq": length}
                batch = table["tokens"] // length
                shape = self.shape(where, {**flat({"model": model}), "train.batch": batch})
                words = [*step_bench_words(where, model), "--vocab", str(shape.config["model"]["vocab"]), "--seq", str(length),
                         "--batch", str(batch), "--steps", str(table["steps"]), "--warmup", "1"]
                found.append((name, length, shape, self.piece("length", f"{name}_{length}", {"words": words})))
        return found

    # What is left to do.
    def settle(self):
        """Forgets results whose checkpoint is gone and needed again, because the plan was extended."""
        for piece in reversed(self.pieces.values()):
            wanted = any(child.result is None for child in piece.children)
            if piece.result is not None and wanted and not piece.has_checkpoint():
                say(f"{piece.id}: its checkpoint is gone and needed again")
                os.unlink(piece.path("result.json"))
                piece.result = None

    def undone(self):
        return [piece for piece in self.pieces.values() if piece.result is None]


LIBC = ctypes.CDLL(None)


def end_with_parent():
    """In a child: when the study is killed, tf_train saves and stops, and the others end."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def own_error(text):
    """The one line that a program of TokenForge ends with, without its name."""
    lines = re.findall(r"^\w+: error: (.*)$", text, re.M)
    return lines[-1] if lines else " ".join(text.split())[-300:] or "no message"


# ---------------------------------------------------------------------------------------------------------------------
# Running them.


class Runner:
    def __init__(self, study):
        self.study = study
        self.running = {}  # piece -> process
        self.asked = 0  # signals so far
        self.failed = None

    def on_signal(self, _number, _frame):
        self.asked += 1
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)  # the first makes tf_train save and stop, the second leave at once

    def start(self, piece):
        os.makedirs(piece.folder, exist_ok=True)
        command = piece.command()
        with open(piece.path("log.txt"), "wb") as log:
            # A group of their own: Ctrl-C is for this process, which passes it on once. The lock is theirs until they end.
            self.running[piece] = subprocess.Popen(command, cwd=piece.folder, stdin=subprocess.DEVNULL, stdout=log,
                                                   stderr=subprocess.STDOUT, process_group=0, preexec_fn=end_with_parent,
                                                   pass_fds=[self.lock.fileno()])

    def ended(self, piece, code):
        if self.asked:
            return
        if code == STOPPED or code < 0:
            self.failed = self.failed or StudyError(f"{piece.id} was stopped from outside (exit code {code}); the same command "
                                                    "goes on", STOPPED)
            return
        if code != 0:
            with open(piece.path("log.txt"), encoding="utf-8", errors="replace") as file:
                line = own_error(file.read())
            self.failed = self.failed or StudyError(f"{piece.id} ended with exit code {code}: {line}; all of it is in "
                                                    f"{piece.path('log.txt')}", code)
            return
        piece.finish()
        total = len(self.study.pieces)
        say(f"{total - len(self.study.undone())} of {total}: {piece.kind} {piece.label}: {piece.about()}")
        for parent in [piece, *piece.parents]:
            if all(child.result is not None for child in parent.children):
                parent.remove_checkpoints()

    def run(self):
        plan = self.study.plan
        self.lock = open(f"{plan.dir}/.lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"{plan.dir} is being worked on by another study, or by programs that it left and that are about to "
                             "stop; wait for them", NO_RESOURCES) from None
        for number_ in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number_, self.on_signal)
        self.study.settle()
        waiting = self.study.undone()
        say(f"{len(self.study.pieces)} pieces, {len(waiting)} of them to do, budget {self.study.budget:.3g} FLOPs a run")
        while True:
            for piece, process in list(self.running.items()):
                code = process.poll()
                if code is not None:
                    del self.running[piece]
                    self.ended(piece, code)
            if self.asked or self.failed:
                waiting = []
            # A step is timed alone.
            for piece in list(waiting):
                alone = any(p.kind == "length" for p in [piece, *self.running])
                if len(self.running) >= plan.workers or (alone and self.running):
                    break
                if all(parent.result is not None for parent in piece.parents):
                    waiting.remove(piece)
                    self.start(piece)
            if not self.running:
                break
            time.sleep(0.02)
        if self.failed:
            raise self.failed
        if self.asked:
            raise StudyError("stopped by a signal; the same command goes on", STOPPED)


def measure(study):
    """Seconds that all pieces which are not done will take, on one worker, by {label of a training: tokens/s}."""
    rates, seconds = {}, 0.0
    for piece in study.undone():
        if piece.kind != "train":
            continue
        schedule = ("train.steps", "train.schedule", "train.decay_steps", "train.warmup_steps", "train.seed")
        model = {k: v for k, v in piece.definition["config"].items() if k not in schedule}
        known = digest(model)
        if known not in rates:
            with tempfile.TemporaryDirectory() as folder:
                sets = {**model, "data.path": study.data(study.plan.corpus), "run.dir": f"{folder}/run", "train.steps": 12,
                        "run.threads": study.plan.threads, "train.warmup_steps": 0}
                with open(f"{folder}/config.toml", "w", encoding="utf-8") as file:
                    for key, value in sets.items():
                        file.write(f"{key} = {json.dumps(value)}\n")
                study.captured(piece.id, [*piece.launcher(), study.program("tf_train"), "--config", f"{folder}/config.toml"])
                with open(f"{folder}/run/metrics.jsonl", encoding="utf-8") as file:
                    lines = [json.loads(line) for line in file]
            rates[known] = statistics.median(line["tokens_per_second"] for line in lines[3:] if "loss" in line)
            say(f"{piece.label.rpartition('_')[0]}: {rates[known]:.0f} tokens/s with {study.plan.threads} threads, "
                f"{rates[known] * piece.shape.train_flops / 1e9:.1f} GFLOP/s")
        parent = piece.parents[0].tokens if piece.parents else 0
        seconds += (piece.tokens - parent) / rates[known]
    return seconds


def status(study, with_measure):
    undone = study.undone()
    say(f"{study.plan.name} in {study.plan.dir}: {len(study.pieces) - len(undone)} of {len(study.pieces)} pieces done, "
        f"budget {study.budget:.4g} FLOPs a run")
    for name, row in study.plan.rows.items():
        of_row = [point for life in study.lives if life.row is row for point in life.points]
        done = sum(point.evaluation.result is not None for point in of_row)
        largest = max(of_row, key=lambda point: point.share).branch
        per_parameter = largest.tokens / largest.shape.inner
        print(f"  {name:<44} {done:>3} of {len(of_row):>3} points; {largest.shape.inner} parameters in the end, {largest.tokens} "
              f"tokens, {per_parameter:.1f} a parameter")
    if with_measure:
        seconds = measure(study)
        say(f"training that is not done: {seconds / 3600:.2f} hours on one worker, {seconds / 3600 / study.plan.workers:.2f} on "
            f"{study.plan.workers}")


def main():
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | status | report")
    for name, text in [("run", "does what is missing and writes the report"), ("status", "says what is done"),
                       ("report", "writes the report of what is done so far")]:
        command = commands.add_parser(name, help=text)
        command.add_argument("plan", metavar="PLAN", help="the plan (TOML)")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key of the plan")
        command.add_argument("--build", default="build", metavar="DIR", help="build folder with the programs; default: build")
        if name == "status":
            command.add_argument("--measure", action="store_true", help="trains a few updates of each model, says how long it takes")
        else:
            command.add_argument("--output", metavar="DIR", help="where results.md and results/ are written; default: the "
                                                                 "study's folder")
    arguments = parser.parse_args()
    try:
        plan = Plan(arguments.plan, arguments.set)
        if shutil.which("bash") is None:
            raise StudyError("bash is not on the PATH", NO_RESOURCES)
        study = Study(plan, arguments.build)
        study.make()
        if arguments.command == "status":
            status(study, arguments.measure)
            return 0
        if arguments.command == "run":
            Runner(study).run()
        import study_report  # with matplotlib, which the others do without
        for path in study_report.write(study, arguments.output or plan.dir):
            say(f"wrote {path}")
    except StudyError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
