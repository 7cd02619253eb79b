"""The memory against a search that looks everywhere, and against texts meant to break it."""

import random
import sys
import time
from collections import Counter

import pytest

from memory import BORDER, ENOUGH, LONGEST_MATCH, PLACES, SHORTEST_MATCH, Memory


def matched(history, place, text):
    """How many of the last tokens of the text stand in the history, the last of them at place."""
    n = 0
    while n < min(LONGEST_MATCH, len(text), place + 1) and history[place - n] == text[-1 - n]:
        n += 1
    return n


def searched(history, text, K, places=None):
    """What a lookup is to find in all of this history, by looking everywhere."""
    ends = [p for p in range(len(history) - 1) if history[p + 1] != BORDER]
    matches = [(matched(history, p, text), p) for p in reversed(ends)]
    matches = [(n, p) for n, p in matches if n >= SHORTEST_MATCH][:places]
    longest = max([0] + [n for n, _ in matches])
    copies = [history[p + 1 :] for n, p in matches if n >= min(longest, ENOUGH)]
    guess = []
    while copies and len(guess) < K:
        said = [copy[len(guess) % len(copy)] for copy in copies]
        token, votes = Counter(said).most_common(1)[0]  # of equals the first: the latest
        if token == BORDER or votes < len(said) / 2:
            break
        guess.append(token)
        copies = [copy for copy, t in zip(copies, said) if t == token]
    return longest, guess


def remembered(texts, capacity=4096):
    memory = Memory(capacity)
    for text in texts:
        memory.remember(list(text))
    return memory


def test_the_example_of_the_docstring():
    memory, text = Memory(64), list(b"the cat sat. the cat")
    memory.extend(text)
    length, tokens = memory.lookup(text, 4)
    assert (length, bytes(tokens)) == (len("the cat"), b" sat")


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_matches_are_found_and_vote(seed):
    """As by looking everywhere: texts of three symbols, in which all that is short is said often.
    4096 buckets keep their 27 triples apart, so PLACES of the same triple are compared."""
    draws, lengths = random.Random(seed), set()
    for _ in range(150):
        memory, text = Memory(4096), []
        while len(text) < 120:
            new = draws.choices(range(3), k=draws.randint(1, 40))
            if len(text) > 20 and draws.random() < 0.3:
                start = draws.randrange(len(text) - 10)
                new = text[start : start + draws.randint(3, 40)]
            memory.extend(new)
            text += new
            K = draws.randint(1, 20)
            found = memory.lookup(text, K)
            assert found == searched(text, text, K, PLACES)
            lengths.add(found[0])
    assert {0, SHORTEST_MATCH, LONGEST_MATCH} <= lengths


def test_most_votes_count_and_of_equals_the_latest():
    text = list(b"in the r")
    assert remembered([b"in the red", b"in the red", b"in the rod"]).lookup(text, 4) == (
        8, list(b"ed"))
    assert remembered([b"in the red", b"in the rod"]).lookup(text, 4) == (8, list(b"od"))


def test_a_guess_ends_where_fewer_than_half_agree():
    memory = remembered([b"abcdx", b"abcdy", b"abcdz"])
    assert memory.lookup(list(b"abc"), 4) == (3, list(b"d"))
    assert memory.lookup(list(b"abcd"), 4) == (4, [])


def test_what_is_long_enough_is_not_outvoted_by_what_is_longer():
    text = list(b"0123456789ab")
    for length, said in ((ENOUGH, b"y"), (ENOUGH - 1, b"x")):
        others = [b"-" + bytes(text[-length:]) + b"y"] * 2
        assert remembered([bytes(text) + b"x", *others]).lookup(text, 1) == (12, list(said))


def test_others_texts_are_searched_for_the_end_of_this_one():
    memory = remembered([b"one two three", b"nine two four"])
    assert memory.lookup(list(b"ten two "), 4) == (5, list(b"four"))  # of equals the latest
    assert memory.lookup(list(b"one two "), 5) == (8, list(b"three"))  # the longest before it
    assert memory.lookup(list(b"one two"), 0) == (7, [])
    assert memory.lookup(list(b"xyz"), 4) == memory.lookup(list(b"tw"), 4) == (0, [])


def test_a_copy_goes_on_with_itself():
    memory = Memory(64)
    memory.extend(list(b"abcabc"))
    assert memory.lookup(list(b"abcabc"), 8) == (3, list(b"abcabcab"))
    memory = Memory(64)
    memory.extend(list(b"aaaa"))
    assert memory.lookup(list(b"aaaa"), 5) == (3, list(b"aaaaa"))


def test_a_text_does_not_find_its_own_end():
    memory = Memory(64)
    memory.extend(list(b"abc"))
    assert memory.lookup(list(b"abc"), 4) == (0, [])
    memory.extend(list(b"d"))
    assert memory.lookup(list(b"abc"), 4) == (3, list(b"dddd"))


def test_nothing_is_read_across_a_border():
    """No match reaches back over one, and no copy goes on behind one, though it be the last."""
    memory = remembered([b"xxab", b"cdef"])
    assert memory.lookup(list(b"abcd"), 4) == (0, [])
    assert memory.lookup(list(b"xabcde"), 4) == (3, list(b"f"))
    assert memory.lookup(list(b"xxab"), 4) == memory.lookup(list(b"cdef"), 4) == (0, [])


def test_a_text_that_ended_does_not_hide_one_that_went_on():
    memory = remembered([b"abcde", b"xxabc"])
    assert memory.lookup(list(b"xxabc"), 4) == (3, list(b"de"))


@pytest.mark.parametrize("capacity", [64, 65, 200, 256])
def test_the_oldest_is_forgotten_and_nothing_else(capacity):
    """Over some thirty turns of the ring: as by looking everywhere in the last `capacity` tokens.
    Phrases come back about as often as the ring turns, so many have just been written over."""
    draws = random.Random(capacity)
    phrases = [draws.choices(range(50), k=9) for _ in range(capacity // 12)]
    memory, history, found = Memory(capacity), [], []
    while len(history) < 30 * capacity:
        text = [token for _ in range(3) for token in draws.choice(phrases)]
        memory.remember(text)
        history += [*text, BORDER]
        for phrase in draws.choices(phrases, k=3):
            for cut in (3, 5, 9):
                looked = memory.lookup(phrase[:cut], 8)
                assert looked == searched(history[-capacity:], phrase[:cut], 8)
                found.append(looked[0] == cut)
    assert 0.2 < sum(found) / len(found) < 0.95  # some are there, some are forgotten


def test_one_long_text_in_a_small_ring():
    """Copies that go on with themselves stay within what has not been written over."""
    draws, memory, text = random.Random(0), Memory(64), []
    for _ in range(3000):
        start = max(0, len(text) - draws.randint(1, 90))
        new = text[start : start + draws.randint(1, 12)] if draws.random() < 0.5 else []
        new = new or draws.choices(range(50), k=4)
        memory.extend(new)
        text = text + new
        assert memory.lookup(text, 16) == searched(text[-64:], text, 16)


def test_no_match_goes_on_where_the_ring_was_written_over():
    """Before the oldest token stands the newest, which did not come before it."""
    for size in (64, 64 + 7):
        memory, text = Memory(64), list(range(100, 100 + size))
        memory.extend(text)
        newest, first = text[-1], text[-64:][:4]
        assert memory.lookup([newest, *first[:3]], 1) == (3, first[3:])
        assert memory.lookup([newest, *first[:2]], 1) == (0, [])


def test_a_million_tokens_take_no_more_room_than_the_first_ten_thousand():
    memory, draws = Memory(10_000), random.Random(0)
    sizes = []
    for _ in range(100):
        memory.remember(draws.choices(range(1000), k=10_000))
        arrays = [x for x in vars(memory).values() if hasattr(x, "__len__")]
        sizes.append(sum(map(sys.getsizeof, arrays)))
    assert max(sizes) == sizes[0] and sizes[0] <= 28.5 * 10_000
    assert memory.size > 1_000_000


def test_a_long_text_of_one_byte_is_looked_up_in_no_time():
    """Every place is a match there: PLACES of them are compared at most, not all the million."""
    memory, text = Memory(1 << 18), [0] * (1 << 18)
    memory.extend(text)
    start = time.perf_counter()
    for _ in range(200):
        assert memory.lookup(text[-100:], 16) == (LONGEST_MATCH, [0] * 16)
        assert memory.lookup([1] * 97 + [0, 0, 0], 16) == (SHORTEST_MATCH, [0] * 16)
    assert time.perf_counter() - start < 2  # 0.02 s; some minutes if all were compared


def colliding(memory, count):
    """Different triples that share a bucket with (1, 2, 3)."""
    key, found, i = memory.hash(1, 2, 3), [], 10
    while len(found) < count:
        if memory.hash(i, i + 1, i + 2) == key:
            found.append([i, i + 1, i + 2])
        i += 3
    return found


def test_what_shares_a_bucket_is_not_taken_for_the_same():
    """A few such triples hide nothing, too many hide what is older, none is ever proposed."""
    memory = Memory(4096)
    others = colliding(memory, PLACES)
    memory.remember([1, 2, 3, 4, 5])
    for other in others[:-1]:
        memory.remember([*other, 7])
    assert memory.lookup([1, 2, 3], 4) == (3, [4, 5])
    memory.remember([*others[-1], 7])
    assert memory.lookup([1, 2, 3], 4) == (0, [])
    assert memory.lookup(others[-1], 4) == (3, [7])


def test_tokens_of_a_large_vocabulary():
    text = [2**31 - 1, 0, 2**31 - 2, 150_000, 2**31 - 1, 0, 2**31 - 2]
    memory = Memory(64)
    memory.extend(text)
    assert memory.lookup(text, 1) == (3, [150_000])
