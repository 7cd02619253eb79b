"""python -m bench.picture LINES.jsonl > docs/shift.svg: what bench.arms --json kept, as a picture.

Speed over plain decoding, request by request: for each arm the tokens of a running window of
requests, all seeds together, over their seconds, divided by the same of the plain arm.
"""

import argparse
import json
from html import escape

from bench.arms import total
from model import UserError
from support.command import command

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 380, 46, 190, 34, 30  # pixels
COLOURS = ("#8a8f98", "#2f6fb0", "#3aa0a0", "#c98a1b", "#c23b5a")
TEXT = 'font-family="sans-serif" font-size="12" fill="#7a7f87"'


def running(lines, window):
    """Lines of one arm -> tokens a second of every window of requests, one number a request."""
    last = 1 + max(line["place"] for line in lines)
    out = []
    for place in range(last):
        near = [line for line in lines if place - window < line["place"] <= place]
        out.append(total(near, "tokens") / total(near, "seconds"))
    return out


def placed(lines):
    """Numbers the requests of a seed in the order in which they were served."""
    seen = {}
    for line in lines:
        key = line["seed"], line["arm"]
        line["place"] = seen[key] = seen.get(key, -1) + 1
    return lines


def svg(lines, window):
    lines = placed(lines)
    arms = [arm for arm in dict.fromkeys(x["arm"] for x in lines) if arm != "plain"]
    by_arm = {arm: [x for x in lines if x["arm"] == arm] for arm in (*arms, "plain")}
    speed = {arm: running(mine, window) for arm, mine in by_arm.items()}
    ratios = {arm: [a / b for a, b in zip(speed[arm], speed["plain"])] for arm in arms}
    count, top = len(speed["plain"]), max(max(r) for r in ratios.values()) * 1.05
    low = min(0.9, min(min(r) for r in ratios.values()))

    def x(place):
        return LEFT + place * (WIDTH - LEFT - RIGHT) / max(1, count - 1)

    def y(ratio):
        return HEIGHT - BOTTOM - (ratio - low) * (HEIGHT - TOP - BOTTOM) / (top - low)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
           f'<text x="{LEFT}" y="16" {TEXT}>speed over plain decoding, request by request</text>']
    for tenths in range(5 * -(-int(low * 10) // 5), int(top * 10) + 1, 5):
        height, bold = y(tenths / 10), 1.2 if tenths == 10 else 0.4
        out.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#9aa0a8" '
                   f'stroke-width="{bold}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end" {TEXT}>'
                   f"{tenths / 10:.1f}</text>")
    of_plain = [line for line in by_arm["plain"] if line["seed"] == lines[0]["seed"]]
    for before, line in zip([None, *of_plain], of_plain):
        if before is None or before["class"] != line["class"]:
            out.append(f'<path d="M{x(line["place"]):.1f} {TOP}V{HEIGHT - BOTTOM}" '
                       'stroke="#9aa0a8" stroke-dasharray="3 4"/>')
            out.append(f'<text x="{x(line["place"]) + 6:.1f}" y="{HEIGHT - 10}" {TEXT}>'
                       f"{escape(line['class'])}</text>")
    labels = sorted(arms, key=lambda arm: -ratios[arm][-1])
    heights = []
    for arm in labels:  # from the top down, at least 16 pixels apart
        wanted = y(ratios[arm][-1])
        heights.append(max(wanted, heights[-1] + 16) if heights else wanted)
    for arm, height in zip(labels, heights):
        colour = COLOURS[arms.index(arm) % len(COLOURS)]
        points = " ".join(f"{x(i):.1f},{y(r):.1f}" for i, r in enumerate(ratios[arm]))
        bold = 3 if arm == "both" else 1.6
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                   f'stroke-width="{bold}" stroke-linejoin="round"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 10}" y="{height + 4:.1f}" font-family="sans-serif" '
                   f'font-size="13" fill="{colour}">{ratios[arm][-1]:.2f}  {escape(arm)}</text>')
    return "\n".join([*out, "</svg>"])


def main():
    parser = argparse.ArgumentParser(prog="bench.picture", description=__doc__.split("\n")[0])
    parser.add_argument("lines", metavar="LINES.jsonl")
    parser.add_argument("--window", type=int, default=8, help="requests")
    args = parser.parse_args()
    try:
        with open(args.lines) as file:
            lines = [json.loads(line) for line in file]
        print(svg(lines, args.window))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{args.lines}: no lines of bench.arms --json: {error}") from None


if __name__ == "__main__":
    command(main, "bench.picture")
