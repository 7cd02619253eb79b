"""python -m bench.memory: what remembering costs, and how often it helps, with a full memory.

The memory holds --tokens bytes of the training texts of a class and is looked up at every place of
texts that it has not seen, as serving does before every round.  Lookups end where the longest match
is found, so what they take depends on the text: median and the 99th of a hundred.
"""

import argparse
import time
from statistics import mean, median

from tqdm import tqdm

from memory import LONGEST_MATCH, Memory
from support.command import command
from support.corpus import CLASSES, as_bytes, corpus
from support.options import whole

PROPOSED, PIECE = 16, 1024  # tokens of a guess; of a text


def pieces(stream, count):
    ids = stream[: count * PIECE].tolist()
    return [ids[i : i + PIECE] for i in range(0, len(ids) - PIECE + 1, PIECE)]


def fill(memory, texts):
    """-> seconds a token, of each text."""
    took = []
    for text in tqdm(texts, unit="text", leave=False, disable=None):
        start = time.perf_counter()
        memory.remember(text)
        took.append((time.perf_counter() - start) / len(text))
    return took


def look_up(memory, texts):
    """-> seconds of every lookup, the lengths of the matches, how many guessed tokens were right"""
    took, matches, right = [], [], []
    for text in tqdm(texts, unit="text", leave=False, disable=None):
        for end in range(LONGEST_MATCH, len(text) - PROPOSED):
            start = time.perf_counter()
            match, guess = memory.lookup(text[:end], PROPOSED)
            took.append(time.perf_counter() - start)
            matches.append(match)
            same = [a == b for a, b in zip(guess, text[end:])] + [False]
            right.append(same.index(False))
    return took, matches, right


def main():
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=whole(PIECE, 10**8), default=1_000_000, help="held")
    parser.add_argument("--texts", type=whole(1), default=24, help="that are looked up, a class")
    args, found = parser.parse_args(), corpus()
    print(f"{'':8s}{'remember us/token':>18s}{'lookup us':>11s}{'99th':>7s}{'bytes/token':>13s}"
          f"{'match':>7s}{'right of ' + str(PROPOSED):>13s}")
    for kind in CLASSES:
        memory = Memory(args.tokens)
        known = pieces(as_bytes(found[kind]["train"]), 2 * args.tokens // PIECE)
        remembered = fill(memory, known)
        took, matches, right = look_up(memory, pieces(as_bytes(found[kind]["eval"]), args.texts))
        took = sorted(took)
        print(f"{kind:8s}{1e6 * median(remembered):18.2f}{1e6 * median(took):11.1f}"
              f"{1e6 * took[int(0.99 * len(took))]:7.1f}{memory.bytes_held / args.tokens:13.1f}"
              f"{mean(matches):7.1f}{mean(right):13.2f}")


if __name__ == "__main__":
    command(main, "bench.memory")
