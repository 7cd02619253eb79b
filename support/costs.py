"""Where the cost lands: seconds and megabytes of every way to serve, per thousand tokens.

serving      draft, verify, commit
waiting      serving stands still: for the learner, and until new weights are in place
remembering  the answer goes into the shared memory
learning     on the other core, beside serving; judging, by the gate, is a part of it
writing      the log, the lineage, the versions; the report itself is not in it
held         at most, by the process that serves (the memory is a part of it) and by the learner's
"""

import resource
import sys

PARTS = ("serving", "waiting", "remembering", "learning", "judging", "writing")


def megabytes_held():
    """The most that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def bytes_free():
    """What this machine could still give to a process; None where it does not say."""
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def table(lines, memory, held, seconds_writing, written):
    """lines: as --log has them; memory: the shared one or None; held: megabytes, by the learner's
    process; written: bytes -> {arm: its costs}.  What is written and held counts for the arm that
    learns."""
    out = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        mine = [line for line in lines if line["arm"] == arm]
        learned = [line["learned_before"] for line in mine if line["learned_before"]]
        remembering = sum(line["remember_seconds"] for line in mine)
        seconds = {
            "serving": sum(line["serve_seconds"] for line in mine),
            "waiting": sum(line["wait_seconds"] for line in mine) - remembering,
            "remembering": remembering,
            "learning": sum(x["seconds"] for x in learned),
            "judging": sum(x["judging_seconds"] for x in learned),
            "writing": seconds_writing if arm == "online" else 0.0,
        }
        tokens = sum(line["tokens"] for line in mine)
        per_thousand = {part: 1000 * s / max(1, tokens) for part, s in seconds.items()}
        out[arm] = {"tokens": tokens, "seconds": seconds,
                    "seconds_per_thousand_tokens": per_thousand}
        if arm == "online":
            out[arm] |= {
                "megabytes_held": {
                    "serving": megabytes_held(), "learning": held,
                    "memory": memory.bytes_held / 1e6 if memory else 0.0,
                },
                "megabytes_written": written / 1e6,
                "megabytes_written_per_thousand_tokens": written / 1e3 / max(1, tokens),
            }
    return out


def rows(costs):
    """The table for people, as text."""
    form = "{:8s} {:>8s}" + " {:>11s}" * len(PARTS)
    text = [form.format("arm", "tokens", *PARTS) + "   seconds per thousand tokens"]
    for arm, x in costs.items():
        per_thousand = [f"{x['seconds_per_thousand_tokens'][part]:.3f}" for part in PARTS]
        text.append(form.format(arm, str(x["tokens"]), *per_thousand))
    for x in costs.values():
        if "megabytes_held" in x:
            held = x["megabytes_held"]
            text.append(
                f"megabytes held: {held['serving']:.0f} serving, {held['memory']:.0f} of them the "
                f"memory, {held['learning']:.0f} learning; written: {x['megabytes_written']:.2f}, "
                f"{x['megabytes_written_per_thousand_tokens']:.3f} per thousand tokens")
    return "\n".join(text)
