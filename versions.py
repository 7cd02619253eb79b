"""Versions: what becomes of what is learned.  The gate says whether it serves; --save keeps it, version by version.

Learning costs time, and steps that have nothing to learn still shake a draft that was as good as it can be.  So what is
learned has to show, on answers that it has not learned from yet, or it is taken back.
"""

from pathlib import Path

import torch

from draft import load_draft
from model import UserError, save

EARLIEST, PATIENCE = 8, 64  # answers before the first verdict, and until the last
BETTER, NOT_BETTER = 2.5, -2.0  # standard errors
FIRST_REST, LONGEST_REST = 64, 512  # answers
RECENT, SHIFT = 8, 4.0  # answers, and standard errors, that tell a shift of traffic


class Gate:
    """Learning goes on as long as it shows; otherwise what was learned is taken back, and the learner rests.

    The *anchor* is the draft as it last proved better.  Every new answer, before it is learned from, tells how many tokens
    a round to expect of the draft that serves and of the anchor.  The text is the same and neither has learned from it, so
    the differences d_1 .. d_n since the anchor was set are a fair comparison with little noise: z = sum d / sqrt(sum d^2)
    is about standard normal where there is no difference.

        z > 2.5                                what serves is better: it is the anchor from now on
        z < -2, or 64 answers and no verdict   nothing is gained: back to the anchor, and no learning for 64 answers; each
                                               time that this is so again, for twice as many, up to 512
    When traffic shifts, a rest is over and a comparison begins anew: the kept share of the last 8 answers is then off that
    of those before by more than 4 standard errors."""

    def __init__(self):
        self.gains, self.kept = [], []
        self.resting, self.rest = 0, FIRST_REST

    def judge(self, kept, gain):
        """An answer more -> "better", "nothing gained", "rests", or "" while it is too early to say.

        kept: of the drafted tokens that were put to the test, the share that was kept; None if none was.
        gain: called unless the learner rests -> how many more tokens a round to expect of what serves than of the anchor."""
        if kept is not None:
            self.kept.append(kept)
        if self.shifted():
            self.__init__()
        if self.resting:
            self.resting -= 1
            return "rests"
        self.gains.append(gain())
        z = sum(self.gains) / max(1e-12, sum(d * d for d in self.gains)) ** 0.5
        if len(self.gains) < EARLIEST or NOT_BETTER <= z <= BETTER and len(self.gains) < PATIENCE:
            return ""
        self.gains = []
        if z > BETTER:
            self.rest = FIRST_REST
            return "better"
        self.resting, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)
        return "nothing gained"

    def shifted(self):
        before, now = torch.tensor(self.kept[:-RECENT]), torch.tensor(self.kept[-RECENT:])
        if len(before) < 2 * RECENT:
            return False
        error = before.std() * (1 / len(before) + 1 / RECENT) ** 0.5
        return bool((now.mean() - before.mean()).abs() > SHIFT * error.clamp(min=1e-3))


# ---- on disk -----------------------------------------------------------------------------------------


def save_learner(directory, served, learned, learner):
    """v000123/draft.pt, the learner's state beside it, then `latest`: what `latest` names is always whole."""
    name = f"v{learner.version:06d}"
    save(Path(directory) / name / "draft.pt", served.config, learned, {"version": learner.version, "kind": served.kind})
    torch.save(learner.state(), f"{directory}/learner.new")
    Path(f"{directory}/learner.new").replace(f"{directory}/{name}.learner.pt")
    Path(f"{directory}/latest.new").write_text(name + "\n")
    Path(f"{directory}/latest.new").replace(f"{directory}/latest")


def load_learner(directory, target):
    """-> the latest draft that --save kept there, or that of one version's directory; the learner's state, {} if lost."""
    if not (directory / "draft.pt").is_file():
        if not (directory / "latest").is_file():
            raise UserError(f"{directory} holds no `latest`: expected a directory that --save wrote")
        directory = directory / (directory / "latest").read_text(errors="replace").strip()
    draft, _ = load_draft(directory / "draft.pt", target)
    beside = directory.with_name(f"{directory.name}.learner.pt")
    if not beside.is_file():
        return draft, {}
    try:
        state = torch.load(beside, map_location="cpu", weights_only=True)
        return draft, {name: state[name] for name in ("optimizers", "weights", "averaged", "updates", "version")}
    except KeyError as error:
        raise UserError(f"{beside} lacks {error}: another version wrote it; delete it to go on from the draft alone") from None
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(f"{beside} cannot be read ({type(error).__name__})") from None
