"""python aurora.py --explain DIR: why did performance change?  The lineage, told to people.

A row a change, a curve a class, and whether the traffic shifted.  That is judged by what never
learns: a run begins with a draft, and how many tokens a round to expect of it on each new answer
changes only if the text does.  Its last 16 answers of a class are compared with the earlier ones of
that class since the last shift; more than 4 standard errors apart, the class has shifted.
"""

import json
import time
from statistics import fmean, variance

from model import UserError
from support import costs, lineage
from support.report import say, shown

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # of a curve, in characters
RECENT, APART = 16, 4  # answers; standard errors


def tell(directory, version=None):
    """Prints all changes, or all about one version.  UserError if there is nothing to tell."""
    lines = lineage.read(directory)
    if not lines:
        raise UserError(f"{directory} holds no {lineage.NAME}: expected a directory of --save")
    if version is not None:
        chosen = [line for line in lines if line["version"] == version]
        if not chosen:
            raise UserError(f"{directory} knows no version {version}")
        for line in chosen:
            say(in_full(line))
        return
    for row in table(lines):
        say(row)
    for row in curves(lines):
        say(row)
    ran = [line["costs"] for line in lines if "costs" in line]
    if ran:
        say("\nof the last run:\n" + costs.rows(ran[-1]))


def table(lines):
    form = "{:>7s} {:>6s}  {:14s} {:>8s} {:>5s} {:>6s} {:>6s} {:>7s} {:>7s}  {}"
    yield form.format("version", "parent", "when", "requests", "steps", "loss", "z", "tokens/s",
                      "x plain", "what happened")
    shifts = Shifts()
    for line in lines:
        plain, speed = line.get("plain_tokens_per_second"), line.get("tokens_per_second")
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(line["time"]))
        fed = str(len(line["requests"])) if "requests" in line else "-"
        story = [*shifts.of(line), words(line)]
        if plain and speed < plain and line["event"] not in ("slower", "faster"):
            story.append("slower than plain decoding")
        yield form.format(
            number(line["version"], ".0f"), number(line["parent"], ".0f"), when, fed,
            number(line.get("steps"), ".0f"), number(line.get("loss"), ".3f"),
            number(line.get("gate_z"), ".1f"), number(speed, ".0f"),
            number(speed / plain if plain else None, ".2f"), "; ".join(story))


def number(x, form):
    return "-" if x is None else format(x, form)


def words(line):
    """What happened, in plain words."""
    event, mean = line["event"], line.get("gate_mean")
    lengths = [f"{shown(kind)} {began:.2f} -> {learned:.2f}"
               for kind, (began, learned) in line.get("expected_length", {}).items()]
    if event == "began":
        return f"a run began with {shown(line['draft'])}"
    if event == "learned":
        return f"learned, and serves: {', '.join(lengths)}"
    if event == "set aside":
        return f"taken back: no longer ahead ({mean:+.2f} tokens a round), it goes on learning"
    if event == "dropped":
        return f"taken back and dropped: behind by {-mean:.2f} tokens a round; learning pauses"
    if event == "stopped":
        return f"learning stopped: {shown(line['reason'])}"
    if event == "slower":
        return "the last 8 answers took longer than plain decoding would have"
    if event == "faster":
        return "faster than plain decoding again"
    if event == "rolled back":
        return f"version {line['parent']} again, instead of {line['instead_of']}"
    lost = line.get("lost")
    return "kept on the disk" + (f", without the learner's state: {shown(lost)}" if lost else "")


class Shifts:
    """Watches what does not learn, line by line."""

    def __init__(self):
        self.began = {}  # class -> tokens a round to expect, since its last shift
        self.last = None  # class of the last answer

    def of(self, line):
        """-> the shifts that this line's answers show, in words."""
        found = []
        if line["event"] == "began":
            self.__init__()  # another yardstick
        for request in line.get("requests", ()):
            kind = request["class"]
            if self.last not in (None, kind):
                found.append(f"traffic shifted from {shown(self.last)} to {shown(kind)}")
            self.last = kind
            seen = self.began.setdefault(kind, [])
            seen.append(request["began"])
            earlier, recent = seen[:-RECENT], seen[-RECENT:]
            if len(earlier) < RECENT:
                continue
            error = (variance(earlier) / len(earlier) + variance(recent) / len(recent)) ** 0.5
            if abs(fmean(recent) - fmean(earlier)) > APART * error:
                found.append(f"the text of {shown(kind)} shifted: what never learned made "
                             f"{fmean(earlier):.2f} tokens a round and makes {fmean(recent):.2f}")
                self.began[kind] = recent
        return found if len(found) < 4 else ["traffic of several classes, in turn"]


def curves(lines):
    """A curve a class: tokens a round to expect of what was learned, an answer after the other."""
    kinds = {}
    for line in lines:
        for request in line.get("requests", ()):
            kinds.setdefault(request["class"], []).append(request)
    if kinds:
        yield "\ntokens a round to expect of what was learned, on answers that it had not seen"
    for kind, requests in kinds.items():
        learned = [r["learned"] for r in requests]
        began = fmean(r["began"] for r in requests)
        third = -(-len(learned) // 3)
        yield (f"{shown(kind):10s} {curve(learned)}  {fmean(learned[:third]):.2f} -> "
               f"{fmean(learned[-third:]):.2f}; what runs began with: {began:.2f}")


def curve(values):
    """At most WIDTH bars, each the mean of as many neighbours."""
    size = -(-len(values) // WIDTH)
    means = [fmean(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((x - low) / step)] for x in means)


def in_full(line):
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["time"]))
    rows = [f"version {line['version']}, {when}: {words(line)}"]
    for key, value in line.items():
        if key not in ("version", "event", "time", "requests"):
            rows.append(f"  {key.replace('_', ' '):24s} {json.dumps(value)}")
    for r in line.get("requests", ()):
        rows.append(f"  request {r['number']:<6d} {shown(r['class']):10s} {r['began']:.2f} -> "
                    f"{r['learned']:.2f}  {r['sha256']}")
    return "\n".join(rows) + "\n"
