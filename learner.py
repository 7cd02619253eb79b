"""The learner: one answer after the other, each a trace, teaches the draft that serves the next.

Letters: R rounds, K drafted tokens a round, V vocabulary.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch

from model import UserError
from rl import acceptance, policy_gradient_loss
from support.gate import Gate
from support.optimizers import muon_and_adamw
from support.trace import give_back, of_answer, of_rounds


@torch.no_grad()
def expected_length(draft, trace, target_head, K, rule, most=48):
    """Tokens a round to expect of a draft in chains of K that start all over this answer."""
    answer = len(trace.ids) - trace.prompt_length
    places = torch.arange(0, answer, -(-answer // most), device=trace.ids.device)
    logits, target_logits, tokens = of_answer(trace, draft, target_head, K, places)
    logits = trace.sampling().filter(logits)  # as it would serve
    kept = acceptance(logits, target_logits, tokens, trace.temperature, rule)
    return 1 + kept.cumprod(0).sum().item()


@dataclass
class Outcome:
    """What the learner made of one answer."""

    expected_length: float  # tokens a round on it, of the newest draft, before learning from it
    began: float = 0.0  # the same of what learning began with
    learned: float = 0.0  # and of what was learned by then
    mean: float | None = None  # of learned - began, by the gate; None: it was not asked
    z: float | None = None
    dropped: bool = False  # what was learned, by the gate
    steps: int = 0
    loss: float | None = None  # of the first step; None: none was due, or the learner pauses
    norm: float | None = None  # of the last step's gradient, before it was clipped
    version: int = 0
    weights: dict | None = None  # to serve from now on, if they are others
    serves: str = "began"  # or "learned"
    seconds: float = 0.0
    judging: float = 0.0  # seconds of them
    held: float = 0.0  # megabytes at most, by the learner's process; 0: it is this one


class Learner:
    """Learns from one answer after the other.  Three drafts: `draft` takes the steps; `average` is
    an exponential average of its weights over some `horizon` steps, in place of a learning rate
    that falls, which would need an end of training (Polyak & Juditsky 1992); `began` is what
    learning started from, kept over --save.  The gate says which of the last two serves.

    There is a step for every `every` tokens of answers, so that learning takes about the same share
    of the time whether they are long or short.  A step is on `batch` traces: the new one (in the
    first step of an update) and others drawn from the last `recent`.  A trace teaches by the
    target's own tokens, in chains of `chain` that start at `places` places of the answer drawn at
    random, and, with learn_from="both", by the draft's own proposals, kept and rejected.

    fresh: the draft begins with random weights, so at first its average spans the last third of the
    steps, with weight 3 / (n + 2) for step n."""

    def __init__(self, draft, target_head, estimator="expected", rule="block", lr=0.02, every=96,
                 chain=5, learn_from="target", fresh=False, gate=True, places=96, batch=3,
                 recent=32, horizon=60, precision=torch.float32, seed=0):
        self.draft, self.target_head = draft, target_head
        self.estimator, self.rule = estimator, rule
        self.every, self.chain, self.learn_from, self.places = every, chain, learn_from, places
        self.batch, self.horizon, self.precision = batch, horizon, precision
        self.average, self.began = draft.clone(), draft.clone()
        self.averaged = 0 if fresh else 3 * horizon  # n; here the weight is 1 / horizon already
        self.optimizers = muon_and_adamw(draft, lr)
        self.recent, self.gate, self.gated = deque(maxlen=recent), Gate(), gate
        self.version, self.waiting = 0, 0  # tokens since the last step
        self.first = 0  # no version has a lower number than this: those are given
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def serves(self):
        return self.average if self.gate.ahead or not self.gated else self.began

    def update(self, trace):
        """One more answer -> Outcome.  Raises UserError if learning diverges; what serves stays."""
        start, served = time.perf_counter(), self.serves
        with self.replaying(trace.ids.device):
            learned = expected_length(self.average, trace, self.target_head, self.chain, self.rule)
            began = expected_length(self.began, trace, self.target_head, self.chain, self.rule)
        outcome = Outcome(learned if served is self.average else began, began, learned)
        outcome.judging = time.perf_counter() - start
        if self.gate.paused:
            self.gate.paused -= 1
        else:
            if self.gated:
                outcome.dropped = self.gate.judge(learned - began)
                outcome.mean, outcome.z = self.gate.mean, self.gate.z
            if outcome.dropped:
                self.go_back(self.began)
            else:
                self.learn(trace, outcome)
        self.recent.append(trace)
        if self.serves is not served or self.serves is self.average and outcome.steps:
            self.version = max(self.version + 1, self.first)
            outcome.weights = self.serves.state_dict()
        outcome.serves = "learned" if self.serves is self.average else "began"
        outcome.version, outcome.seconds = self.version, time.perf_counter() - start
        return outcome

    def learn(self, trace, outcome):
        """The steps that are due, none if there are too few tokens; outcome says how they went."""
        tokens = len(trace.ids) - trace.prompt_length
        steps, self.waiting = divmod(self.waiting + tokens, self.every)
        for step in range(steps):
            order = torch.randperm(len(self.recent), generator=self.generator)
            drawn = [self.recent[i] for i in order]
            traces = (drawn if step and drawn else [trace, *drawn])[: self.batch]
            for example in traces:
                with self.replaying(example.ids.device):
                    loss = self.loss(example)
                (loss / len(traces)).backward()
                outcome.loss = loss.item() if outcome.loss is None else outcome.loss
            norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
            for optimizer in self.optimizers if norm.isfinite() else ():
                optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            largest = max(p.detach().abs().max() for p in self.draft.parameters())
            if not (norm.isfinite() and largest < 1e6):  # NaN is not less
                self.recent.clear()  # one of them may be to blame
                self.go_back(self.average)
                raise UserError("learning diverged: a gradient is not finite, or the weights have "
                                "left the numbers; lower --lr")
            outcome.steps, outcome.norm = step + 1, norm.item()
            self.averaged += 1
            weight = max(1 / self.horizon, 3 / (self.averaged + 2))
            with torch.no_grad():
                for mean, p in zip(self.average.parameters(), self.draft.parameters()):
                    mean.lerp_(p, weight)

    def loss(self, trace):
        here = trace, self.draft, self.target_head
        places = torch.arange(len(trace.ids) - trace.prompt_length, device=trace.ids.device)
        sides = [("target", of_answer(*here, self.chain, self.some(places)))]
        if self.learn_from == "both" and trace.drafted().any():
            rounds = self.some(trace.drafted().nonzero()[:, 0])
            sides.append((trace.behaviour[rounds], of_rounds(*here, rounds)))
        total, count = 0.0, 0
        for behaviour, (logits, target_logits, tokens) in sides:
            logits = give_back(logits, target_logits, trace)
            loss = policy_gradient_loss(logits, target_logits, tokens, trace.temperature,
                                        self.estimator, behaviour, self.rule)
            total, count = total + len(tokens) * loss, count + len(tokens)
        return total / count

    def some(self, places):
        """At most self.places of these, drawn without looking at what happened there."""
        order = torch.randperm(len(places), generator=self.generator)[: self.places]
        return places[order.sort().values.to(places.device)]

    def replaying(self, device):
        """Products in bfloat16 where they are faster; weights, losses and steps stay float32."""
        return torch.autocast(device.type, torch.bfloat16, self.precision == torch.bfloat16)

    def go_back(self, draft):
        """Learning goes on from these weights, with fresh optimizers."""
        for module in (self.draft, self.average):
            module.load_state_dict(draft.state_dict())
        for optimizer in self.optimizers:
            optimizer.state.clear()
            optimizer.zero_grad()

    def state(self):
        """What a resumed learner needs; no trace: those are users' text."""
        drafts = {name: getattr(self, name).state_dict() for name in ("draft", "average", "began")}
        numbers = {"gate": vars(self.gate), "averaged": self.averaged, "version": self.version,
                   "waiting": self.waiting}
        return drafts | numbers | {"optimizers": [o.state_dict() for o in self.optimizers]}

    def restore(self, state):
        """What state() gave.  Raises KeyError, ValueError or the like if it is another's."""
        numbers = *state["gate"].values(), state["averaged"], state["version"], state["waiting"]
        if not all(type(x) in (int, float) for x in numbers):
            raise ValueError("numbers")
        if not all(p.isfinite().all() for p in state["average"].values()):
            raise ValueError("weights")
        for name in ("draft", "average", "began"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            rate = optimizer.param_groups[0]["lr"]  # this run's
            optimizer.load_state_dict(saved)
            optimizer.param_groups[0]["lr"] = rate
        vars(self.gate).update(state["gate"])
        self.averaged, self.version = state["averaged"], state["version"]
        self.waiting = state["waiting"]
