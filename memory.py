"""The memory: what was said before proposes what followed it then.

Learned at once, for nothing, and lossless: guesses are proposed outright, so draft_q is one-hot.
Production systems have shown how far that goes (SuffixDecoding 2411.04975).  Here it is the match
search of LZ77 and a vote.  A table leads from a hash of the last few tokens to the latest place
where they stood, and every place to the one before it; a handful of them are extended backwards.
The longest matches have a vote, and any that is long ENOUGH: the guess goes on with the token that
most of them went on with, then with the next of those that agreed, while at least half agree.

For example, of bytes: in "the cat sat. the cat" the last seven, "the cat", stood once before, and
what followed them was " sat".

A place is entered as soon as a token has followed it, so no text's own end is found.  A copy
that reaches the end of the text goes on with itself: "abcabc" is followed by "abcabc..".
"""

from array import array

SHORTEST_MATCH, LONGEST_MATCH = 3, 32  # tokens of a match: what is hashed, and where comparing ends
PLACES = 16  # compared at most, the latest ones
ENOUGH = 10  # tokens of a match; longer ones do not outvote it
BORDER = -1  # stands between texts: no token


class Memory:
    """Holds the last `capacity` tokens, 20 to 28 bytes each; older ones are written over."""

    def __init__(self, capacity):
        self.capacity, self.size = capacity, 0  # size: tokens ever put in
        self.tokens = array("i", [BORDER]) * capacity  # a ring: place % capacity
        self.before = array("q", [-1]) * capacity  # the last place of the same hash
        buckets = 1 << max(4, (capacity - 1).bit_length())
        self.latest = array("q", [-1]) * buckets
        self.mask = buckets - 1

    @property
    def bytes_held(self):
        return sum(x.itemsize * len(x) for x in (self.tokens, self.before, self.latest))

    def extend(self, tokens):
        """The text goes on with these."""
        ring, before, latest, capacity, size = (
            self.tokens, self.before, self.latest, self.capacity, self.size,
        )
        a, b, c = (ring[(size - n) % capacity] for n in (3, 2, 1))
        for token in tokens:
            key = self.hash(a, b, c)
            before[(size - 1) % capacity] = latest[key]  # what has been followed can be found
            latest[key] = size - 1
            ring[size % capacity] = token
            a, b, c, size = b, c, token, size + 1
        self.size = size

    def remember(self, text):
        """A whole text: nothing else follows it."""
        self.extend(text)
        self.tokens[self.size % self.capacity] = BORDER  # no token: nothing is entered
        self.size += 1

    def hash(self, a, b, c):
        return (a * 0x9E3779B1 ^ b * 0x85EBCA77 ^ c * 0xC2B2AE3D) >> 7 & self.mask

    def lookup(self, text, K):
        """text: a list of tokens -> how many of its last tokens stood here before, 0 or between
        SHORTEST_MATCH and LONGEST_MATCH, and at most K tokens to guess behind them."""
        matches = self.matches(text)
        longest = max((n for n, _ in matches), default=0)
        voters = [place for n, place in matches if n >= min(longest, ENOUGH)]
        return longest, self.followed(voters, K) if voters else []

    def matches(self, text):
        """Of the latest PLACES of its hash: (tokens that match, place), the latest first."""
        if len(text) < SHORTEST_MATCH:
            return []
        ring, capacity, oldest = self.tokens, self.capacity, max(0, self.size - self.capacity)
        longest, found = min(LONGEST_MATCH, len(text)), []
        place = self.latest[self.hash(*text[-SHORTEST_MATCH:])]
        for _ in range(PLACES):
            if place - SHORTEST_MATCH < oldest - 1:  # forgotten, or too near to what is
                break
            n = 0
            while n < longest and place - n >= oldest and (
                ring[(place - n) % capacity] == text[-1 - n]
            ):
                n += 1
            if n >= SHORTEST_MATCH:
                found.append((n, place))
            place = self.before[place % capacity]
        return found

    def followed(self, places, K):
        """At most K tokens from behind these places, the latest first, as they vote."""
        ring, capacity, last, tokens = self.tokens, self.capacity, self.size - 1, []
        for i in range(K):
            votes = {}
            for place in places:
                token = ring[(place + 1 + i % (last - place)) % capacity]
                votes.setdefault(token, []).append(place)
            token = max(votes, key=lambda token: len(votes[token]))  # of equals the latest's
            if token == BORDER or 2 * len(votes[token]) < len(places):
                break
            tokens.append(token)
            places = votes[token]
        return tokens
