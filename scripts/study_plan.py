"""The plan of a study as it stands in its file: what can be said about it without running anything."""
import dataclasses
import difflib
import json
import os
import pathlib
import tomllib

# Exit codes of docs/exit_codes.md.
BAD_INPUT, NO_RESOURCES, STOPPED, INTERNAL = 2, 3, 10, 70
# What the study itself decides of tf_train's configuration.
OWN_KEYS = ("data.path", "run.dir", "run.resume", "run.threads", "run.keep_last", "train.steps", "train.max_tokens",
            "train.max_time", "train.schedule", "train.decay_steps", "train.seed", "train.eval_every")
# Keys of [model] that grow, and what tf_expand calls them.
GROWS = {"tokenformer": {f"tokens.{group}": group for group in ("query", "key", "value", "proj", "ffn")},
         "transformer": {key: key for key in ("dim", "ffn_dim", "layers")},
         "memoryformer": {f"{key}.{group}": f"{group}.{name}" for group in ("attention", "ffn_in", "ffn_out")
                          for key, name in (("tables", "tables"), ("hash_bits", "bits"))}}
FOLLOWS = {"transformer": ("heads",)}  # what changes with them


class StudyError(Exception):
    """One line of text and the exit code that goes with it."""

    def __init__(self, text, code=BAD_INPUT):
        super().__init__(text)
        self.code = code


# A check is a predicate and what the value should have been.

def number(value):
    return type(value) in (int, float) and abs(value) < float("inf")


def texts(value):
    return type(value) is list and value and all(type(v) is str and v for v in value)


COUNT = (lambda v: type(v) is int and v >= 1, "a whole number from 1")
WHOLE = (lambda v: type(v) is int and v >= 0, "a whole number from 0")
NUMBER = (lambda v: number(v) and v >= 0, "a number from 0")
POSITIVE = (lambda v: number(v) and v > 0, "a number above 0")
SHARE = (lambda v: number(v) and 0 < v < 1, "a number between 0 and 1")
POINTS = (lambda v: type(v) is list and v and all(number(p) and p > 0 for p in v) and v == sorted(set(v)) and v[-1] == 1,
          "shares of the budget in ascending order, the last of them 1")
TEXT = (lambda v: type(v) is str and v != "" and v.isprintable(), "a text of one line")
TEXTS = (texts, "a list of texts")
COUNTS = (lambda v: type(v) is list and v and all(COUNT[0](n) for n in v), "a list of whole numbers from 1")
TABLES = (lambda v: type(v) is list and v and all(type(t) is dict for t in v), "a list of tables")
TABLE = (lambda v: type(v) is dict, "a table")
TABLES_BY_NAME = (lambda v: type(v) is dict and v and all(type(t) is dict for t in v.values()), "one table or more, each with a name")
SETTINGS = (lambda v: type(v) is dict and "model" not in v and not set(flat(v)) & set(OWN_KEYS),
            "a table of tf_train's keys; models are in [model.NAME], and the study decides " + ", ".join(OWN_KEYS))
TRAINING = (lambda v: SETTINGS[0](v) and v.keys() <= {"train"}, "a table of tf_train's keys, of [train] alone; the study decides " +
            ", ".join(key for key in OWN_KEYS if key.startswith("train.")))

SECTIONS = {"study": TABLE, "budget": TABLE, "corpus": TABLES_BY_NAME, "prepare": TABLE, "config": SETTINGS, "model": TABLES_BY_NAME,
            "eval": TABLE, "row": TABLES, "forgetting": TABLE, "length": TABLE}
STUDY_KEYS = {"dir": TEXT, "corpus": TEXT, "control": TEXT, "about": TEXTS, "workers": COUNT, "ranks": COUNT, "threads": COUNT,
              "launcher": TEXT}
BUDGET_KEYS = {"reference": TEXT, "tokens_per_parameter": POSITIVE, "points": POINTS, "decay": SHARE}
CORPUS_KEYS = {"files": TEXTS, "command": TEXT, "document_start": TEXT, "about": TEXT}
PREPARE_KEYS = {"tokenizer": TEXT, "vocab": COUNT, "validation_fraction": SHARE, "test_fraction": SHARE}
EVAL_KEYS = {"stride": COUNT, "batch": COUNT, "max_tokens": COUNT}
ROW_KEYS = {"name": TEXT, "seeds": COUNT, "stages": TABLES, "config": TRAINING, "after_growth": TRAINING, "against": TEXT}
GROWTH_KEYS = {"rule": TEXT, "noise": NUMBER}
STAGE_KEYS = {"model": TEXT, "until": SHARE, **GROWTH_KEYS}
FORGETTING_KEYS = {"corpus": TEXT, "point": POSITIVE, "tokens": COUNT, "lr_fraction": POSITIVE, "seeds": COUNT, "row": TABLES}
FORGETTING_ROW_KEYS = {"name": TEXT, "from": TEXT, "model": TEXT, "config": TRAINING, **GROWTH_KEYS}
LENGTH_KEYS = {"models": TEXTS, "sequences": COUNTS, "tokens": COUNT, "steps": COUNT}


def did_you_mean(word, known):
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(known)}"


def checked(where, table, keys, required=()):
    """`table` itself, when all of its keys are known and their values can be."""
    for key, value in table.items():
        if key not in keys:
            raise StudyError(f"{where}: unknown key {key}{did_you_mean(key, keys)}")
        fits, want = keys[key]
        if not fits(value):
            raise StudyError(f"{where}: {key} = {json.dumps(value, default=str)}: want {want}")
    for key in required:
        if key not in table:
            raise StudyError(f"{where}: {key} is missing")
    return table


def chosen(where, key, name, known):
    """`name`, which has to be one of `known`."""
    if name not in known:
        raise StudyError(f"{where}: {key}: there is no {name}{did_you_mean(name, list(known))}")
    return name


def flat(table, prefix=""):
    """{"train": {"lr": 1}} -> {"train.lr": 1}"""
    found = {}
    for key, value in table.items():
        found.update(flat(value, f"{prefix}{key}.") if type(value) is dict else {prefix + key: value})
    return found


def merged(table, more):
    """`more` over `table`; lists of tables are replaced as a whole."""
    result = dict(table)
    for key, value in more.items():
        result[key] = merged(result[key], value) if type(value) is dict and type(result.get(key)) is dict else value
    return result


def read_toml(path, overrides):
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: {error}") from None
    for override in overrides:
        key, equals, value = override.partition("=")
        wrong = f'--set {override}: want KEY=VALUE like study.workers=1 or corpus.wiki.files=["a.txt"]'
        if not equals:
            raise StudyError(wrong)
        try:
            more = tomllib.loads(override)
        except tomllib.TOMLDecodeError:
            try:
                more = tomllib.loads(f"{key}={json.dumps(value)}")
            except tomllib.TOMLDecodeError:
                raise StudyError(wrong) from None
        content = merged(content, more)
    return content


@dataclasses.dataclass(frozen=True)
class Stage:
    model: str
    until: float | None  # share of the budget at which the next stage begins; none: the last
    growth: dict  # rule and noise, of the growth at its beginning


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    where: str  # in messages
    seeds: int
    stages: tuple
    config: dict
    after_growth: dict
    against: str | None


class Plan:
    """The plan as it stands in the file: what can be said without running anything."""

    def __init__(self, path, overrides=()):
        self.path = path
        content = checked(path, read_toml(path, overrides), SECTIONS, ["study", "budget", "corpus", "model", "row"])
        study = checked(f"{path}: [study]", content["study"], STUDY_KEYS, ["dir", "corpus"])
        self.name = pathlib.Path(path).stem
        self.dir = os.path.normpath(pathlib.Path(path).absolute().parent / os.path.expandvars(study["dir"]))
        self.workers, self.ranks, self.threads = (study.get(key, 1) for key in ("workers", "ranks", "threads"))
        self.about = study.get("about", [])
        self.launcher = study.get("launcher", "mpirun -n").split()
        self.corpora = content["corpus"]
        for name, corpus in self.corpora.items():
            checked(f"{path}: [corpus.{name}]", corpus, CORPUS_KEYS)
            if ("files" in corpus) == ("command" in corpus):
                raise StudyError(f"{path}: [corpus.{name}]: give either files or a command that prints the text")
        self.corpus = chosen(f"{path}: [study]", "corpus", study["corpus"], self.corpora)
        self.prepare = checked(f"{path}: [prepare]", content.get("prepare", {}), PREPARE_KEYS)
        self.config = content.get("config", {})
        self.models = {}
        for name, model in content["model"].items():
            where = f"{path}: [model.{name}]"
            if "like" in model:
                base = self.models[chosen(where, "like", model["like"], self.models)]
                model = merged(base, {key: value for key, value in model.items() if key != "like"})
            if model.get("kind") not in GROWS:
                raise StudyError(f"{where}: kind is missing or none of {', '.join(GROWS)}")
            self.models[name] = model
        self.eval = checked(f"{path}: [eval]", content.get("eval", {}), EVAL_KEYS)
        self.rows = {}
        for table in content["row"]:
            row = self.read_row(f"{path}: row {len(self.rows) + 1}", table)
            if row.name in self.rows:
                raise StudyError(f"{row.where}: there is another row of this name")
            self.rows[row.name] = row
        for row in self.rows.values():
            if row.against is not None:
                chosen(row.where, "against", row.against, self.rows)
        self.control = study.get("control")
        if self.control is not None:
            chosen(f"{path}: [study]", "control", self.control, self.rows)
        budget = checked(f"{path}: [budget]", content["budget"], BUDGET_KEYS, BUDGET_KEYS)
        self.reference = self.rows[chosen(f"{path}: [budget]", "reference", budget["reference"], self.rows)]
        if len(self.reference.stages) != 1:
            raise StudyError(f"{path}: [budget]: reference: {self.reference.name} grows; the budget is that of a row which "
                             "does not")
        self.tokens_per_parameter, self.points, self.decay = (budget[k] for k in ("tokens_per_parameter", "points", "decay"))
        for row in self.rows.values():
            late = [stage for stage in row.stages if stage.until and stage.until >= 1 - self.decay]
            if late:
                raise StudyError(f"{row.where}: model {late[0].model} until {late[0].until}: the last decay begins at "
                                 f"{1 - self.decay:g} of the budget, and growth comes before it")
        self.forgetting = self.read_forgetting(content.get("forgetting"))
        self.length = self.read_length(content.get("length"))

    def read_row(self, where, table):
        checked(where, table, ROW_KEYS, ["name", "stages"])
        where = f"{where} ({table['name']})"
        stages = []
        for i, entry in enumerate(table["stages"]):
            at = f"{where}: stage {i + 1}"
            checked(at, entry, STAGE_KEYS, ["model"])
            model, last = chosen(at, "model", entry["model"], self.models), i + 1 == len(table["stages"])
            growth = {key: entry[key] for key in GROWTH_KEYS if key in entry}
            if growth and i == 0:
                raise StudyError(f"{at}: {next(iter(growth))} is about growth, and nothing grows here")
            if ("until" in entry) == last:
                raise StudyError(f"{at}: until is missing" if not last else f"{at}: until: the last stage goes to the end")
            if i > 0:
                self.growth_counts(at, stages[-1].model, model)
                if not last and entry["until"] <= stages[-1].until:
                    raise StudyError(f"{at}: until = {entry['until']} is not after that of the stage before")
            stages.append(Stage(model, entry.get("until"), growth))
        if len(stages) == 1 and "after_growth" in table:
            raise StudyError(f"{where}: after_growth, and nothing grows here")
        return Row(table["name"], where, table.get("seeds", 1), tuple(stages), table.get("config", {}),
                   table.get("after_growth", {}), table.get("against"))

    def growth_counts(self, where, before, after):
        """{name of tf_expand: count} of what grows from one model to another."""
        old, new = flat(self.models[before]), flat(self.models[after])
        kind = old["kind"]
        counts = {}
        for key in sorted(old.keys() | new.keys()):
            a, b = old.get(key), new.get(key)
            if a == b or key in FOLLOWS.get(kind, ()):
                continue
            if new["kind"] != kind or key not in GROWS[kind] or type(a) is not int or type(b) is not int:
                raise StudyError(f"{where}: {before} cannot become {after}: {key} is {a} and {b}")
            if b < a:
                raise StudyError(f"{where}: {before} cannot become {after}: {key} shrinks from {a} to {b}")
            counts[GROWS[kind][key]] = b
        if not counts:
            raise StudyError(f"{where}: {before} and {after} are the same: nothing grows")
        return counts

    def read_forgetting(self, table):
        if table is None:
            return None
        where = f"{self.path}: [forgetting]"
        checked(where, table, FORGETTING_KEYS, ["corpus", "point", "tokens", "row"])
        chosen(where, "corpus", table["corpus"], self.corpora)
        if table["point"] not in self.points:
            raise StudyError(f"{where}: point = {table['point']} is none of the budget's points {self.points}")
        for number_, row in enumerate(table["row"], 1):
            at = f"{where}: row {number_}"
            checked(at, row, FORGETTING_ROW_KEYS, ["name", "from"])
            source = self.rows[chosen(at, "from", row["from"], self.rows)]
            if table.get("seeds", 1) > source.seeds:
                raise StudyError(f"{at}: from: {source.name} has {source.seeds} seeds, fewer than the {table['seeds']} asked for")
            if "model" in row:
                chosen(at, "model", row["model"], self.models)
            elif row.keys() & GROWTH_KEYS.keys():
                raise StudyError(f"{at}: a growth rule, and nothing grows here")
        return table

    def read_length(self, table):
        if table is None:
            return None
        where = f"{self.path}: [length]"
        checked(where, table, LENGTH_KEYS, LENGTH_KEYS)
        for model in table["models"]:
            step_bench_words(where, self.models[chosen(where, "models", model, self.models)])
        for length in table["sequences"]:
            if table["tokens"] % length:
                raise StudyError(f"{where}: tokens = {table['tokens']} is no multiple of the sequence length {length}")
        return table

    def settings(self, row, stage, seed):
        """tf_train's keys of a stage of a row but for where it is, how long it trains and by which schedule."""
        keys = flat({"model": self.models[row.stages[stage].model]})
        for table in [self.config, row.config, *([row.after_growth] if stage > 0 else [])]:
            keys.update(flat(table))
        return keys | {"train.seed": seed, "train.eval_every": 0}


def step_bench_words(where, model):
    """What step_bench calls the sizes of a model. It takes one count for q, k, v and proj."""
    kind, words = model["kind"], ["--kind", model["kind"]]
    known = {"kind", "layers", "dim", "heads", "max_seq", "vocab", "rotary_fraction"}
    names = {"layers": "layers", "dim": "dim", "heads": "heads"}
    if kind == "tokenformer":
        tokens = model.get("tokens", {})
        attention = {tokens.get(group) for group in ("query", "key", "value", "proj")}
        if len(attention) != 1 or None in attention or "ffn" not in tokens:
            raise StudyError(f"{where}: a step is timed for equal model.tokens of query, key, value and proj; they are {tokens}")
        words += ["--tokens-attn", attention.pop(), "--tokens-ffn", tokens["ffn"]]
        known |= {"tokens"}
    elif kind == "transformer":
        names["ffn_dim"] = "ffn-dim"
        known |= {"ffn_dim"}
    else:
        raise StudyError(f"{where}: a step is timed of tokenformer and transformer, not of {kind}")
    unknown = sorted(model.keys() - known)
    if unknown:
        raise StudyError(f"{where}: a step is timed without model.{unknown[0]}")
    for key, option in names.items():
        if key in model:
            words += [f"--{option}", model[key]]
    return [str(word) for word in words]
