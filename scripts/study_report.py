"""The report of a study: results.md with tables, plots (SVG) and the raw figures (CSV) beside it. Nothing is measured
here, and no FLOPs are counted: both come from the programs, through study.py."""
import csv
import math
import os
import platform
import re
import statistics

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)

MISSING = "-"


def spread(values, text):
    """The median, and what lies between the least and the greatest of several."""
    if not values:
        return MISSING
    middle = text.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({text.format(min(values))} to {text.format(max(values))})"


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]


def flops_at(curve, loss):
    """(FLOPs at which a curve of (FLOPs, loss) points first comes down to `loss`, whether its first point was there
    already): between two points on a straight line over log(FLOPs). None when it never does."""
    for i, (flops, here) in enumerate(curve):
        if here > loss:
            continue
        if i == 0:
            return flops, here < loss
        before, above = curve[i - 1]
        part = (above - loss) / (above - here)
        return before * (flops / before) ** part, False
    return None


class Ratio:
    """FLOPs(grown) / FLOPs(scratch) at the lowest loss that both reach. A bound where the better of them was below that
    loss at its first point already: `sign` is "<" or ">", else "="."""

    def __init__(self, grown, scratch):
        target = max(grown[-1][1], scratch[-1][1])
        (a, grown_early), (b, scratch_early) = flops_at(grown, target), flops_at(scratch, target)
        self.value, self.sign = a / b, "<" if grown_early else ">" if scratch_early else "="
        self.difference = grown[-1][1] - scratch[-1][1]  # of the losses at the end

    def __str__(self):
        return ("" if self.sign == "=" else self.sign + " ") + f"{self.value:.2f}"


class Report:
    def __init__(self, study, folder):
        self.study, self.plan, self.folder = study, study.plan, folder
        self.written = []
        self.timed = any(piece.result for *_, piece in study.lengths)
        self.curves = {}  # (row, seed): [(FLOPs, loss)], of what is done
        for life in study.lives:
            done = [p for p in sorted(life.points, key=lambda p: p.share) if p.evaluation.result]
            self.curves[life.row.name, life.seed] = [(p.branch.flops, p.evaluation.result["nll"]) for p in done]

    def path(self, name):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.written.append(path)
        return path

    def complete(self, row, seed):
        """The curve with all of its points; none before."""
        curve = self.curves.get((row, seed), [])
        return curve if len(curve) == len(self.plan.points) else None

    def pairs(self, row, other):
        """(seed, curve, curve of the other) for the seeds that both have to the end."""
        seeds = range(1, min(self.plan.rows[row].seeds, self.plan.rows[other].seeds) + 1)
        found = [(seed, self.complete(row, seed), self.complete(other, seed)) for seed in seeds]
        return [(seed, a, b) for seed, a, b in found if a and b]

    def points(self, row, share):
        return [p for life in self.study.lives if life.row is row for p in life.points
                if p.share == share and p.evaluation.result]

    # Tables.
    def answer(self):
        rows = []
        for row in self.plan.rows.values():
            if row.against is None:
                continue
            pairs = self.pairs(row.name, row.against)
            ratios = [Ratio(a, b) for _, a, b in pairs]
            exact = [r.value for r in ratios if r.sign == "="]
            middle = spread(exact, "{:.2f}") if exact and len(exact) == len(ratios) else ", ".join(map(str, ratios)) or MISSING
            reached = sum(r.difference <= 0 for r in ratios)
            end = f"reached by {reached} of {len(ratios)}" if reached else "not reached" if ratios else MISSING
            rows.append([row.name, row.against, middle, ", ".join(map(str, ratios)) or MISSING,
                         spread([r.difference for r in ratios], "{:+.4f}"), end])
        return table(["grown", "against", "FLOPs(grown) / FLOPs(scratch) at equal loss", "by seed",
                      "loss at the end, grown - scratch", "scratch's loss at the whole budget"], rows) if rows else []

    def against_control(self):
        control = self.plan.control
        rows = []
        for name in self.plan.rows:
            if name == control:
                continue
            differences = [a[-1][1] - b[-1][1] for _, a, b in self.pairs(name, control)]
            if differences:
                wins = sum(d > 0 for d in differences)
                verdict = {0: "no", len(differences): "yes"}.get(wins, f"with {wins} of {len(differences)} seeds")
                rows.append([name, spread(differences, "{:+.4f}"), verdict])
        return table(["row", f"loss at the whole budget - that of \"{control}\"", "the control wins"], rows)

    def perplexities(self):
        rows = []
        for row in self.plan.rows.values():
            cells = [row.name, row.seeds]
            for share in self.plan.points:
                cells.append(spread([p.evaluation.result["token_perplexity"] for p in self.points(row, share)], "{:.2f}"))
            ends = self.points(row, 1)
            cells.append(spread([p.evaluation.result["bits_per_byte"] for p in ends], "{:.4f}"))
            rows.append(cells)
        shares = [f"{share:g} of the budget" for share in self.plan.points]
        return table(["row", "seeds", *shares, "bits per byte at the end"], rows)

    def sizes(self):
        rows = []
        for row in self.plan.rows.values():
            point = next(p for life in self.study.lives if life.row is row for p in life.points if p.share == 1)
            shape, branch = point.branch.shape, point.branch
            life = next(life for life in self.study.lives if life.row is row)
            models = " -> ".join(f"{stage.model} until {stage.until:g}" if stage.until else stage.model for stage in row.stages)
            seconds = [sum(p.result["seconds"] for p in life.trunk if p.result) for life in self.study.lives if life.row is row
                       and all(p.result for p in life.trunk)]
            rows.append([row.name, models, shape.parameters, shape.inner, f"{shape.train_flops / 1e6:.3f}", branch.tokens,
                         f"{branch.tokens / shape.inner:.1f}", f"{branch.flops:.4g}", spread(seconds, "{:.0f}"),
                         f"{life.trunk[-1].definition['config']['train.lr']:g}"])
        return table(["row", "models", "parameters at the end", "without embedding and head", "MFLOPs a token", "tokens",
                      "tokens a parameter", "FLOPs", "seconds of the trunk", "lr"], rows)

    def growths(self):
        rows = []
        for life in self.study.lives:
            for grown, before, after in life.growths:
                if grown.result and before.result and after.result:
                    grew = ", ".join(f"{name} {count}" for name, count in grown.definition["counts"].items())
                    rows.append([life.row.name, life.seed, grown.step, grew, grown.definition["growth"].get("rule", "default"),
                                 f"{grown.result['probe_change']:.2g}", f"{before.result['nll']:.4f}", f"{after.result['nll']:.4f}"])
        return table(["row", "seed", "update", "grows to", "rule", "change of the logits on the probe", "loss before",
                      "loss right after"], rows) if rows else []

    def forgetting_rows(self):
        """[name, seed, end's FLOPs, perplexities on first and second corpus: before, after growth, at the end]"""
        rows = []
        for f in self.study.forgetting:
            def values(pair):
                return [e.result["token_perplexity"] if e.result else None for e in pair] if pair else [None, None]
            if all(e.result for e in f.after):
                rows.append([f.name, f.seed, f.end.flops - f.source.flops, *values(f.before), *values(f.grown), *values(f.after)])
        return rows

    def forgetting(self):
        first, second = self.plan.corpus, self.plan.forgetting["corpus"]
        by_name = {}
        for row in self.forgetting_rows():
            by_name.setdefault(row[0], []).append(row)
        rows = []
        for name, found in by_name.items():
            columns = [[row[i] for row in found if row[i] is not None] for i in range(2, 9)]
            kept = [row[7] / row[3] for row in found]
            cells = [spread(c, "{:.2f}") if c else "not grown" for c in columns[1:]]
            rows.append([name, len(found), spread(columns[0], "{:.3g}"), *cells,
                         spread(kept, "{:.2f}")])
        return table(["row", "seeds", "FLOPs", f"{first} before", f"{second} before", f"{first}, grown", f"{second}, grown",
                      f"{first} after", f"{second} after", f"{first} after / before"], rows)

    def length(self):
        rows = []
        for name, length, shape, piece in self.study.lengths:
            if piece.result:
                r = piece.result
                rows.append([name, length, shape.parameters, f"{shape.update_flops / 1e9:.3f}", f"{r['ms_min']:.1f}",
                             f"{r['tokens_per_s']:.0f}", f"{r['peak_tensor_mb']:.1f}"])
        return table(["model", "sequence", "parameters", "GFLOPs a step", "ms a step (fastest)", "tokens/s (median)",
                      "MB of tensors"], rows)

    # Sentences that follow from the figures.
    def findings(self):
        held, failed, open_ = [], [], []

        def claim(text, pairs):
            """`pairs`: (seed, what should be below 0). Held with all seeds, failed with all, or open."""
            if not pairs:
                return
            below = sum(d < 0 for _, d in pairs)
            figures = spread([d for _, d in pairs], "{:+.4f}") + (", one seed" if len(pairs) == 1 else f", {len(pairs)} seeds")
            (held if below == len(pairs) else failed if below == 0 else open_).append(f"{text}: {figures}")

        def losses(row, other):
            return [(seed, a[-1][1] - b[-1][1]) for seed, a, b in self.pairs(row, other)]
        rows = self.plan.rows
        for row in rows.values():
            if row.against:
                claim(f"\"{row.name}\" ends below \"{row.against}\" for the same FLOPs (loss)", losses(row.name, row.against))
        if self.plan.control:
            small = rows[self.plan.control].stages[0].model
            for row in rows.values():
                if len(row.stages) > 1 and row.stages[0].model == small:
                    claim(f"growing pays at all: \"{row.name}\" ends below the small model trained on, \"{self.plan.control}\" "
                          "(loss)", losses(row.name, self.plan.control))
        exact = [abs(after.result["nll"] - before.result["nll"]) for life in self.study.lives
                 for grown, before, after in life.growths
                 if before.result and after.result and grown.definition["growth"].get("rule") in (None, "zero-key", "net2net")]
        if exact:
            (held if max(exact) < 1e-5 else failed).append("growth by zero keys or Net2Net does not change the held-out loss: it "
                                                           f"moved by at most {max(exact):.1e} in {len(exact)} growths")
        self.forgetting_claims(claim)
        if self.study.lengths:
            self.length_claims(claim)
        return held, failed, open_

    def forgetting_claims(self, claim):
        """Each row that grows against plain fine-tuning of the same model: the losses on both corpora at the end."""
        plain = {(f.origin, f.seed): f for f in self.study.forgetting if f.grown is None}
        for name in dict.fromkeys(f.name for f in self.study.forgetting if f.grown):
            for corpus, text in enumerate(["forgets less than", "learns the second corpus better than"]):
                pairs, others = [], set()
                for f in self.study.forgetting:
                    other = plain.get((f.origin, f.seed))
                    if f.name == name and other and f.after[corpus].result and other.after[corpus].result:
                        pairs.append((f.seed, f.after[corpus].result["nll"] - other.after[corpus].result["nll"]))
                        others.add(other.name)
                claim(f"\"{name}\" {text} \"{', '.join(others)}\" (loss)", pairs)

    def length_claims(self, claim):
        models = self.plan.length["models"]
        by = {(name, length): (shape, piece.result) for name, length, shape, piece in self.study.lengths if piece.result}
        longest = max(self.plan.length["sequences"])
        for other in models[1:]:
            if (models[0], longest) in by and (other, longest) in by:
                (a, x), (b, y) = by[models[0], longest], by[other, longest]
                claim(f"at length {longest} a step of {models[0]} has fewer FLOPs than one of {other} (relative)",
                      [(1, a.update_flops / b.update_flops - 1)])
                claim(f"at length {longest} a step of {models[0]} takes less time than one of {other} (relative)",
                      [(1, x["ms_min"] / y["ms_min"] - 1)])
                claim(f"at length {longest} a step of {models[0]} takes less memory than one of {other} (relative)",
                      [(1, x["peak_tensor_mb"] / y["peak_tensor_mb"] - 1)])

    # Plots.
    def save(self, figure, name):
        figure.tight_layout()
        with matplotlib.rc_context({"svg.hashsalt": "study"}):
            figure.savefig(self.path(f"results/{name}.svg"), metadata={"Date": None})
        pyplot.close(figure)

    def colours(self):
        wheel = pyplot.get_cmap("tab20").colors
        order = [*range(0, 20, 2), *range(1, 20, 2)]
        return {name: wheel[order[i % 20]] for i, name in enumerate(self.plan.rows)}

    def plot_perplexity(self):
        figure, axes = pyplot.subplots(figsize=(9, 6))
        for row in self.plan.rows.values():
            found = [(share, self.points(row, share)) for share in self.plan.points]
            found = [points for _, points in found if points]
            if not found:
                continue
            x = [statistics.median(p.branch.flops for p in points) for points in found]
            values = [[p.evaluation.result["token_perplexity"] for p in points] for points in found]
            y = [statistics.median(v) for v in values]
            bars = [[m - min(v) for m, v in zip(y, values)], [max(v) - m for m, v in zip(y, values)]]
            grown = len(row.stages) > 1
            axes.errorbar(x, y, bars, marker="o" if grown else "s", markersize=4, linewidth=1.2, capsize=2,
                          linestyle="-" if grown else "--", color=self.colours()[row.name], label=row.name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("cumulative training FLOPs, all stages")
        axes.set_ylabel(f"validation perplexity ({self.plan.corpus}), median and range of seeds")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
        self.save(figure, "perplexity_flops")

    def plot_loss(self):
        figure, axes = pyplot.subplots(figsize=(9, 6))
        for life in self.study.lives:
            curve = [point for piece in life.trunk if piece.result for point in piece.result["curve"]]
            if life.seed != 1 or not curve:
                continue
            colour = self.colours()[life.row.name]
            axes.plot(*zip(*curve), linewidth=0.9, color=colour, label=life.row.name)
            for grown, before, after in life.growths:
                if before.result and after.result:
                    axes.plot([grown.tokens] * 2, [before.result["nll"], after.result["nll"]], "^-", markersize=6, color=colour)
            ends = [(p.branch.tokens, p.evaluation.result["nll"]) for p in life.points if p.evaluation.result]
            if ends:
                axes.plot(*zip(*ends), "o", markersize=3, color=colour)
        axes.set_xscale("log")
        axes.set_xlabel("training tokens (seed 1)")
        axes.set_ylabel("loss, nats a token: line: training at the constant rate; triangles:\n"
                        "validation at growth; dots: validation after the decay branches", fontsize=8)
        low = min((c[-1][1] for c in self.curves.values() if c), default=None)
        if low is not None:
            axes.set_ylim(low - 0.1, low + 2.2)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
        self.save(figure, "loss_tokens")

    def plot_length(self):
        figure, axes = pyplot.subplots(1, 3, figsize=(11, 4))
        for name in self.plan.length["models"]:
            of_model = [(length, shape.update_flops / 1e9, piece.result) for model, length, shape, piece in self.study.lengths
                        if model == name and piece.result]
            if not of_model:
                continue
            x = [length for length, _, _ in of_model]
            for axis, y in zip(axes, [[r["ms_min"] for *_, r in of_model], [r["peak_tensor_mb"] for *_, r in of_model],
                                      [flops for _, flops, _ in of_model]]):
                axis.plot(x, y, "o-", markersize=4, label=name)
        for axis, label in zip(axes, ["ms a step", "MB of tensors", "GFLOPs a step"]):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(f"sequence length ({self.plan.length['tokens']} tokens a step)")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7)
        self.save(figure, "length")

    # Raw figures.
    def write_csv(self, name, header, rows):
        with open(self.path(f"results/{name}.csv"), "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(["" if cell is None else cell for cell in row] for row in rows)

    def write_raw(self):
        rows, losses, growths = [], [], []
        for life in self.study.lives:
            for p in sorted(life.points, key=lambda p: p.share):
                if p.evaluation.result:
                    e, b = p.evaluation.result, p.branch
                    rows.append([life.row.name, life.seed, p.share, life.row.stages[p.stage].model, b.shape.parameters, b.shape.inner,
                                 b.step, b.tokens, b.flops, e["nll"], e["token_perplexity"], e["bits_per_byte"], e["scored_tokens"]])
            for piece in life.trunk:
                if piece.result:
                    start = piece.parents[0] if piece.parents else None
                    first, flops = (start.tokens, start.flops) if start else (0, 0)
                    for tokens, loss in piece.result["curve"]:
                        losses.append([life.row.name, life.seed, tokens, flops + (tokens - first) * piece.shape.train_flops, loss])
            for grown, before, after in life.growths:
                if grown.result and before.result and after.result:
                    growths.append([life.row.name, life.seed, grown.step, grown.tokens, grown.flops,
                                    " ".join(f"{k}={v}" for k, v in grown.definition["counts"].items()),
                                    grown.definition["growth"].get("rule", ""), grown.result["probe_change"], before.result["nll"],
                                    after.result["nll"]])
        self.write_csv("points", ["row", "seed", "share", "model", "parameters", "inner_parameters", "update", "tokens", "flops", "loss",
                                  "perplexity", "bits_per_byte", "scored_tokens"], rows)
        self.write_csv("loss", ["row", "seed", "tokens", "flops", "training_loss"], losses)
        self.write_csv("growth", ["row", "seed", "update", "tokens", "flops", "grows_to", "rule", "probe_change", "loss_before",
                                  "loss_after"], growths)
        if self.forgetting_rows():
            self.write_csv("forgetting", ["row", "seed", "flops", "first_before", "second_before", "first_grown", "second_grown",
                                          "first_after", "second_after"], self.forgetting_rows())
        if self.timed:
            self.write_csv("length", ["model", "sequence", "parameters", "flops", "ms_min", "ms_per_step", "peak_tensor_mb"],
                           [[name, length, shape.parameters, shape.update_flops, piece.result["ms_min"],
                             piece.result["ms_per_step"], piece.result["peak_tensor_mb"]]
                            for name, length, shape, piece in self.study.lengths if piece.result])

    # All of it.
    def where_and_when(self):
        study, plan = self.study, self.plan
        done = [piece for piece in study.pieces.values() if piece.result]
        processor = platform.processor() or platform.machine()
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                processor = re.search(r"^model name\s*: (.*)$", file.read(), re.M)[1]
        except (OSError, TypeError):
            pass
        dates = sorted({piece.result["finished"] for piece in done})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "nothing is done yet"
        seconds = sum(piece.result["seconds"] for piece in done if piece.kind == "train")
        ranks = f"{plan.ranks} rank{'s' if plan.ranks > 1 else ''} x {plan.threads} thread{'s' if plan.threads > 1 else ''}"
        lines = [f"Setting `{plan.name}`, {when}, {processor}, {os.cpu_count()} processors; {plan.workers} "
                 f"training{'s' if plan.workers > 1 else ''} at a time, each on {ranks}. "
                 f"{len(done)} of {len(study.pieces)} pieces are done, {seconds / 3600:.2f} hours of training.",
                 "", f"Programs: {study.captured('tf_train', [study.program('tf_train'), '--version']).strip()}."]
        return lines

    def set_up(self):
        plan, study = self.plan, self.study
        passes = []
        text = study.prepared_text(plan.corpus)
        train = re.search(r"^train +\d+ +(\d+)", text, re.M)
        about = plan.corpora[plan.corpus].get("about", plan.corpus)
        if train:
            most = max(p.branch.tokens for life in study.lives for p in life.points)
            passes = [f"The training split has {int(train[1])} tokens; the longest run sees {most} "
                      f"({most / int(train[1]):.1f} passes), the reference {plan.tokens_per_parameter:g} a parameter."]
        lines = [f"- **Text.** {about}; validation on documents of it that no run trains on, the same tokens for all rows.", *[f"- {p}" for p in passes],
                 f"- **Budget.** {study.budget:.4g} FLOPs for every row: {plan.tokens_per_parameter:g} tokens for each parameter "
                 f"outside embedding and head of \"{plan.reference.name}\". A grown row is charged for all its stages. FLOPs are "
                 "those of `tf_train --dry-run` (forward and twice that for backward; attention over its causal half; the head "
                 "counted).",
                 f"- **Rate.** Constant after the warm-up; a point of a curve is the end of a branch that leaves the trunk at "
                 f"{1 - plan.decay:g} of the point's FLOPs and goes down linearly. A point's FLOPs are those of its own path: the "
                 "other branches are not charged."]
        return lines + [f"- {text}" for text in plan.about]

    def text(self):
        plan = self.plan
        lines = ["# What growing saves", "", "Generated by `scripts/study.sh`; every figure below is in `results/*.csv`.", ""]
        lines += self.where_and_when() + [""] + self.set_up() + [""]
        if len(self.study.undone()) > 0:
            lines += [f"**Not complete:** {len(self.study.undone())} pieces are missing; `{MISSING}` stands for what they would "
                      "say.", ""]
        held, failed, open_ = self.findings()
        for title, sentences in [("What held", held), ("What did not hold", failed), ("Not resolved: seeds differ in sign", open_)]:
            if sentences:
                lines += [f"## {title}", ""] + [f"- {s}" for s in sentences] + [""]
        if answer := self.answer():
            lines += ["## The answer", "",
                      "FLOPs of the grown row over FLOPs of the row from scratch, at the lowest validation loss that both reach, read "
                      "off their curves on straight lines over log(FLOPs); below 1 growing saves. `<` and `>`: the better of the "
                      "two was there before its first point. Median, least and greatest of the seeds, which are paired.", "",
                      *answer, ""]
        if plan.control:
            lines += [f"## Against not growing: \"{plan.control}\"", "",
                      "The small model trained on for the same FLOPs. Where it wins, the budget was too small to need a larger "
                      "model, and says nothing about whether growing is worth it.", "", *self.against_control(), ""]
        lines += ["## Validation perplexity", "", *self.perplexities(), "",
                  "![perplexity over FLOPs](results/perplexity_flops.svg)", "", "![loss over tokens](results/loss_tokens.svg)", "",
                  "## Rows", "", *self.sizes(), ""]
        if growths := self.growths():
            lines += ["## Growth", "", *growths, ""]
        if self.forgetting_rows():
            share = plan.forgetting["point"]
            lines += ["## Forgetting", "",
                      f"Each model is trained on {plan.corpus} ({share:g} of the budget, decayed), grown where the row says so, and "
                      f"trained on {plan.forgetting['tokens']} tokens of {plan.forgetting['corpus']} with a rate that falls linearly from "
                      f"{plan.forgetting.get('lr_fraction', 1):g} of its own. Validation perplexity on both; the last column is 1 "
                      "where nothing is forgotten.", "", *self.forgetting(), ""]
        if self.timed:
            lines += ["## Length", "",
                      f"A step (forward, backward, AdamW) on {plan.length['tokens']} random tokens, cut into sequences of each length: "
                      "time, memory of tensors, FLOPs.", "", *self.length(), "", "![length](results/length.svg)", ""]
        return "\n".join(lines).rstrip() + "\n"

    def write(self):
        self.plot_perplexity()
        self.plot_loss()
        if self.timed:
            self.plot_length()
        self.write_raw()
        with open(self.path("results.md"), "w", encoding="utf-8") as file:
            file.write(self.text())
        return self.written


def write(study, folder):
    """Writes results.md and results/ into a folder; returns the paths."""
    return Report(study, folder).write()
