"""The gate: does what was learned serve, and is learning worth going on with?

Two drafts: what *began*, and what is *learned* by now.  On every new answer, before anything is
learned from it, the expected tokens a round of both are computed on the same text.  Their paired
differences d have little noise, and their sum, older ones counting less by f = FORGET an answer, is
standardised (d_0 is the latest):

    z = sum_i f^i d_i / sqrt(sum_i f^2i d_i^2),    about standard normal where the two are equal.

Whichever is ahead (z > 0) serves.  Clearly behind (z < -2.5, after 8 answers at least), what was
learned is dropped for what began, and the learner pauses.
"""

FORGET = 0.98  # a difference counts half after 34 answers
BEHIND, EARLIEST = -2.5, 8  # standard errors; answers
PAUSE = 64  # answers


class Gate:
    def __init__(self):
        self.total = self.square = 0.0
        self.mean = self.z = 0.0  # tokens a round; standard errors
        self.answers, self.paused = 0, 0

    @property
    def ahead(self):
        return self.z > 0

    def judge(self, difference):
        """difference: the tokens a round expected of what is learned minus those of what began, on
        one more answer -> whether to drop what is learned; then all counts start anew."""
        self.total = FORGET * self.total + difference
        self.square = FORGET**2 * self.square + difference**2
        self.z, self.answers = self.total / max(self.square, 1e-24) ** 0.5, self.answers + 1
        self.mean = self.total * (1 - FORGET) / (1 - FORGET**self.answers)
        if self.answers < EARLIEST or self.z > BEHIND:
            return False
        self.total = self.square = 0.0  # mean and z stay, as the reason
        self.answers, self.paused = 0, PAUSE
        return True
