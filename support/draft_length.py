"""Which draft a round takes, and how long its chain: a contextual bandit on tokens per second.

The arms are (source, K): plain decoding, the head, what followed in this request's own text, what
followed in what others said.  The context is the length of the memory's match.  The reward is

    (1 + S_1 + .. + S_K) / seconds(source, K),    S_k the chance that k tokens or more are accepted,

S from counts for each source, bucket of match length and place, fading, seconds as measured when
the run began.  Counts fade towards PRIOR whenever their source is on offer: that is the probing.
An arm that does not pay is tried again when what spoke against it has faded, which loses some
PRIOR * WEIGHT * (1 - FADE) of the time of plain rounds, a third of a percent, however bad it is.
A place that always fails keeps S_1 >= PRIOR * WEIGHT / (WEIGHT + 1 / (1 - FORGET)) = 0.03, so a
drafted token that costs less than 0.03 plain rounds is tried in every round.  What was seen of the
head also counts less with every answer: another text.

The head knows how sure it is.  After k tokens that it gives probability c together, going on to m
adds c (S_{k+1} + .. + S_m) / S_k tokens to expect and takes seconds[m] - seconds[k]; it stops when
no m is worth its time at the best rate there is.  What such rounds make is counted as it is.
"""

from dataclasses import dataclass, field

PLAIN, HEAD, REQUEST, SHARED = "plain", "head", "request", "shared"
LONGEST = {HEAD: 8, REQUEST: 16, SHARED: 16}  # drafted tokens a round
PRIOR, WEIGHT = 0.7, 5.0  # acceptance of a place before anything is known, worth so many tests
FADE, FORGET, ANSWER = 0.999, 0.99, 0.7  # a round on offer; a test of the same place; an answer
GUESSED, MORE = 10, 1.1  # rounds for which stopping early is believed to make a tenth more
BUCKETS = (4, 6, 8, 12, 16, 24, 32)  # of match lengths


@dataclass
class Plan:
    """What a round does: at most K tokens from `source`."""

    source: str = PLAIN
    K: int = 0
    floors: list = field(default_factory=list)  # K confidences, below which the head stops
    match: int = 0  # the length of the memory's


class FixedLength:
    """Always K tokens from one source."""

    def __init__(self, K, source=HEAD):
        self.plan = Plan(source if K else PLAIN, K, [0.0] * K)

    def begin(self):
        pass

    def choose(self, guesses):
        return self.plan

    def observe(self, plan, drafted, accepted):
        pass

    def __str__(self):
        return f"K = {self.plan.K}"


class Places:
    """How often each place of a chain is accepted, given that those before it were."""

    def __init__(self, longest):
        self.kept, self.tested = [0.0] * longest, [0.0] * longest

    def survival(self):
        """S_1, S_2, ..; a place that was hardly reached is taken to be as the one before it."""
        a, S, out = PRIOR, 1.0, []
        for kept, tested in zip(self.kept, self.tested):
            a = (kept + WEIGHT * a) / (tested + WEIGHT)
            S *= a
            out.append(S)
        return out

    def observe(self, drafted, accepted):
        for j in range(min(accepted + 1, drafted)):
            self.kept[j] = FORGET * self.kept[j] + (j < accepted)
            self.tested[j] = FORGET * self.tested[j] + 1

    def fade(self, factor):
        self.kept = [factor * x for x in self.kept]
        self.tested = [factor * x for x in self.tested]


class DraftLength:
    """seconds: {HEAD: of rounds with 0, 1, .. tokens, REQUEST: likewise}; either may be missing."""

    def __init__(self, seconds):
        self.seconds = dict(seconds)
        if REQUEST in seconds:
            self.seconds[SHARED] = seconds[REQUEST]
        self.plain = min(times[0] for times in seconds.values())
        self.places = {}  # (source, bucket) -> Places
        self.offered = []  # this round's Places
        self.tokens = self.spent = 0.0  # of the head's rounds, fading

    def begin(self):
        """Another answer is another text, and other weights may serve: what was seen of the head
        counts less, so that after text that was too hard for it a good one is soon tried again."""
        self.tokens, self.spent = ANSWER * self.tokens, ANSWER * self.spent
        self.of(HEAD).fade(ANSWER)

    def of(self, source, match=0):
        bucket = sum(match >= least for least in BUCKETS)
        return self.places.setdefault((source, bucket), Places(LONGEST[source]))

    def rates(self, source, match=0):
        """Tokens per second of K = 1, 2, .. tokens from this source."""
        made, out = 1.0, []
        for S, seconds in zip(self.of(source, match).survival(), self.seconds[source][1:]):
            made += S
            out.append(made / seconds)
        return out

    def choose(self, guesses):
        """guesses: {source: (length of the match, tokens)} of the memory -> Plan."""
        best, plan = 1 / self.plain, Plan()
        self.offered = [self.of(source, match) for source, (match, _) in guesses.items()]
        for source, (match, tokens) in guesses.items():
            for K, rate in enumerate(self.rates(source, match)[: len(tokens)], start=1):
                if rate > best:
                    best, plan = rate, Plan(source, K, match=match)
        if HEAD in self.seconds:
            self.offered.append(self.of(HEAD))
            rate = self.head_rate()
            if rate > best:
                plan = Plan(HEAD, LONGEST[HEAD], self.floors(rate))
        return plan

    def head_rate(self):
        """Tokens per second of rounds of the head that stop by confidence."""
        fixed = self.rates(HEAD)
        K = max(range(len(fixed)), key=fixed.__getitem__)
        guessed = GUESSED * self.seconds[HEAD][K + 1]
        return (MORE * fixed[K] * guessed + self.tokens) / (guessed + self.spent)

    def floors(self, rate):
        """Confidences c after k = 1, 2, .. tokens below which no m > k is worth its time:
        c (S_{k+1} + .. + S_m) / S_k < rate (seconds[m] - seconds[k])."""
        S, t, floors = self.of(HEAD).survival(), self.seconds[HEAD], []
        for k in range(1, len(S)):
            worth = [
                (t[m] - t[k]) * S[k - 1] / max(1e-9, sum(S[k:m])) for m in range(k + 1, len(S) + 1)
            ]
            floors.append(rate * min(worth))
        return floors + [0.0]

    def observe(self, plan, drafted, accepted):
        """A round went by the plan; of each row, the tokens drafted and accepted."""
        for places in self.offered:
            places.fade(FADE)
        self.tokens, self.spent = FADE * self.tokens, FADE * self.spent
        for K, n in zip(drafted, accepted):
            if plan.source == HEAD and K:
                self.tokens = FORGET * self.tokens + n + 1
                self.spent = FORGET * self.spent + self.seconds[HEAD][K]
            if plan.source != PLAIN:
                self.of(plan.source, plan.match).observe(K, n)

    def __str__(self):
        parts = []
        for source in (HEAD, REQUEST):
            if source in self.seconds:
                times = self.seconds[source]
                ratios = ", ".join(f"{times[K] / self.plain:.2f}" for K in (1, 4, 8))
                name = "the head" if source == HEAD else "the memory"
                parts.append(f"{ratios} plain tokens from {name}")
        return f"a token takes {1e3 * self.plain:.1f} ms; a round of 1, 4, 8 " + ", ".join(parts)
