"""Generate samples. What you give is held clean, or trusted in part; everything else is generated.

    python sample.py --prompt "a red ball in a room" --prompt "a blue box"      images and their depth
    python sample.py --prompt "..." --order depth,rgb                           depth first (or rgb,depth; rgb alone)
    python sample.py --image photo.jpg --ensemble 10                            depth of an image
    python sample.py --image photos/ --count 1 --out depths                     depth of all images of a directory
    python sample.py --depth depth.npy --prompt "..."                           images that have this depth
    python sample.py --depth sketch.npy --strength depth=0.8 --refine depth --prompt "..."      roughly this depth
    python sample.py --image photo.jpg --depth lidar.png                        sparse depth completed, in its unit

A checkpoint with surface normals generates these too, and takes them as --normal normals.npy.

Each sample gets a folder in --out with NAME.png, a picture, for every modality, and NAME.npy for all but the image (0
where missing). Depth is relative, or in the unit of the depth that you give; it also comes as depth16.png (16 bits,
times the text field "scale") and cloud.ply (coloured points without the edges of objects). metadata.json holds the
settings. grid.png shows the first samples.
"""

import unicodedata
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from tqdm import tqdm

import data
from model import I2D_STEPS, JOINT, MODALITIES, RGB, complete_depth, make_schedule

WORDS = {"rgb": "image", "depth": "depth", "normal": "normal"}  # what flags and labels call the modalities
COMPLETIONS = {"relative depth": complete_depth}  # by encoding: maps beside an image are measurements, to complete
SHOWN = 24  # samples in grid.png

# ---- Settings ----


def parse_flags():
    p = data.Flags(__doc__)
    data.sampling_settings(p)
    p.setting("--prompt", [], "what the image shows; may be given several times", action="append")
    p.setting("--prompts", "", "text file with more prompts, one on each line")
    p.setting("--image", "", "image, or directory of images")
    p.setting(
        "--depth", "", "depth map (.npy, .pfm, 16-bit .png; 0 is missing), or directory; beside --image: measured"
    )
    p.setting("--normal", "", "surface normals (.npy of shape (H, W, 3); 0 is missing), or directory")
    strength = "how far inputs are trusted, such as rgb=0.5 or depth=0.8: 1 is clean, 0 is ignored"
    p.setting("--strength", {}, strength, data.by_modality(data.SHARE))
    order = f"joint; log2(alpha) of Sec. 4.2, -14 to 14 (joint is {JOINT:g}); or names, such as depth,rgb or rgb alone"
    p.setting("--order", "joint", order)
    p.setting("--refine", "", "modality to generate again in a second pass, from all others held clean")
    p.setting("--count", 4, "number of samples of every prompt for every input", data.whole(1, 10**5))
    size = "size in pixels, HxW or one side; empty is the network's. An input keeps its aspect, at this area"
    p.setting("--size", "", size, data.size_text())
    steps = f"sampling steps of each pass; 0 is {I2D_STEPS} where a clean image is given, else 50"
    p.setting("--steps", 0, steps, data.whole(0, 10**4))
    p.setting("--cfg-interval", [0.0, 1.0], "noise levels at which guidance acts", data.SHARE, nargs=2, metavar="T")
    p.setting("--fov", 55.0, "vertical field of view of cloud.ply, in degrees", data.number(1, 179))
    p.setting("--seed", 0, "seed of the first sample's noise; each next sample adds one", data.SEED)
    p.setting("--encoders", "", "FILE.py of the frozen encoders that the checkpoint was trained with; it is run")
    p.setting("--out", "runs/samples", "directory to write to, new or empty")
    args = p.parse_args()

    if args.cfg_interval[0] > args.cfg_interval[1]:
        data.fail(f"--cfg-interval {args.cfg_interval}: must be two noise levels, the lower first")
    return args


def input_paths(args):
    """{modality: path} of the inputs on the command line."""
    paths = {name: getattr(args, word) for name, word in WORDS.items()}
    return {name: path for name, path in paths.items() if path}


def read_size(args, config):
    """--size, or that of the network -> (H, W)."""
    size = data.parse_size(args.size) if args.size else (config.size, config.size)
    if size[0] % config.patch or size[1] % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size, {config.patch}")
    return size


@dataclass
class Task:
    """What the command line asks of a network."""

    order: object  # for make_schedule: log2(alpha) or a list of names
    strength: dict  # for make_schedule: {modality: 0 to 1} of what is given
    measured: list  # modalities that are generated first, and then corrected to equal what is given
    generated: list  # modalities that the first pass generates


def read_task(args, network):
    """The Task of a command line. Exit code 2 if the network cannot do it."""
    names = [m.name for m in network.modalities]
    inputs = input_paths(args)
    for name in inputs:
        if name not in names:
            data.fail(f"--{WORDS[name]}: --checkpoint {args.checkpoint} has no {name}; give one that has")
    if args.refine and args.refine not in names:
        data.fail(f"--refine {args.refine}: must be a modality of the checkpoint: {', '.join(names)}")

    image = names[0]
    measured = [name for name in inputs if image in inputs and MODALITIES[name].encoding in COMPLETIONS]
    strength = {name: args.strength.get(name, 1.0) for name in inputs if name not in measured}
    for name, trust in args.strength.items():
        if name not in strength:
            problem = "is measured beside an image, and always kept" if name in measured else "is not given"
            data.fail(f"--strength {name}={trust}: {name} {problem}; leave it out")

    order = JOINT if args.order == "joint" else data.parse_order(args.order, names)
    if inputs and args.order != "joint":
        data.fail(f"--order {args.order}: inputs come first, by their --strength; leave it out")
    if args.ensemble > 1 and (image not in inputs or args.refine == image):
        data.fail(f"--ensemble {args.ensemble}: the median is of maps of one image; give --image, and do not refine it")
    generated = [name for name in names if name not in strength]
    if isinstance(order, list):
        generated = [name for name in generated if name in order]
    if not generated:
        data.fail(f"--checkpoint {args.checkpoint}: has no modality but those given; nothing is left to generate")
    return Task(order, strength, measured, generated)


# ---- Jobs: which samples to make ----


@dataclass
class Job:
    """One sample to make."""

    name: str  # of its folder
    prompt: str
    seed: int
    paths: dict  # {modality: file} of its inputs


def list_inputs(path, name):
    """A file -> {"": path}; a directory -> {stem: path} of its files that hold the modality called name.

    Where a directory mixes modalities, as data.py writes it, its maps are called STEM.NAME.npy.
    """
    if not Path(path).is_dir():
        return {"": path}
    suffixes = data.FORMATS[MODALITIES[name].encoding].suffixes
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix[1:].lower() in suffixes]
    marked = [file for file in files if file.stem.endswith(f".{name}")]
    unmarked = [file for file in files if Path(file.stem).suffix[1:] not in (*MODALITIES, "mask")]
    chosen = marked or [file for file in unmarked if file.name != "grid.png"]

    found = {file.stem.removesuffix(f".{name}"): str(file) for file in chosen}
    if not found or len(found) < len(chosen):
        problem = "two files have the same name" if found else "there is no file"
        data.fail(f"--{WORDS[name]} {path}: {problem} among its {', '.join(suffixes)}")
    return found


def list_prompts(args, length):
    """All prompts. length: bytes of a prompt that the network reads; 0 for any."""
    prompts = list(args.prompt)
    if args.prompts:
        try:
            lines = data.read_file(args.prompts).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            data.fail(f"--prompts {args.prompts}: not a text file in UTF-8")
        except data.BadSample as error:
            data.fail(f"--prompts {args.prompts}: {error}")
        prompts += [line.strip() for line in lines if line.strip()]

    for prompt in prompts:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
            data.fail(f"prompt {prompt[:24]!r}: holds a control character or no text; remove it")
        lost = data.truncated_words(prompt, length) if length else ""
        if lost:
            data.fail(f'prompt "{prompt[:24]}...": too long, the network would not read "{lost}"; shorten it')
    return prompts or [""]


def list_jobs(args, length):
    """Every prompt for every input, args.count times. length is that of list_prompts."""
    prompts = list_prompts(args, length)
    inputs = {name: list_inputs(path, name) for name, path in input_paths(args).items()}
    stems = sorted(set.intersection(*map(set, inputs.values()))) if inputs else [""]
    flags = " and ".join(f"--{WORDS[name]}" for name in inputs)
    if not stems:
        data.fail(f"{flags}: no file of one has the name of a file of the other; give two files")
    unpaired = sorted(set().union(*inputs.values()) - set(stems))
    if unpaired:
        data.log(f"{flags}: {len(unpaired)} files are left out, such as {unpaired[0]}, which is not in all directories")

    jobs = []
    for stem in stems:
        paths = {name: files[stem] for name, files in inputs.items()}
        seed = args.seed + (zlib.crc32(stem.encode()) if stem else 0)  # so that no two inputs share their noise
        for i in range(len(prompts) * args.count):
            name = f"{stem}-{i:03}" if stem else f"{i:03}"
            jobs.append(Job(name, prompts[i // args.count], (seed + i) % 2**31, paths))
    return jobs


# ---- Inputs ----


@dataclass
class Item:
    """A job whose inputs are read."""

    job: Job
    maps: dict  # {modality: (values (C, H, W), valid (1, H, W))} of its files
    given: dict  # the same of what is given to the network, at size
    size: tuple  # (H, W) at which the network works
    shape: tuple  # (H, W) of the files, and of the result


def read_item(job, task, config, size):
    """Read the inputs of a job. Raises data.BadSample, whose message begins with the name of a file."""
    maps = {}
    for name, path in job.paths.items():
        with data.reading(path):
            values, valid = data.read_map(MODALITIES[name], path, data.read_file(path))
        maps[name] = torch.from_numpy(values.copy()).movedim(-1, 0), torch.from_numpy(valid)[None]
    if not maps:
        return Item(job, {}, {}, size, size)

    first = next(iter(maps))
    shape = tuple(maps[first][1].shape[1:])
    for name, (_, valid) in maps.items():
        path = job.paths[name]
        if valid.shape[1:] != shape:
            raise data.BadSample(f"{path}: has shape {tuple(valid.shape[1:])}; must have that of {first}, {shape}")
        if name in task.measured and valid.all():
            raise data.BadSample(f"{path}: misses no pixel, so nothing is left to complete; leave out one input")
    if min(shape) < config.patch:
        raise data.BadSample(f"{job.paths[first]}: has {shape} pixels; each side must be at least {config.patch}")

    size = config.fit(*shape, (size[0] * size[1]) ** 0.5)
    given = {name: resize_input(MODALITIES[name], *maps[name], size) for name in task.strength}
    return Item(job, maps, given, size, shape)


def resize_input(modality, values, valid, size):
    """Values (C, h, w), valid (1, h, w) at size (H, W): images are averaged, maps take the nearest valid pixel."""
    if modality.encoding == "plain":
        values = F.interpolate(values[None], size, mode="bicubic", antialias=True)
        return modality.finish(values)[0], torch.ones(1, *size, dtype=torch.bool)
    height, width = valid.shape[1:]
    values, valid = data.nearest(values.movedim(0, -1).numpy(), valid[0].numpy(), size, (0, 0, width, height))
    return torch.from_numpy(values).movedim(-1, 0), torch.from_numpy(valid)[None]


def read_batches(jobs, task, config, size, batch_size, problems):
    """Yield lists of at most batch_size items of equal size. Messages about inputs that cannot be read go to problems."""
    waiting = {}
    for job in jobs:
        try:
            item = read_item(job, task, config, size)
        except data.BadSample as error:
            if str(error) not in problems:
                data.log(str(error))
            problems.add(str(error))
            continue
        waiting.setdefault(item.size, []).append(item)
        if len(waiting[item.size]) == batch_size:
            yield waiting.pop(item.size)
    yield from waiting.values()


# ---- Sampling ----


class Sampler:
    """A network and its encoders, for one Task."""

    def __init__(self, network, encoders, task, args):
        self.network = network
        self.encoders = encoders
        self.task = task
        self.args = args
        self.device = network.text_tokenizer.weight.device
        self.modalities = {m.name: m for m in network.modalities}
        self.image = network.modalities[0].name

    def items_at_a_time(self):
        """How many items make --batch-size samples for the network: ensemble members and guided copies count."""
        guided = any(self.args.cfg.get(name, 1) != 1 for name in self.task.generated)
        copies = 2 if guided else 1
        return max(1, self.args.batch_size // (self.args.ensemble * copies))

    def encode(self, name, values, valid=None):
        """Stored values (B, C, H, W), valid (B, 1, H, W) -> (x0, valid), as DiT.sample takes what is given."""
        if name == self.image:
            return self.encoders.encode_image(values), None
        return self.modalities[name].encode(values, valid), valid

    def decode(self, name, x0):
        if name == self.image:
            x0 = self.encoders.decode_image(x0)
        m = self.modalities[name]
        return m.finish(m.decode(x0))

    def run(self, noise, text, given, order, strength):
        """One pass of the network: {m: (B, C, H, W)}, not decoded."""
        steps = self.args.steps or (I2D_STEPS if strength.get(self.image) == 1 else 50)
        schedule = make_schedule(list(noise), steps, order, strength)
        guidance = {name: scale for name, scale in self.args.cfg.items() if name not in given}
        return self.network.sample(schedule, noise, text, given, guidance, self.args.cfg_interval)

    def generate(self, items):
        """What is generated for items of equal size, all members of their ensembles: {m: (B, C, H, W)}, decoded."""
        members = [(item, k) for item in items for k in range(self.args.ensemble)]
        rng = data.PerSampleRNG("sample", [item.job.seed + (k << 32) for item, k in members])
        noise = {name: rng.randn(*m.shape(items[0].size)).to(self.device) for name, m in self.modalities.items()}
        text = self.encoders.encode_text([item.job.prompt for item, _ in members]).to(self.device)
        given = {}
        for name in self.task.strength:
            values = torch.stack([item.given[name][0] for item, _ in members]).to(self.device)
            valid = torch.stack([item.given[name][1] for item, _ in members]).to(self.device)
            given[name] = self.encode(name, values, valid)

        x0 = self.run(noise, text, given, self.task.order, self.task.strength)
        decoded = {name: self.decode(name, x0[name]) for name in self.task.generated}
        refined = self.args.refine
        if refined:
            others = given | {name: self.encode(name, values) for name, values in decoded.items()}
            others.pop(refined, None)
            x0 = self.run(noise, text, others, [refined], dict.fromkeys(others, 1.0))
            decoded[refined] = self.decode(refined, x0[refined])
        return decoded

    def finish(self, name, members, item):
        """Members of an ensemble (K, C, H, W) -> their median in the pixels of the item's files, (1, C, H, W)."""
        m = self.modalities[name]
        x = torch.from_numpy(np.median(members.float().cpu(), 0))[None]
        if item.shape != item.size:
            x = F.interpolate(x, item.shape, mode="bicubic" if m.encoding == "plain" else "bilinear")
        x = m.finish(x)
        if name in self.task.measured:
            values, valid = item.maps[name]
            x = COMPLETIONS[m.encoding](x, values[None], valid[None])
        return x

    def results(self, items):
        """Yield for each item {m: (values (C, H, W), valid (1, H, W))} of what is generated."""
        decoded = self.generate(items)
        for i, item in enumerate(items):
            members = slice(i * self.args.ensemble, (i + 1) * self.args.ensemble)
            valid = torch.ones(1, *item.shape, dtype=torch.bool)
            yield {name: (self.finish(name, x[members], item)[0], valid) for name, x in decoded.items()}


# ---- Files ----
# A writer gets the folder of a sample, a modality and all maps of the sample, {m: (values (C, H, W), valid (1, H, W))}.


def write_picture(folder, m, maps, fov):
    picture = data.paint(m, *maps[m.name])
    data.write_image(folder / f"{m.name}.png", Image.fromarray(picture))


def write_array(folder, m, maps, fov):
    data.write_bytes(folder / f"{m.name}.npy", data.array_bytes(*maps[m.name]))


def write_depth16(folder, m, maps, fov):
    """A 16-bit PNG that data.read_map reads: depth is its code times its text field "scale", and 0 is missing."""
    values, valid = maps[m.name]
    depth = torch.where(valid, values, 0)[0].numpy()
    scale = float(depth.max()) / 65535 or 1.0
    codes = np.where(depth > 0, np.round(depth / scale).clip(1), 0).astype(np.uint16)
    text = PngImagePlugin.PngInfo()
    text.add_text("scale", repr(scale))
    text.add_text("unit", f"that of {m.name}.npy")
    data.write_image(folder / f"{m.name}16.png", Image.fromarray(codes), pnginfo=text)


def write_depth_picture(folder, m, maps, fov):
    values, valid = maps[m.name]
    data.write_image(folder / f"{m.name}.png", depth_picture(values, valid & (values > 0)))


def depth_picture(depth, valid, side=256):
    """data.paint_depth as an Image, with a scale bar on its right that names the depths of the colours."""
    inverse = data.inverse_depth(depth, valid)
    far, near = data.inverse_depth_range(inverse)
    picture = data.enlarged(data.paint_inverse_depth(inverse, far, near), side)
    canvas = Image.new("RGB", (picture.width + 60, max(picture.height, 64)), "white")
    canvas.paste(picture)

    left = picture.width + 6
    length = canvas.height - 16
    bar = np.linspace(near, far, length)[:, None].repeat(10, 1)
    canvas.paste(Image.fromarray(data.paint_inverse_depth(bar, far, near)), (left, 8))
    for fraction in (0, 0.5, 1):
        number = 1 / max(near + fraction * (far - near), 1e-30)
        position = (left + 14, 8 + fraction * length)
        ImageDraw.Draw(canvas).text(position, f"{number:.3g}", fill="black", font_size=12, anchor="lm")
    return canvas


def write_cloud(folder, m, maps, fov):
    if RGB.name in maps:
        rgb = data.paint(RGB, *maps[RGB.name])
        depth = maps[m.name][0][0].numpy()
        valid = maps[m.name][1][0].numpy() & (depth > 0)
        write_ply(folder / "cloud.ply", rgb, depth, on_surface(depth, valid), fov)


def on_surface(depth, valid, tolerance=0.1):
    """Which pixels of depth (H, W) are no edge. On a plane, inverse depth is linear in the image; at an edge it bends."""
    inverse = 1 / np.where(valid, depth, np.nan)
    padded = np.pad(inverse, 1, mode="reflect", reflect_type="odd")
    vertical_bend = np.abs(2 * inverse - padded[:-2, 1:-1] - padded[2:, 1:-1])
    horizontal_bend = np.abs(2 * inverse - padded[1:-1, :-2] - padded[1:-1, 2:])
    bend = np.fmax(vertical_bend, horizontal_bend)
    return valid & ~(bend > tolerance * inverse)


def write_ply(path, rgb, depth, valid, fov):
    """Points of a pinhole camera as PLY: rgb (H, W, 3) uint8, depth and valid (H, W), vertical fov in degrees."""
    height, width = depth.shape
    row, column = np.mgrid[:height, :width]
    focal = height / 2 / np.tan(np.radians(fov) / 2)
    coordinates = [(axis, "<f4") for axis in ("x", "y", "z")]
    colors = [(color, "u1") for color in ("red", "green", "blue")]
    points = np.empty((height, width), coordinates + colors)
    points["x"] = (column + 0.5 - width / 2) / focal * depth
    points["y"] = (height / 2 - row - 0.5) / focal * depth
    points["z"] = -depth
    for i, (color, _) in enumerate(colors):
        points[color] = rgb[..., i]
    points = points[valid]

    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property float {axis}" for axis, _ in coordinates]
    lines += [f"property uchar {color}" for color, _ in colors]
    header = "\n".join([*lines, "end_header\n"])
    data.write_bytes(path, header.encode() + points.tobytes())


WRITERS = {  # the files of a modality, by its encoding
    "plain": [write_picture],
    "relative depth": [write_array, write_depth_picture, write_depth16, write_cloud],
    "unit vectors": [write_array, write_picture],
}


def write_sample(folder, modalities, maps, fov, metadata):
    folder.mkdir()
    for name in maps:
        m = modalities[name]
        for write in WRITERS[m.encoding]:
            write(folder, m, maps, fov)
    data.write_json(folder / "metadata.json", metadata)


def thumbnails(modalities, given, made):
    """{label of a row of grid.png: small picture (H, W, 3)} of what is given and what is made, {m: (values, valid)}."""
    pictures = {}
    for name, m in modalities.items():
        for origin, maps in (("given", given), ("made", made)):
            if name in maps:
                picture = data.enlarged(data.paint(m, *maps[name]), 128)
                pictures[f"{WORDS.get(name, name)}\n({origin})"] = np.asarray(picture)
    return pictures


def draw_samples(shown, columns=8):
    """grid.png from a list of (caption, thumbnails)."""
    rows = []
    labels = []
    for start in range(0, len(shown), columns):
        block = shown[start : start + columns]
        for label in block[0][1]:
            rows.append([pictures[label] for _, pictures in block])
            labels.append(label)
        rows.append([caption for caption, _ in block])
        labels.append("")
    return data.draw_grid(rows, labels)


def main():
    args = parse_flags()
    network, state = data.open_network(args.checkpoint)
    config = network.config
    task = read_task(args, network)
    size = read_size(args, config)
    device = data.pick_device(args.device)
    encoders = data.open_encoders(args.encoders, device, config, state["settings"].get("encoders", ""))
    jobs = list_jobs(args, 0 if config.text_dim else config.text_length)
    out = data.claim_folder(args.out)

    sampler = Sampler(network.to(device), encoders, task, args)
    common = {"checkpoint_step": state.get("step"), "torch": torch.__version__, "settings": vars(args)}
    problems = set()
    shown = []
    bar = tqdm(total=len(jobs), delay=1, leave=False)
    for items in read_batches(jobs, task, config, size, sampler.items_at_a_time(), problems):
        for item, made in zip(items, sampler.results(items), strict=True):
            maps = item.maps | made
            own = {**asdict(item.job), "generated": [*made], "measured": task.measured, "network_size": item.size}
            write_sample(out / item.job.name, sampler.modalities, maps, args.fov, own | common)
            if len(shown) < SHOWN:
                caption = f"{item.job.name} {item.job.prompt}"
                shown.append((caption, thumbnails(sampler.modalities, item.maps, made)))
            bar.update()
    bar.close()

    if shown:
        data.write_image(out / "grid.png", draw_samples(shown))
        print(f"samples in {out}; see {out}/grid.png")
    if problems:
        raise SystemExit(2)


if __name__ == "__main__":
    data.run_script(main)
