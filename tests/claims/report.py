"""Write RESULTS.md between its <!-- claims --> marks, and assets/claims/*.png, from the results of claims.sh.

    python tests/claims/report.py                           from the committed results
    RESULTS=runs/again python tests/claims/report.py        from the results in another folder

A cell is the mean over seeds ± their standard deviation. A comparison is paired by seed, and its ± is the standard
error of the mean difference. It "holds" if the difference has the claimed sign and exceeds 2.92 standard errors, which
is Student's one-sided 5% point for three seeds. It "doesn't hold here" if the difference is as large with the other
sign. Otherwise it is "too small to tell".
"""

import json
import os
import re
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("RESULTS", ROOT / "tests/claims/results"))
T95 = [None, None, 6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86]  # Student's one-sided 5% points, by number of seeds
VERDICTS = ("holds", "doesn't hold here", "too small to tell", "not measured")
TEXT_WIDTH = 135

# ---- Results ----


def values(cell):
    """Read a number "network/measurement/key" of every seed that has a result: {seed: value}."""
    network, measurement, key = cell.split("/")
    found = {}
    recipes = set()
    for path in sorted((RESULTS / network).glob("*.json")):
        name, seed = path.stem.rsplit(".", 1)
        if name == measurement:
            result = json.loads(path.read_text())
            found[int(seed)] = result[key]
            recipes.add(result["made by"])
    if len(recipes) > 1:
        raise SystemExit(f"{RESULTS / network}/{measurement}: its seeds were made by different commands; run claims.sh")
    return found


def is_cell(word):
    return word.count("/") == 2


def evaluate(expression):
    """Compute an expression of cells, with spaces between its words, for every seed that has all cells."""
    words = expression.split()
    cells = {word: values(word) for word in words if is_cell(word)}
    seeds = set.intersection(*(set(found) for found in cells.values()))
    results = {}
    for seed in sorted(seeds):
        numbers = [repr(cells[word][seed]) if word in cells else word for word in words]
        results[seed] = eval(" ".join(numbers))
    return results


def decimals(number):
    return 3 if abs(number) >= 0.2 else 4


def spread(numbers):
    """Mean ± standard deviation, as text."""
    numbers = list(numbers)
    if not numbers:
        return "-"
    mean = statistics.mean(numbers)
    text = f"{mean:.{decimals(mean)}f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.{decimals(mean)}f}"
    return text


def fill_in(text):
    """Replace every {network/measurement/key} in a text by the mean over seeds."""

    def mean_of(match):
        found = values(match[1]).values()
        return f"{statistics.mean(found):.3f}" if found else "-"

    return re.sub(r"{([^}]+)}", mean_of, text)


def compare(line):
    """Decide a line "claim: expression < expression" (or >): (claim, verdict, the mean gain over seeds as text)."""
    claim, relation = line.strip().rsplit(": ", 1)
    sign = " > " if " > " in relation else " < "
    left, right = (evaluate(side) for side in relation.split(sign))
    gains = []
    for seed in left.keys() & right.keys():
        gain = left[seed] - right[seed] if sign == " > " else right[seed] - left[seed]
        gains.append(gain)
    if len(gains) < 2:
        return claim, "not measured", ""

    mean = statistics.mean(gains)
    error = statistics.stdev(gains) / len(gains) ** 0.5
    verdict = "too small to tell"
    if abs(mean) > T95[min(len(gains), len(T95) - 1)] * error:
        verdict = "holds" if mean > 0 else "doesn't hold here"
    direction = "better" if mean > 0 else "worse"
    num_better = sum(gain > 0 for gain in gains)
    found = f"{direction} by {abs(mean):.4f} ± {error:.4f}, better in {num_better} of {len(gains)} seeds"
    return claim, verdict, found


# ---- Figures ----

INK = "#222222"
GREY = "#555555"
GRID = "#e4e4e4"
COLORS = ("#1f5fbf", "#d1582b", "#2e8b57", "#8a4fb0")
WIDTH = 760
HEIGHT = 400
LEFT = 70  # edges of the plot
RIGHT = WIDTH - 20
TOP = 58
BOTTOM = HEIGHT - 72
SCALE = 2  # drawn larger, then reduced, so that lines are smooth


class Canvas:
    """An image that is drawn on in points of the final size."""

    def __init__(self):
        self.image = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, words, size=13, color=INK, **options):
        self.draw.text((SCALE * x, SCALE * y), words, fill=color, font_size=SCALE * size, **options)

    def line(self, points, color, width=1.0):
        self.draw.line([(SCALE * x, SCALE * y) for x, y in points], color, round(SCALE * width))

    def dot(self, x, y, color, radius=3.5):
        box = [SCALE * (x - radius), SCALE * (y - radius), SCALE * (x + radius), SCALE * (y + radius)]
        self.draw.ellipse(box, color)

    def label(self, x, y, words, size=12, color=GREY):
        """Text on a white ground, its lower right corner at (x, y)."""
        corner = (SCALE * x, SCALE * y)
        self.draw.rectangle(self.draw.textbbox(corner, words, font_size=SCALE * size, anchor="rb"), "white")
        self.draw.text(corner, words, color, font_size=SCALE * size, anchor="rb")

    def save(self, path):
        path.parent.mkdir(exist_ok=True)
        self.image.resize((WIDTH, HEIGHT), Image.LANCZOS).save(path, optimize=True)


class Axes:
    """Where labels and numbers stand in the plot."""

    def __init__(self, labels, numbers):
        self.labels = labels
        self.slot = (RIGHT - LEFT) / len(labels)  # width that a label has
        self.low = min(numbers)
        self.high = max(numbers)
        if self.low < 0.6 * self.high or self.low == self.high:
            self.low = 0
        else:
            self.low -= 0.15 * (self.high - self.low)
        self.high += 0.08 * (self.high - self.low)

    def x(self, label):
        return LEFT + (self.labels.index(label) + 0.5) * self.slot

    def y(self, number):
        return TOP + (self.high - number) / (self.high - self.low) * (BOTTOM - TOP)

    def ticks(self):
        """(numbers at which a grid line stands, their decimals)."""
        steps = [digit * 10.0**exponent for exponent in range(-5, 4) for digit in (1, 2, 5)]
        step = min(steps, key=lambda step: abs((self.high - self.low) / step - 5))
        tick = (int(self.low / step) + (self.low > 0)) * step
        ticks = []
        while tick <= self.high:
            ticks.append(tick)
            tick += step
        exponent = int(f"{step:e}".split("e")[1])
        return ticks, max(0, -exponent)


def draw_axes(canvas, axes, title, x_title, y_title):
    ticks, digits = axes.ticks()
    for tick in ticks:
        canvas.line([(LEFT, axes.y(tick)), (RIGHT, axes.y(tick))], GRID)
        canvas.text(LEFT - 8, axes.y(tick), f"{tick:.{digits}f}", anchor="rm")
    canvas.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], INK)
    letters = max(6, int(axes.slot) // 7)
    size = 12 if len(axes.labels) < 9 else 11
    for label in axes.labels:
        words = "\n".join(textwrap.wrap(label, letters, break_long_words=False))
        canvas.text(axes.x(label), BOTTOM + 7, words, size, anchor="ma", align="center")
    canvas.text((LEFT + WIDTH) / 2, HEIGHT - 8, x_title, anchor="ms")
    canvas.text(LEFT - 58, 10, title, 15)
    canvas.text(LEFT - 58, 38, y_title, 13, GREY, anchor="lm")


def draw_legend(canvas, names):
    end = RIGHT
    for name, color in reversed(list(zip(names, COLORS, strict=False))):
        canvas.text(end, 18, name, 13, color, anchor="rm")
        end -= canvas.draw.textlength(name, font_size=13) + 24


def draw_reference(canvas, axes, name, number):
    """A dashed line across the plot, with its name above its right end."""
    for x in range(LEFT, RIGHT, 10):
        canvas.line([(x, axes.y(number)), (x + 5, axes.y(number))], "#777777", 1.5)
    canvas.label(RIGHT - 2, axes.y(number) - 4, name)


def draw_points(canvas, axes, points, shift, color, joined):
    """A dot for every seed and a bar at their mean; the means of labels that end in a digit may be joined."""
    means = [(axes.x(label) + shift, axes.y(statistics.mean(numbers))) for label, numbers in points]
    if joined:
        in_order = [mean for mean, (label, _) in zip(means, points, strict=True) if label[-1].isdigit()]
        canvas.line(in_order, color, 2)
    for label, numbers in points:
        for i, number in enumerate(numbers):
            x = axes.x(label) + shift + 5 * (i - (len(numbers) - 1) / 2)
            canvas.dot(x, axes.y(number), color)
    for x, y in means:
        canvas.line([(x - 14, y), (x + 14, y)], color, 2)


def chart(path, title, x_title, y_title, series, references):
    """Draw series {name: [(label, [a number of each seed])]} and references {name: number} into a file."""
    labels = list(dict.fromkeys(label for points in series.values() for label, _ in points))
    numbers = [number for points in series.values() for _, numbers in points for number in numbers]
    axes = Axes(labels, numbers + list(references.values()))
    canvas = Canvas()
    draw_axes(canvas, axes, title, x_title, y_title)
    for name, number in references.items():
        draw_reference(canvas, axes, name, number)
    gap = min(34, 10 if x_title else 0.8 * axes.slot / len(series))
    for i, points in enumerate(series.values()):
        shift = gap * (i - (len(series) - 1) / 2)
        measured = [(label, numbers) for label, numbers in points if numbers]
        draw_points(canvas, axes, measured, shift, COLORS[i], joined=bool(x_title))
    if len(series) > 1:
        draw_legend(canvas, series)
    canvas.save(path)


# ---- Sections ----


@dataclass
class Claim:
    """One section of RESULTS.md. Tables are lines "words = path"; a cell's path is its row's path + its column's."""

    title: str
    number: str
    """The result in a sentence for the table at the top; {network/measurement/key} is replaced by the mean."""
    text: str
    """The paper's statement, and what is compared here."""
    columns: str
    rows: str
    comparisons: str
    """Lines "words: expression < expression" (or >), each of which is claimed."""
    y: str
    """What the figure's vertical axis shows."""
    x: str = ""
    """Title of the horizontal axis, if the rows have an order. Then the means are joined."""
    shown: int = 1
    """Number of columns that the figure shows."""
    skip: int = 0
    """Number of rows at the top that the figure leaves out, because they have another scale."""
    reference: str = ""
    """A dashed line, "words = path"."""
    remark: str = ""
    """Our interpretation, below the numbers."""


def pairs(text):
    """Lines "words = path" -> {words: path}."""
    return dict(map(str.strip, line.split("=")) for line in text.strip().splitlines())


def comparisons_of(claim):
    return [compare(line) for line in claim.comparisons.strip().splitlines()]


def summarize(comparisons):
    """The verdicts of a claim's comparisons in a few words."""
    verdicts = [verdict for _, verdict, _ in comparisons]
    if len(set(verdicts)) == 1:
        return verdicts[0]
    counts = [f"{verdict} {verdicts.count(verdict)}/{len(verdicts)}" for verdict in VERDICTS if verdict in verdicts]
    return ", ".join(counts)


def table(claim):
    """The lines of a claim's table of means."""
    columns = pairs(claim.columns)
    lines = [f"| {claim.x} | {' | '.join(columns)} | n |", "| --- " * (len(columns) + 2) + "|"]
    for label, row in pairs(claim.rows).items():
        found = [list(values(row + column).values()) for column in columns.values()]
        num_seeds = min((len(numbers) for numbers in found if numbers), default=0)
        lines.append(f"| {label} | {' | '.join(map(spread, found))} | {num_seeds} |")
    return lines


def figure(number, claim):
    """Draw a claim's figure. Returns its lines in RESULTS.md, or none if nothing is measured."""
    rows = list(pairs(claim.rows).items())[claim.skip :]
    columns = list(pairs(claim.columns).items())[: claim.shown]
    series = {name: [(label, list(values(row + column).values())) for label, row in rows] for name, column in columns}
    if not any(numbers for points in series.values() for _, numbers in points):
        return []
    references = {}
    for name, path in pairs(claim.reference).items():
        found = values(path).values()
        if found:
            references[name] = statistics.mean(found)
    chart(ROOT / f"assets/claims/{number}.png", claim.title, claim.x, claim.y, series, references)
    return [f"![{claim.title}](assets/claims/{number}.png)", ""]


def section(number, claim):
    """The lines of a claim in RESULTS.md. Draws its figure."""
    comparisons = comparisons_of(claim)
    lines = [f"### {number}. {claim.title}: {summarize(comparisons)}", ""]
    lines += [textwrap.fill(claim.text, TEXT_WIDTH, break_on_hyphens=False), ""]
    lines += [*table(claim), "", *figure(number, claim)]
    for words, verdict, found in comparisons:
        lines.append(f"- {words}: {found}, **{verdict}**" if found else f"- {words}: **{verdict}**")
    lines.append("")
    if claim.remark:
        lines += [textwrap.fill(claim.remark, TEXT_WIDTH, break_on_hyphens=False), ""]
    return [*lines, f"Command: `tests/claims/claims.sh {number}`", ""]


def overview():
    """The table at the top: claim, verdict, number, figure."""
    lines = ["| | claim | verdict here | number (mean of three seeds) | figure |", "| --- | --- | --- | --- | --- |"]
    for number, claim in enumerate(CLAIMS, 1):
        verdict = summarize(comparisons_of(claim))
        link = f"[figure](assets/claims/{number}.png)"
        lines.append(f"| {number} | {claim.title} | {verdict} | {fill_in(claim.number)} | {link} |")
    return [*lines, ""]


CLAIMS = [
    Claim(
        "One model, every direction",
        "depth from an image: AbsRel {plain-long/depth/absrel}, the mean depth map {plain-long/depth/baseline_absrel}; "
        "an image from depth: {plain-long/follow-1/absrel}, from the prompt alone {plain-long/follow-0/absrel}",
        "The paper: one network generates image and depth together, depth from images, and images from depth (Sec. "
        "3.2). Here every task stands beside a control: another prompt, the mean depth map, no depth, another image. "
        "Colours are the share of the requested colours that appear in the image; higher is better. All other rows are "
        "AbsRel; lower is better. For depth from an image, it is the error of that depth. For an image from depth, it "
        "compares the depth found in the generated image with the depth found in the real one. For both together, it "
        "compares the generated depth with the depth found in the image that was generated with it.",
        columns="measured =",
        rows="""
            colours, its own prompt = plain-long/image/following
            colours, another prompt = plain-long/image/shuffled_following
            depth from its image = plain-long/depth/absrel
            mean depth map = plain-long/depth/baseline_absrel
            image from its depth = plain-long/follow-1/absrel
            image from its prompt alone = plain-long/follow-0/absrel
            both together = plain-long/order-5/absrel
            depth with another image = plain-long/order-5/other_absrel
        """,
        comparisons="""
            the image shows the requested colours: plain-long/image/following > plain-long/image/shuffled_following
            the depth belongs to the image: plain-long/depth/absrel < plain-long/depth/baseline_absrel
            the image has the given depth: plain-long/follow-1/absrel < plain-long/follow-0/absrel
            image and depth agree: plain-long/order-5/absrel < plain-long/order-5/other_absrel
        """,
        y="AbsRel (lower is better)",
        skip=2,
    ),
    Claim(
        "Independent noise levels matter",
        "depth from an image: AbsRel {plain-long/depth/absrel} with a level for each modality, "
        "{shared-long/steps-32/absrel} with one level for both",
        "The paper: a noise level for each modality is what lets one network condition on any of them (Sec. 3). The "
        "alternative is the same network trained with one level for both modalities, so nothing is ever held clean. To "
        "condition it, we replace the given modality at every sampling step by its true value, noised to the common "
        "level (once per step, without resampling). The given modality is nearly clean only in the last steps, so this "
        "needs many of them. We draw the one level uniformly, because the method's distributions rarely draw low "
        "levels, where replacement works. The row between the two, added afterwards, has a level for each modality "
        "but never holds one clean in training. (The paper's joint baselines, JointDiT and UniCon, also draw separate "
        "levels. So the 57% by which the paper improves on JointDiT's AbsRel is a different gap.)",
        columns="""
            to depth, 2 steps = /depth/absrel
            to depth, 8 steps = /steps-8/absrel
            to depth, 32 steps = /steps-32/absrel
            to image, 16 steps = /follow-1/absrel
        """,
        rows="""
            a level for each = plain-long
            a level for each, none held clean = unheld-long
            one level for both = shared-long
        """,
        comparisons="""
            image to depth, a level for each in 2 steps against one level in 32: plain-long/depth/absrel < \
shared-long/steps-32/absrel
            image to depth, 32 steps each: plain-long/steps-32/absrel < shared-long/steps-32/absrel
            depth to image: plain-long/follow-1/absrel < shared-long/follow-1/absrel
            image to depth, a level for each but none held clean, in 2 steps against one level in 32: \
unheld-long/depth/absrel < shared-long/steps-32/absrel
            depth to image, a level for each but none held clean, against one level: unheld-long/follow-1/absrel < \
shared-long/follow-1/absrel
            image to depth, held clean against not, 2 steps: plain-long/depth/absrel < unheld-long/depth/absrel
            depth to image, held clean against not: plain-long/follow-1/absrel < unheld-long/follow-1/absrel
        """,
        y="AbsRel (lower is better)",
        shown=4,
        remark="With one level, an image made from depth in 16 steps (0.175; we did not try more) is no nearer to that "
        "depth than an image from the prompt alone (0.178, claim 1). So replacement hardly conditions it. Separate "
        "levels and their distributions account for 55% of the gain in image to depth and for 35% in depth to image. "
        "The rest comes from holding a modality clean in training, which one level for both cannot do.",
    ),
    Claim(
        "Sparse depth suffices, and beats filled holes",
        "AbsRel {plain/depth/absrel} from dense depth, {sparse-10/depth/absrel} from 10% of the pixels, "
        "{filled-10/depth/absrel} from the same 10% with holes filled; none of four sparsities is shown to suffice",
        "The paper: sparse real depth is enough, because noise fills its holes and the loss is taken on valid pixels "
        "(Sec. 3.2). The rows tell how much depth training sees; all networks are scored on dense depth. We fixed "
        "beforehand what is enough: at least nine tenths of what dense depth gains over the mean depth map. Filled "
        "maps still lack the sky. Filling changes both what the network sees and where the loss is taken.",
        columns="""
            AbsRel, image to depth = /depth/absrel
            delta1 = /depth/delta1
        """,
        rows="""
            every pixel = plain
            10% of the pixels = sparse-10
            2% of the pixels = sparse-2
            scan lines (24%) = lidar
            SfM points (13%) = sfm
            10%, holes filled = filled-10
            2%, holes filled = filled-2
        """,
        comparisons="""
            10% of the pixels keep nine tenths of dense depth's gain: sparse-10/depth/absrel < \
0.9 * plain/depth/absrel + 0.1 * plain/depth/baseline_absrel
            2% of the pixels keep nine tenths: sparse-2/depth/absrel < \
0.9 * plain/depth/absrel + 0.1 * plain/depth/baseline_absrel
            scan lines keep nine tenths: lidar/depth/absrel < \
0.9 * plain/depth/absrel + 0.1 * plain/depth/baseline_absrel
            SfM points keep nine tenths: sfm/depth/absrel < \
0.9 * plain/depth/absrel + 0.1 * plain/depth/baseline_absrel
            10% against the same, filled by the nearest known pixel: sparse-10/depth/absrel < filled-10/depth/absrel
            2% against the same, filled by the nearest known pixel: sparse-2/depth/absrel < filled-2/depth/absrel
        """,
        y="AbsRel, image to depth (lower is better)",
        reference="mean depth map, input-blind = plain/depth/baseline_absrel",
        remark="None of the four sparsities is shown to suffice. Of dense depth's gain, 10% of the pixels keep 92%, "
        "scan lines 88%, SfM points 77%, and 2% of the pixels 76%. The number of steps is equal, so 2% had a fiftieth "
        "of the supervision; we did not try more steps. Scan lines have twice the pixels of the 10% row and keep less, "
        "perhaps because neighbouring pixels add little. Filling is worse, and much worse where little is known, "
        "because the network learns invented values.",
    ),
    Claim(
        "Image pretraining transfers",
        "AbsRel {plain-scratch/depth/absrel} without pretraining, {short/depth/absrel} after 500 steps of it, "
        "{plain/depth/absrel} after 2,000",
        "The paper: Modality Forcing works better from a text-to-image network than from scratch (Sec. 4.1). Here "
        "1,200 steps of Modality Forcing follow 0, 500 or 2,000 steps of text-to-image training. So the rows also "
        "differ in the total number of steps. The second stage sees the same images again. We did not try to spend "
        "the additional steps on Modality Forcing instead.",
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
            2,000 steps against none (added afterwards): plain/depth/absrel < plain-scratch/depth/absrel
        """,
        y="AbsRel, image to depth (lower is better)",
        x="steps of text-to-image pretraining (not to scale)",
        reference="mean depth map, input-blind = plain/depth/baseline_absrel",
        remark="The gain is small, and 500 steps give as much as 2,000. The difference between 2,000 steps and none is "
        "exactly at the limit of 2.92 standard errors, and too small to tell in delta1.",
    ),
    Claim(
        "Larger is better",
        "AbsRel {narrow/depth/absrel}, {plain/depth/absrel}, {wide/depth/absrel} at widths 64, 128, 192; only 192 "
        "against 64 is beyond chance",
        "The paper: AbsRel 0.057, 0.051 and 0.044 for 370M, 800M and 3.3B parameters after pretraining, and about 0.06 "
        "without (Figure 4). Here all networks see equal samples, at the learning rate that was chosen for width 128.",
        columns="""
            AbsRel after pretraining = /depth/absrel
            AbsRel without pretraining = -scratch/depth/absrel
        """,
        rows="""
            64 = narrow
            128 = plain
            192 = wide
        """,
        comparisons="""
            width 128 against 64, pretrained: plain/depth/absrel < narrow/depth/absrel
            width 192 against 128, pretrained: wide/depth/absrel < plain/depth/absrel
            width 192 against 64, pretrained (added afterwards): wide/depth/absrel < narrow/depth/absrel
            width 192 against 64, not pretrained (added afterwards): wide-scratch/depth/absrel < \
narrow-scratch/depth/absrel
            width 192 gains more over 64 with pretraining than without: narrow/depth/absrel - wide/depth/absrel > \
narrow-scratch/depth/absrel - wide-scratch/depth/absrel
        """,
        y="AbsRel, image to depth (lower is better)",
        x="width of the network (6 blocks: 0.5M, 1.8M, 3.9M parameters)",
        shown=2,
        remark="After pretraining, each width is better than the narrower one in every seed. "
        "Unlike the paper's networks, those from scratch gain as much by width as pretrained ones. Perhaps none of "
        "ours is large enough for depth itself.",
    ),
    Claim(
        "Image-first trajectories give more consistent depth",
        "AbsRel of depth against its image {plain-long/image-first/absrel} image first, "
        "{plain-long/depth-first/absrel} depth first; both at once, {plain-long/order-0/absrel}, is too near to image "
        "first to tell",
        "The paper: depth agrees best with the generated image when the image resolves first (Sec. 4.2). The columns "
        "are AbsRel of the generated depth against the depth that another network finds in the image; both take 32 "
        "steps. An image-first trajectory leaves few of these steps for depth: at 5, depth goes from t = 0.76 to 0 in "
        "the last step. This smooths depth, and AbsRel rewards smooth depth. So the rows in words generate image and "
        "depth one after the other, in 32 steps each. Generated depth also covers the sky, which training depth never "
        "does, and an image that is generated second is conditioned on it. So we added afterwards the rows of the same "
        "scenes with all of them in rooms.",
        columns="""
            in its image = /absrel
            in another image = /other_absrel
        """,
        rows="""
            depth, then image = plain-long/depth-first
            -5 = plain-long/order--5
            -2 = plain-long/order--2
            0 = plain-long/order-0
            2 = plain-long/order-2
            5 = plain-long/order-5
            image, then depth = plain-long/image-first
            rooms: depth first = plain-long/indoors-depth-first
            rooms: at once = plain-long/indoors-0
            rooms: image first = plain-long/indoors-image-first
        """,
        comparisons="""
            image, then depth against depth, then image: plain-long/image-first/absrel < plain-long/depth-first/absrel
            5 against -5: plain-long/order-5/absrel < plain-long/order--5/absrel
            5 against 0: plain-long/order-5/absrel < plain-long/order-0/absrel
            image, then depth against 0 (added afterwards): plain-long/image-first/absrel < plain-long/order-0/absrel
            rooms, image, then depth against depth, then image (added afterwards): \
plain-long/indoors-image-first/absrel < plain-long/indoors-depth-first/absrel
            rooms, image, then depth against 0 (added afterwards): plain-long/indoors-image-first/absrel < \
plain-long/indoors-0/absrel
        """,
        y="AbsRel of generated depth, against the depth found in the image generated with it (lower is better)",
        x="log2(alpha): below 0 depth resolves first, above 0 the image",
        remark="Between -2 and 2 nothing changes. Part of the lead at 5 may be the smoothness of few steps. In rooms, "
        "with 32 steps for each modality, image, then depth leads both other orders. With open ground among the "
        "scenes, its lead over both at once is smaller than the difference between seeds.",
    ),
    Claim(
        "Self-distillation preserves the text-to-image prior",
        "requested colours {t2i/image/following} before, {rooms-taught/image/following} after training with our "
        "weights, {rooms-untaught/image/following} without distillation, {rooms-taught-10/image/following} with ten "
        "times our weights",
        "The paper: the loss of Eq. 8 keeps what the image generator knew while depth is learnt from other data (Sec. "
        "3.3). Here the depth data are 256 rooms with one object each, the same for all seeds. Prompts come from the "
        "pretraining world, with up to three objects and open ground. Two thirds of the samples that train the image "
        "hold depth clean, where the loss has its small weight (with the paper's 20%, it is a quarter of them). We "
        "fixed beforehand what it means to preserve: to lose at most half of what is lost without distillation. The "
        "Frechet distance (128 captions) uses evaluate.py's own features, not Inception's. Drift (256 scenes, depth "
        "pure noise) is the RMS difference between the image velocities of this and of the text-to-image network, "
        "divided by the RMS of the latter. It is Eq. 8 without its weight, and 0 for the text-to-image network. (We "
        "first tried 256 scenes of the whole world, which could not tell because nothing was lost with or without "
        "distillation: Frechet distance 1.055 ± 0.165 and 1.155 ± 0.121, requested colours 0.984 ± 0.004 and 0.980 ± "
        "0.014, drift 0.292 and 0.307. These results are not kept.)",
        columns="""
            requested colours = /image/following
            Frechet distance = /image/frechet
            velocity drift = /drift/drift
        """,
        rows="""
            the text-to-image network = t2i
            with self-distillation = rooms-taught
            with ten times its weight = rooms-taught-10
            without = rooms-untaught
        """,
        comparisons="""
            Frechet distance, with against without: rooms-taught/image/frechet < rooms-untaught/image/frechet
            requested colours, with against without: rooms-taught/image/following > rooms-untaught/image/following
            velocity drift, with against without (added afterwards): rooms-taught/drift/drift < \
rooms-untaught/drift/drift
            Frechet distance, with ten times the weight (added afterwards): rooms-taught-10/image/frechet < \
rooms-untaught/image/frechet
            requested colours, with ten times the weight (added afterwards): rooms-taught-10/image/following > \
rooms-untaught/image/following
            velocity drift, with ten times the weight (added afterwards): rooms-taught-10/drift/drift < \
rooms-untaught/drift/drift
            at most half of the Frechet loss: rooms-taught/image/frechet < 0.5 * rooms-untaught/image/frechet + 0.5 * \
t2i/image/frechet
            at most half of the colour loss: rooms-taught/image/following > 0.5 * rooms-untaught/image/following + \
0.5 * t2i/image/following
            at most half of the colour loss, with ten times the weight (added afterwards): \
rooms-taught-10/image/following > 0.5 * rooms-untaught/image/following + 0.5 * t2i/image/following
        """,
        y="share of requested colours that appear (higher is better)",
        reference="real images = t2i/image/real_following",
        remark="The paper does not state its weights. Ours (0.5 where depth is noise, 0.05 where it is clean) preserve "
        "nothing that can be measured. After we had seen that, we added ten times these weights: they preserve 29% of "
        "the colours that are lost and remove a third of the drift. Eq. 8 asks the teacher only about the images and "
        "captions of the second stage, and not about any other caption. By the Frechet distance, paired by seed, the "
        "networks with and without distillation are worse than the text-to-image network (by 0.138 ± 0.017 and 0.130 "
        "± 0.019), and not different from each other.",
    ),
    Claim(
        "Partial conditioning is graded",
        "AbsRel {plain-long/follow-0/absrel}, {plain-long/follow-0.7/absrel}, {plain-long/follow-0.85/absrel}, "
        "{plain-long/follow-1/absrel} at strengths 0, 0.7, 0.85, 1",
        "The paper: the image follows a noisy depth condition more closely, the earlier this condition resolves (Sec. "
        "4.3). It uses log2(alpha) from -5 to -14, which are strengths from 0.85 to 0.992 here; 0, 0.7 and 1 are "
        "outside the paper's range. AbsRel compares the depth found in the generated image with the depth found in "
        "the real one.",
        columns="AbsRel = /absrel",
        rows="""
            0 = plain-long/follow-0
            0.7 = plain-long/follow-0.7
            0.85 = plain-long/follow-0.85
            0.95 = plain-long/follow-0.95
            0.992 = plain-long/follow-0.992
            1 = plain-long/follow-1
        """,
        comparisons="""
            0.7 against 0: plain-long/follow-0.7/absrel < plain-long/follow-0/absrel
            0.85 against 0.7: plain-long/follow-0.85/absrel < plain-long/follow-0.7/absrel
            0.95 against 0.85: plain-long/follow-0.95/absrel < plain-long/follow-0.85/absrel
            0.992 against 0.95: plain-long/follow-0.992/absrel < plain-long/follow-0.95/absrel
            0.992 against 0.85, the paper's range (added afterwards): plain-long/follow-0.992/absrel < \
plain-long/follow-0.85/absrel
            1 against 0.992: plain-long/follow-1/absrel < plain-long/follow-0.992/absrel
        """,
        y="AbsRel of depth found in the generated image, against that found in the real one (lower is better)",
        x="strength of the depth given (not to scale)",
    ),
    Claim(
        "Design choices",
        "AbsRel {plain/depth/absrel} with x-prediction, {velocity/depth/absrel} with velocity; "
        "{sparse-10/depth/absrel} with noise in missing pixels, {zeros/depth/absrel} with zeros; holding modalities "
        "clean is better in every seed, by amounts too uneven to tell; the others make no difference that three seeds "
        "can show",
        "The paper: a detokenizer for depth, a plateau in the distribution of its noise levels, noise in missing "
        "pixels, x-prediction, cross-stream mixing, and 20% each of clean images and clean depth (Sec. 3.2, 4.1). "
        "Each row changes one thing of the first row; the last row changes one thing of the row above it. A "
        "detokenizer block also adds 0.2M parameters, and mixing adds 0.1M. Both modalities are held clean more often "
        "than in the paper, for the sake of depth-to-image, although 1,200 steps do not teach it. Velocity prediction "
        "must cancel the noise in its input, which matters most in few steps, so 32 steps are compared too.",
        columns="AbsRel, image to depth = /depth/absrel",
        rows="""
            unchanged = plain
            no detokenizer block = detokenizer-0
            two detokenizer blocks = detokenizer-2
            plain logit-normal = logit-normal
            velocity for depth = velocity
            no mixing = unmixed
            nothing held clean = modes-none
            20%, 20% held clean = modes-paper
            10% of the pixels = sparse-10
            10%, the others zero = zeros
        """,
        comparisons="""
            one detokenizer block against none: plain/depth/absrel < detokenizer-0/depth/absrel
            two detokenizer blocks against one: detokenizer-2/depth/absrel < plain/depth/absrel
            plateau against plain logit-normal: plain/depth/absrel < logit-normal/depth/absrel
            x-prediction against velocity: plain/depth/absrel < velocity/depth/absrel
            x-prediction against velocity, in 32 steps: plain/steps-32/absrel < velocity/steps-32/absrel
            noise against zeros in missing pixels (10% known): sparse-10/depth/absrel < zeros/depth/absrel
            mixing against none: plain/depth/absrel < unmixed/depth/absrel
            25% of images, 50% of depth held clean against none: plain/depth/absrel < modes-none/depth/absrel
            20%, 20% against none: modes-paper/depth/absrel < modes-none/depth/absrel
        """,
        y="AbsRel, image to depth (lower is better)",
        remark="We expected more steps to help velocity prediction, but they harm it: 0.099 in 2 steps, 0.130 in 32 "
        "(x-prediction: 0.090, 0.093). The learning rate was chosen with x-prediction. With zeros, training never "
        "shows a map that is noise everywhere, although sampling begins with one; that is the argument for noise. "
        "With nothing held clean, one seed in three is far behind the others. Mixing, the detokenizer's depth and the "
        "plateau make no difference that three seeds can show.",
    ),
]


def replace_between(text, mark, lines):
    """Put the lines between <!-- mark --> and <!-- /mark -->."""
    start = f"<!-- {mark} -->"
    end = f"<!-- /{mark} -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return before + "\n".join([start, "", *lines]) + end + after


def main():
    sections = []
    for number, claim in enumerate(CLAIMS, 1):
        sections += section(number, claim)
    path = ROOT / "RESULTS.md"
    text = replace_between(path.read_text(), "overview", overview())
    path.write_text(replace_between(text, "claims", sections))


if __name__ == "__main__":
    main()
