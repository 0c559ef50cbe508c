"""Results of claims.sh -> RESULTS.md, between its <!-- claims --> marks, and assets/claims/*.png.

    python tests/claims/report.py

A cell is the mean over seeds ± their standard deviation. A comparison is paired by seed: it "holds" if the mean
difference is as claimed, and more than 2.92 of its standard errors (Student's one-sided 5% point at three seeds); if it
is as far the other way it "doesn't hold here"; else it is "too small to tell".
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/claims/results"
T95 = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13}  # one-sided 5% points of Student's t, by number of seeds
INK, GREY, COLORS = "#222222", "#bbbbbb", ("#1f5fbf", "#d1582b", "#2e8b57", "#8a4fb0")


def values(cell):
    """A number "network/measurement/key" -> {seed: value}, of the results that are there."""
    network, measurement, key = cell.split("/")
    found = {}
    for path in sorted((RESULTS / network).glob(f"{measurement}.*.json")):
        found[int(path.suffixes[-2][1:])] = json.loads(path.read_text())[key]
    return found


def spread(numbers):
    """Mean +- standard deviation, as text."""
    numbers = list(numbers)
    if not numbers:
        return "not measured"
    mean = statistics.mean(numbers)
    digits = 3 if abs(mean) >= 0.2 else 4
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def compare(a, b, sign):
    """a better than b, by seed (sign 1: higher is better, -1: lower) -> (verdict, text)."""
    a, b = values(a), values(b)
    gains = [sign * (a[seed] - b[seed]) for seed in a.keys() & b.keys()]
    if len(gains) < 2:
        return "not measured", "not measured"
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    sure = abs(mean) > T95[len(gains)] * error
    verdict = ("holds" if mean > 0 else "doesn't hold here") if sure else "too small to tell"
    right = sum(gain > 0 for gain in gains)
    return (
        verdict,
        f"better by {mean:.4f} ± {error:.4f} (standard error), in {right} of {len(gains)} seeds: **{verdict}**",
    )


def chart(path, title, x_title, y_title, series, references):
    """series {name: [(x label, [a value per seed])]}: a point per seed, and the means. references {name: y}."""
    scale, width, height = 2, 760, 400
    left, right, top, bottom = 70, 20, 58, 62
    image = Image.new("RGB", (scale * width, scale * height), "white")
    draw = ImageDraw.Draw(image)
    text = lambda x, y, words, size=13, fill=INK, **kwargs: draw.text(
        (scale * x, scale * y), words, fill=fill, font_size=scale * size, **kwargs
    )
    line = lambda points, fill, width=1: draw.line(
        [(scale * x, scale * y) for x, y in points], fill, round(scale * width)
    )
    labels = list(dict.fromkeys(label for points in series.values() for label, _ in points))
    numbers = [y for points in series.values() for _, ys in points for y in ys] + list(references.values())
    low, high = min(numbers), max(numbers)
    low = 0 if low < 0.6 * high else low - 0.15 * (high - low)
    high += 0.08 * (high - low)
    step = min((s * 10.0**e for e in range(-5, 4) for s in (1, 2, 5)), key=lambda s: abs((high - low) / s - 5))
    at_x = {label: left + (i + 0.5) * (width - left - right) / len(labels) for i, label in enumerate(labels)}
    at_y = lambda y: top + (high - y) / (high - low) * (height - top - bottom)
    tick = (int(low / step) + (low > 0)) * step
    while tick <= high:
        line([(left, at_y(tick)), (width - right, at_y(tick))], "#e4e4e4")
        text(left - 8, at_y(tick), f"{tick:.{max(0, -int(f'{step:e}'.split('e')[1]))}f}", anchor="rm")
        tick += step
    for name, y in references.items():
        for x in range(left, width - right, 10):
            line([(x, at_y(y)), (x + 5, at_y(y))], "#777777", 1.5)
        text(width - right - 2, at_y(y) - 3, name, 12, "#555555", anchor="rb")
    for i, (name, points) in enumerate(series.items()):
        shift = 14 * (i - (len(series) - 1) / 2)
        means = [(at_x[label] + shift, at_y(statistics.mean(ys))) for label, ys in points if ys]
        if x_title:  # an order: worth a line
            line(means, COLORS[i], 2)
        for label, ys in points:
            for k, y in enumerate(ys):
                x = at_x[label] + shift + 5 * (k - (len(ys) - 1) / 2)
                draw.ellipse(
                    [scale * (x - 3.5), scale * (at_y(y) - 3.5), scale * (x + 3.5), scale * (at_y(y) + 3.5)], COLORS[i]
                )
        for x, y in means:
            line([(x - 14, y), (x + 14, y)], COLORS[i], 2)
        text(width - right - 170 * (len(series) - 1 - i), 20, name, 13, COLORS[i], anchor="rm")
    line([(left, top), (left, height - bottom), (width - right, height - bottom)], INK)
    for label, x in at_x.items():
        text(x, height - bottom + 7, label, 13, anchor="ma", align="center")
    text((left + width) / 2, height - 8, x_title, anchor="ms")
    text(left - 58, 10, title, 15)
    text(left - 58, 38, y_title, 13, "#555555", anchor="lm")
    path.parent.mkdir(exist_ok=True)
    image.resize((width, height), Image.LANCZOS).save(path, optimize=True)


@dataclass
class Claim:
    """One section of the report. A cell is "network/measurement/key"."""

    title: str
    paper: str
    columns: list
    rows: list
    """(label, a cell for each column)."""
    comparisons: list
    """(what is claimed, a cell that should be better, the other, 1 if higher is better, else -1)."""
    figure: tuple
    """(x title, y title, {series: [(x label, cell)]}, {reference: cell})."""
    remark: str = ""
    """What we make of it, written by hand after the numbers."""


def section(number, claim):
    """A claim's lines in RESULTS.md; draws its figure."""
    verdicts, lines = [], []
    for words, *pair in claim.comparisons:
        verdict, text = compare(*pair)
        verdicts.append(verdict)
        lines.append(f"- {words}: {text}")
    overall = (
        verdicts[0] if len(set(verdicts)) == 1 else f"holds in {verdicts.count('holds')} of {len(verdicts)} comparisons"
    )
    head = [f"### {number}. {claim.title}: {overall}", "", f"The paper: {claim.paper}", ""]
    table = [f"| | {' | '.join(claim.columns)} | n |", "| --- " * (len(claim.columns) + 2) + "|"]
    for label, *cells in claim.rows:
        found = [values(cell).values() for cell in cells]
        table.append(f"| {label} | {' | '.join(map(spread, found))} | {min(map(len, found))} |")
    x_title, y_title, series, references = claim.figure
    series = {name: [(x, list(values(cell).values())) for x, cell in points] for name, points in series.items()}
    references = {name: statistics.mean(found) for name, cell in references.items() if (found := values(cell).values())}
    path = ROOT / f"assets/claims/{number}.png"
    picture = []
    if any(ys for points in series.values() for _, ys in points):
        chart(path, claim.title, x_title, y_title, series, references)
        picture = [f"![{claim.title}](assets/claims/{path.name})", ""]
    end = [claim.remark, ""] if claim.remark else []
    return head + table + ["", *picture, *lines, "", f"`tests/claims/claims.sh {number}`", "", *end]


CLAIMS = []


def main():
    lines = ["<!-- claims -->", ""]
    for number, claim in enumerate(CLAIMS, 1):
        lines += section(number, claim)
    path = ROOT / "RESULTS.md"
    text = path.read_text()
    before, after = text.split("<!-- claims -->")[0], text.split("<!-- /claims -->")[1]
    path.write_text(before + "\n".join(lines) + "<!-- /claims -->" + after)


if __name__ == "__main__":
    main()
