"""Results of claims.sh -> RESULTS.md, between its <!-- claims --> marks, and assets/claims/*.png.

    python tests/claims/report.py

A cell is the mean over seeds ± their standard deviation. A comparison is paired by seed: it "holds" if the mean
difference is as claimed, and more than 2.92 of its standard errors (Student's one-sided 5% point at three seeds); if it
is as far the other way it "doesn't hold here"; else it is "too small to tell".
"""

import json
import statistics
import textwrap
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
        words = "\n".join(textwrap.wrap(label, max(6, (width - left - right) // len(labels) // 7)))
        text(x, height - bottom + 7, words, 12, anchor="ma", align="center")
    text((left + width) / 2, height - 8, x_title, anchor="ms")
    text(left - 58, 10, title, 15)
    text(left - 58, 38, y_title, 13, "#555555", anchor="lm")
    path.parent.mkdir(exist_ok=True)
    image.resize((width, height), Image.LANCZOS).save(path, optimize=True)


@dataclass
class Claim:
    """One section. Tables are lines "words = path"; a cell's path, row + column, is network/measurement/key."""

    title: str
    paper: str
    columns: str
    rows: str
    comparisons: str
    """Lines "words: path < path" (or >): what is claimed of each seed."""
    y: str
    """What the figure's vertical axis shows: the first `shown` columns."""
    x: str = ""
    """Title of the horizontal axis, if the rows have an order; then the means are joined."""
    shown: int = 1
    reference: str = ""
    """A dashed line, "words = path"."""
    remark: str = ""
    """What we make of it, written by hand after the numbers."""


def pairs(text):
    """Lines "words = path" -> {words: path}."""
    return dict(map(str.strip, line.split("=")) for line in text.strip().splitlines())


def section(number, claim):
    """A claim's lines in RESULTS.md; draws its figure."""
    columns, rows = pairs(claim.columns), pairs(claim.rows)
    table = [f"| | {' | '.join(columns)} | n |", "| --- " * (len(columns) + 2) + "|"]
    for label, row in rows.items():
        found = [values(row + column).values() for column in columns.values()]
        table.append(f"| {label} | {' | '.join(map(spread, found))} | {min(map(len, found))} |")
    verdicts, comparisons = [], []
    for line in claim.comparisons.strip().splitlines():
        words, paths = line.strip().rsplit(": ", 1)
        a, relation, b = paths.split()
        verdict, text = compare(a, b, 1 if relation == ">" else -1)
        verdicts.append(verdict)
        comparisons.append(f"- {words}: {text}")
    few = f"{verdicts.count('holds')} of {len(verdicts)} comparisons hold"
    head = [
        f"### {number}. {claim.title}: {verdicts[0] if len(set(verdicts)) == 1 else few}",
        "",
        textwrap.fill(claim.paper, 135),
        "",
    ]
    series = {
        name: [(label, list(values(row + column).values())) for label, row in rows.items()]
        for name, column in list(columns.items())[: claim.shown]
    }
    references = {
        name: statistics.mean(found)
        for name, path in pairs(claim.reference).items()
        if (found := values(path).values())
    }
    path, picture = ROOT / f"assets/claims/{number}.png", []
    if any(ys for points in series.values() for _, ys in points):
        chart(path, claim.title, claim.x, claim.y, series, references)
        picture = [f"![{claim.title}](assets/claims/{path.name})", ""]
    remark = [claim.remark, ""] if claim.remark else []
    return head + table + ["", *picture, *comparisons, "", *remark, f"Command: `tests/claims/claims.sh {number}`", ""]


CLAIMS = [
    Claim(
        "One model, every direction",
        "The paper: one network generates image and depth together, depth from images, and images from depth "
        "(Sec. 3.2). Each beside what it is blind to its input: the share of requested colours that appear (more is "
        "better); AbsRel (less is better) of depth from images; of the depth found in an image made from depth to that "
        "found in the real one, with the depth given or not looked at; of depth to that found in the image it was made "
        "with.",
        columns="measured =",
        rows="""
            colours, of its prompt = method/image/following
            of another prompt = method/image/shuffled_following
            depth, from its image = method/depth/absrel
            mean depth map = method/depth/baseline_absrel
            image, from its depth = method/follow-1/absrel
            from no depth = method/follow-0/absrel
            both, to each other = method/order-5/absrel
            to another image = method/order-5/other_absrel
        """,
        comparisons="""
            the image has the colours asked for: method/image/following > method/image/shuffled_following
            the depth is the image's: method/depth/absrel < method/depth/baseline_absrel
            the image has the depth: method/follow-1/absrel < method/follow-0/absrel
            image and depth agree: method/order-5/absrel < method/order-5/other_absrel
        """,
        y="share of colours (two on the left), AbsRel (others)",
    ),
    Claim(
        "Independent noise levels matter",
        "The paper: AbsRel on NYUv2 is 2.52%, of earlier joint models 5.12% and 8.75%. Here, against the same "
        "network trained with one noise level for both, where what is given replaces what is made at every "
        "step of sampling. Depth in images is found by the first network.",
        columns="""
            image to depth, 2 steps = /steps-2/absrel
            8 steps = /steps-8/absrel
            32 steps = /steps-32/absrel
            depth to image, 16 steps = /judged/absrel
        """,
        rows="""
            a level for each = method
            one level for both = shared
        """,
        comparisons="""
            image to depth, 2 steps against 32: method/steps-2/absrel < shared/steps-32/absrel
            depth to image: method/judged/absrel < shared/judged/absrel
        """,
        y="AbsRel",
        shown=4,
        reference="mean depth map, input-blind = method/steps-2/baseline_absrel",
    ),
    Claim(
        "Sparse depth suffices",
        "The paper: sparse real depth is enough, because noise fills its holes and the loss is taken on valid "
        "pixels (Sec. 3.2). Training sees as much depth as the rows say; all are scored on dense depth.",
        columns="""
            AbsRel, image to depth = /depth/absrel
            delta1 = /depth/delta1
        """,
        rows="""
            every pixel = plain
            10% of the pixels = sparse-10
            2% of the pixels = sparse-2
            scan lines = lidar
            SfM points = sfm
            10%, holes filled = filled-10
            2%, holes filled = filled-2
        """,
        comparisons="""
            10% of the pixels against the mean depth map: sparse-10/depth/absrel < sparse-10/depth/baseline_absrel
            10% against the same, filled by the nearest known pixel: sparse-10/depth/absrel < filled-10/depth/absrel
            2% against the same, filled by the nearest known pixel: sparse-2/depth/absrel < filled-2/depth/absrel
        """,
        y="AbsRel, image to depth",
        reference="mean depth map, input-blind = plain/depth/baseline_absrel",
    ),
    Claim(
        "Image pretraining transfers",
        "The paper: Modality Forcing of a text-to-image network is better than from scratch (Sec. 4.1). Equal "
        "steps of it, 1,200, after none, 500 and 2,000 of text-to-image.",
        columns="""
            AbsRel, image to depth = /depth/absrel
            delta1 = /depth/delta1
        """,
        rows="""
            0 = plain-scratch
            500 = short
            2,000 = plain
        """,
        comparisons="""
            500 steps against none: short/depth/absrel < plain-scratch/depth/absrel
            2,000 steps against 500: plain/depth/absrel < short/depth/absrel
        """,
        y="AbsRel, image to depth",
        x="steps of text-to-image pretraining",
        reference="mean depth map, input-blind = plain/depth/baseline_absrel",
    ),
    Claim(
        "Larger is better",
        "The paper: AbsRel 0.057, 0.051, 0.044 for 370M, 800M, 3.3B parameters after pretraining, near 0.06 "
        "without (Figure 4).",
        columns="""
            AbsRel after pretraining = /depth/absrel
            without pretraining = -scratch/depth/absrel
        """,
        rows="""
            64 = narrow
            128 = plain
            192 = wide
        """,
        comparisons="""
            width 128 against 64, pretrained: plain/depth/absrel < narrow/depth/absrel
            width 192 against 128, pretrained: wide/depth/absrel < plain/depth/absrel
            width 192 against 64, from scratch: wide-scratch/depth/absrel < narrow-scratch/depth/absrel
        """,
        y="AbsRel, image to depth",
        x="width of the network (6 blocks)",
        shown=2,
    ),
    Claim(
        "Image-first trajectories give more consistent depth",
        "The paper: depth agrees with the generated image best when the image resolves first (Sec. 4.2). "
        "AbsRel of the depth made with an image to the depth that the same network finds in that image, and "
        "in another one; 32 steps.",
        columns="""
            in its image = /absrel
            in another image = /other_absrel
        """,
        rows="""
            -5 = method/order--5
            -3 = method/order--3
            -1 = method/order--1
            0 = method/order-0
            1 = method/order-1
            3 = method/order-3
            5 = method/order-5
        """,
        comparisons="""
            image first (5) against both together (0): method/order-5/absrel < method/order-0/absrel
            both together (0) against depth first (-5): method/order-0/absrel < method/order--5/absrel
        """,
        y="AbsRel of the depth made to the depth found in the image made",
        x="log2(alpha): below 0 depth resolves first, above 0 the image",
    ),
    Claim(
        "Self-distillation preserves the text-to-image prior",
        "The paper: the loss of Eq. 8 keeps what the image generator knew (Sec. 3.3). Images from 128 "
        "captions; drift is the RMS difference of the image's velocity from the text-to-image network's, over "
        "the RMS of that.",
        columns="""
            Frechet distance = /image/frechet
            requested colours = /image/following
            velocity drift = /drift/drift
        """,
        rows="""
            with self-distillation = method
            without = plain
            the text-to-image network itself = t2i
        """,
        comparisons="""
            drift: method/drift/drift < plain/drift/drift
            Frechet distance: method/image/frechet < plain/image/frechet
            requested colours: method/image/following > plain/image/following
        """,
        y="Frechet distance to real images",
        reference="another set of real images = t2i/image/real_frechet",
    ),
    Claim(
        "Partial conditioning is graded",
        "The paper: depth given partly noisy is followed the more, the earlier it resolves (Sec. 4.3). AbsRel "
        "of the depth found in the generated to that found in the real image.",
        columns="AbsRel = /absrel",
        rows="""
            0 = method/follow-0
            0.5 = method/follow-0.5
            0.7 = method/follow-0.7
            0.85 = method/follow-0.85
            0.95 = method/follow-0.95
            1 = method/follow-1
        """,
        comparisons="""
            0.5 against 0: method/follow-0.5/absrel < method/follow-0/absrel
            0.7 against 0.5: method/follow-0.7/absrel < method/follow-0.5/absrel
            0.85 against 0.7: method/follow-0.85/absrel < method/follow-0.7/absrel
            0.95 against 0.85: method/follow-0.95/absrel < method/follow-0.85/absrel
            1 against 0.95: method/follow-1/absrel < method/follow-0.95/absrel
        """,
        y="AbsRel of depth found in the generated to depth found in the real image",
        x="strength of the depth given",
    ),
    Claim(
        "Design choices",
        "The paper: a detokenizer for depth, a plateau in the distribution of its noise levels, noise in "
        "missing pixels, x-prediction, cross-stream mixing, 20% each of clean images and clean depth (Sec. "
        "3.2, 4.1). Each row changes one thing.",
        columns="""
            AbsRel, image to depth = /depth/absrel
            depth to image = /judged/absrel
        """,
        rows="""
            none of these = plain
            no detokenizer block = detokenizer-0
            two of them = detokenizer-2
            plain logit-normal = logit-normal
            velocity for depth = velocity
            no mixing = unmixed
            p_i2d 0, p_d2i 0 = modes-none
            0.2, 0.2 (paper) = modes-paper
            0.5, 0.25 = modes-i2d
            10%, noise in holes = sparse-10
            10%, zeros in holes = zeros
        """,
        comparisons="""
            one detokenizer block against none: plain/depth/absrel < detokenizer-0/depth/absrel
            two detokenizer blocks against one: detokenizer-2/depth/absrel < plain/depth/absrel
            plateau against plain logit-normal: plain/depth/absrel < logit-normal/depth/absrel
            x-prediction against velocity: plain/depth/absrel < velocity/depth/absrel
            noise against zeros in missing pixels (10% known): sparse-10/depth/absrel < zeros/depth/absrel
            mixing against none, image to depth: plain/depth/absrel < unmixed/depth/absrel
            mixing against none, depth to image: plain/judged/absrel < unmixed/judged/absrel
            held clean (0.25, 0.5) against never, image to depth: plain/depth/absrel < modes-none/depth/absrel
            the same, depth to image: plain/judged/absrel < modes-none/judged/absrel
            0.25, 0.5 against 0.2, 0.2, depth to image: plain/judged/absrel < modes-paper/judged/absrel
        """,
        y="AbsRel, image to depth",
    ),
]


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
