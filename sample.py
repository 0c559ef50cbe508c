"""Generate samples. What you give is held clean, or trusted in part; everything else is generated.

    python sample.py --prompt "a red ball in a room" --prompt "a blue box"      images and their depth
    python sample.py --prompt "..." --order depth,rgb                           depth first (or rgb,depth; rgb alone)
    python sample.py --image photo.jpg --ensemble 10                            depth of an image
    python sample.py --image photos/ --count 1 --out depths                     depth of all images of a directory
    python sample.py --depth depth.npy --prompt "..."                           images that have this depth
    python sample.py --depth sketch.npy --strength depth=0.8 --refine depth --prompt "..."      roughly this depth
    python sample.py --image photo.jpg --depth lidar.png                        sparse depth completed, in its unit

If the checkpoint has surface normals, they are generated too, or given as --normal normals.npy.

Each sample gets a folder in --out. For every modality it holds NAME.png, a picture, and for all but the image NAME.npy
(0 where missing). Depth is relative, or in the unit of the depth that you give. It also comes as depth16.png (16 bits,
times its text field "scale") and as cloud.ply (coloured points; the edges of objects are left out). metadata.json holds
the settings, and grid.png shows the first samples.
"""

import math
import unicodedata
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import data
from model import I2D_STEPS, JOINT, MODALITIES, RGB, complete_depth, make_schedule

WORDS = {"rgb": "image", "depth": "depth", "normal": "normal"}  # what flags and labels call the modalities
COMPLETIONS = {"relative depth": complete_depth}  # by encoding: maps beside an image are measurements, to complete
SHOWN = 8  # samples in grid.png


# ---- What to generate ----


def parse_flags():
    p = data.Flags(__doc__)
    data.sampling_settings(p)
    p.setting("--prompt", [], "what the image shows; may be given several times", action="append")
    p.setting("--prompts", "", "text file with more prompts, one on each line")
    p.setting("--image", "", "image, or directory of images")
    p.setting("--depth", "", "depth (.npy, .pfm, 16-bit .png; 0 is missing), or directory; measured beside --image")
    p.setting("--normal", "", "surface normals (.npy of shape (H, W, 3); 0 is missing), or directory")
    trusted = "how far inputs are trusted, as rgb=0.5 or depth=0.8: 1 is clean, 0 is ignored"
    p.setting("--strength", {}, trusted, data.by_modality(data.SHARE))
    p.setting("--order", "joint", "joint; log2(alpha) of Sec. 4.2, -14 to 14; or names, as depth,rgb or rgb alone")
    p.setting("--refine", "", "modality to generate again in a second pass, from all others, held clean")
    p.setting("--count", 4, "number of samples of every prompt for every input", data.whole(1, 10**5))
    p.setting("--size", "", "pixels that the network sees, HxW or one side; files keep their aspect")
    steps = f"steps of each pass; 0 is {I2D_STEPS} where a clean image is given, else 50"
    p.setting("--steps", 0, steps, data.whole(0, 10**4))
    p.setting("--cfg-interval", [0.0, 1.0], "noise levels at which guidance acts", data.SHARE, nargs=2, metavar="T")
    p.setting("--fov", 55.0, "vertical field of view of cloud.ply, in degrees", data.number(1, 179))
    p.setting("--seed", 0, "seed of the noise of the first sample; every next sample adds 1", data.SEED)
    p.setting("--encoders", "", "FILE.py of the frozen encoders that the checkpoint was trained with; it is run")
    p.setting("--out", "runs/samples", "directory to write to, new or empty")
    args = p.parse_args()
    if args.cfg_interval[0] > args.cfg_interval[1]:
        data.fail(f"--cfg-interval {args.cfg_interval}: must be two noise levels, the lower first")
    return args


def list_prompts(args, length):
    """All prompts. length: bytes of a prompt that the network reads; 0 if it has a text encoder."""
    prompts = list(args.prompt)
    if args.prompts:
        try:
            with data.reading(f"--prompts {args.prompts}"):
                lines = data.read_file(args.prompts).decode("utf-8-sig").splitlines()
        except data.BadSample as error:
            data.fail(str(error))
        prompts += [line.strip() for line in lines if line.strip()]

    for prompt in prompts:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
            data.fail(f"--prompt {prompt[:24]!r}: must be text without control characters")
        lost = data.truncated_words(prompt, length) if length else ""
        if lost:
            data.fail(f'--prompt "{prompt[:24]}...": too long, the network would not read "{lost}"; shorten it')
    return prompts or [""]


# ---- Inputs ----


def list_files(path, name):
    """A file -> {"": path}; a directory -> {stem: path} of its files of the modality called name.

    Where a directory mixes modalities, as data.py writes it, maps are called STEM.NAME.npy.
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


def list_inputs(args):
    """{stem: {modality: path}}: the files that belong together, with an empty stem if no directory is given."""
    files = {name: list_files(getattr(args, word), name) for name, word in WORDS.items() if getattr(args, word)}
    if not files:
        return {"": {}}
    first = next(iter(files))
    for name, paths in files.items():
        unpaired = sorted(paths.keys() ^ files[first].keys())
        if unpaired:
            flags = f"--{WORDS[first]} and --{WORDS[name]}"
            data.fail(f"{flags}: must be two files, or directories with equal names; {unpaired[0]} has no partner")
    return {stem: {name: paths[stem] for name, paths in files.items()} for stem in files[first]}


@dataclass
class Inputs:
    """Files that belong together, read."""

    maps: dict  # {modality: (values (C, H, W), valid (1, H, W))}, in the pixels of the files
    given: dict  # the same for what is given to the network, at size
    size: tuple  # (H, W) at which the network works
    shape: tuple  # (H, W) of the files and of the result


def read_inputs(paths, sampler):
    """{modality: path} -> Inputs. Raises data.BadSample, whose message begins with the name of a file."""
    size = sampler.size
    shape = sampler.size
    maps = {}
    for name, path in paths.items():
        with data.reading(path):
            values, valid = data.read_map(MODALITIES[name], path, data.read_file(path))
            if maps and valid.shape != shape:
                raise data.BadSample(f"has shape {valid.shape}; must have that of the other input, {shape}")
        shape = valid.shape
        side = math.prod(sampler.size) ** 0.5
        size = sampler.network.config.fit(*shape, side)  # the aspect of the files, at the area of --size
        maps[name] = (torch.from_numpy(values.copy()).movedim(-1, 0), torch.from_numpy(valid)[None])
    given = {name: resize_input(MODALITIES[name], *maps[name], size) for name in sampler.strength}
    return Inputs(maps, given, size, shape)


def resize_input(m, values, valid, size):
    """A map (C, h, w), valid (1, h, w) at size (H, W): images are averaged, other maps take the nearest valid pixel."""
    if m.encoding == "plain":
        values = F.interpolate(values[None], size, mode="bicubic", antialias=True)
        return m.finish(values)[0], torch.ones(1, *size, dtype=torch.bool)
    whole = (0, 0, values.shape[2], values.shape[1])
    values, valid = data.nearest(values.movedim(0, -1).numpy(), valid[0].numpy(), size, whole)
    return torch.from_numpy(values).movedim(-1, 0), torch.from_numpy(valid)[None]


# ---- Sampling ----


@dataclass
class Job:
    """One sample to make."""

    name: str  # of its folder
    prompt: str
    seed: int
    inputs: dict  # {modality: path}


def list_jobs(stem, paths, prompts, args):
    """The samples of one input: args.count for every prompt."""
    prefix = f"{stem}-" if stem else ""
    seed = args.seed + (zlib.crc32(stem.encode()) if stem else 0)  # so that no two inputs share their noise
    jobs = []
    for i in range(len(prompts) * args.count):
        jobs.append(Job(f"{prefix}{i:03}", prompts[i // args.count], (seed + i) % 2**31, paths))
    return jobs


@dataclass
class Sampler:
    """A network, and what the command line asks of it."""

    args: object
    network: object
    encoders: object
    modalities: dict  # {name: Modality}
    image: str  # name of the first modality, on which the encoders act
    size: tuple  # (H, W) that the network sees where no file is given
    order: object  # log2(alpha) or a list of names, as make_schedule takes it
    strength: dict  # {modality: 0 to 1} of what is given
    measured: list  # modalities that are given beside an image: generated, then corrected to equal the input
    generated: list  # modalities that the first pass generates

    def jobs_at_a_time(self):
        """How many jobs make --batch-size samples for the network: ensemble members and guided copies count."""
        guided = any(self.args.cfg.get(name, 1) != 1 for name in self.generated)
        copies = 2 if guided else 1
        return max(1, self.args.batch_size // (self.args.ensemble * copies))

    def encode(self, name, values, valid=None):
        """Values (B, C, H, W), valid (B, 1, H, W) or None -> (x0, valid), as DiT.sample takes what is given."""
        if name == self.image:
            return self.encoders.encode_image(values), None
        return self.modalities[name].encode(values, valid), valid

    def decode(self, name, x0):
        if name == self.image:
            x0 = self.encoders.decode_image(x0)
        m = self.modalities[name]
        return m.finish(m.decode(x0))

    def run(self, noise, text, given, order, strength):
        """One pass: {m: (B, C, H, W)}, not decoded."""
        steps = self.args.steps or (I2D_STEPS if strength.get(self.image) == 1 else 50)
        schedule = make_schedule(list(noise), steps, order, strength)
        return self.network.sample(schedule, noise, text, given, self.args.cfg, self.args.cfg_interval)

    def generate(self, inputs, jobs):
        """Returns for each job what is generated, {m: (values (C, H, W), valid (1, H, W))}."""
        members = [(job, k) for job in jobs for k in range(self.args.ensemble)]
        rng = data.PerSampleRNG("sample", [job.seed + (k << 32) for job, k in members])
        device = next(self.network.parameters()).device
        noise = {name: rng.randn(*m.shape(inputs.size)).to(device) for name, m in self.modalities.items()}
        text = self.encoders.encode_text([job.prompt for job, _ in members]).to(device)
        given = {}
        for name, (values, valid) in inputs.given.items():
            values = values.to(device).repeat(len(members), 1, 1, 1)
            valid = valid.to(device).repeat(len(members), 1, 1, 1)
            given[name] = self.encode(name, values, valid)

        x0 = self.run(noise, text, given, self.order, self.strength)
        made = {name: self.decode(name, x0[name]) for name in self.generated}
        if self.args.refine:
            refined = self.args.refine
            others = given | {name: self.encode(name, values) for name, values in made.items()}
            others.pop(refined, None)
            x0 = self.run(noise, text, others, [refined], dict.fromkeys(others, 1.0))
            made[refined] = self.decode(refined, x0[refined])

        ensembles = {name: values.cpu().split(self.args.ensemble) for name, values in made.items()}
        return [{name: self.finish(name, ensembles[name][i], inputs) for name in made} for i in range(len(jobs))]

    def finish(self, name, members, inputs):
        """Decoded members of an ensemble (K, C, H, W) -> (values (C, H, W), valid (1, H, W)) in the files' pixels."""
        m = self.modalities[name]
        x = torch.from_numpy(np.median(members.float(), 0))[None]
        if inputs.shape != inputs.size:
            x = F.interpolate(x, inputs.shape, mode="bicubic" if m.encoding == "plain" else "bilinear")
        x = m.finish(x)
        if name in self.measured:
            values, valid = inputs.maps[name]
            x = COMPLETIONS[m.encoding](x, values[None], valid[None])
        return x[0], torch.ones(1, *inputs.shape, dtype=torch.bool)


def make_sampler(args, network, encoders):
    """The Sampler for a command line. Exit code 2 if the network cannot do what it asks."""
    config = network.config
    size = data.parse_size(args.size) if args.size else (config.size, config.size)
    if size[0] % config.patch or size[1] % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size, {config.patch}")

    names = [m.name for m in config.modalities]
    image = names[0]
    inputs = [name for name, word in WORDS.items() if getattr(args, word)]
    missing = [name for name in [*inputs, args.refine] if name and name not in names]
    if missing:
        data.fail(f"--checkpoint {args.checkpoint}: has no {missing[0]}, only {', '.join(names)}; give one that has it")

    measured = [name for name in inputs if image in inputs and MODALITIES[name].encoding in COMPLETIONS]
    strength = {name: args.strength.get(name, 1.0) for name in inputs if name not in measured}
    unused = [name for name in args.strength if name not in strength]
    if unused:
        data.fail(f"--strength {unused[0]}: {unused[0]} is not given, or measured beside an image; leave it out")
    if args.ensemble > 1 and (image not in inputs or args.refine == image):
        data.fail(f"--ensemble {args.ensemble}: is the median of the maps of one --image; leave it out")
    if inputs and args.order != "joint":
        data.fail(f"--order {args.order}: inputs always come first, by their --strength; leave it out")

    order = JOINT if args.order == "joint" else data.parse_order(args.order, names)
    listed = order if isinstance(order, list) else names
    generated = [name for name in names if name in listed and name not in strength]
    if not generated:
        data.fail(f"--checkpoint {args.checkpoint}: has no modality but those given, so nothing is left to generate")
    modalities = {m.name: m for m in config.modalities}
    return Sampler(args, network, encoders, modalities, image, size, order, strength, measured, generated)


# ---- Files ----
# A writer gets the folder of a sample, a modality, and its maps, {m: (values (C, H, W), valid (1, H, W))}.


def write_picture(folder, m, maps, args):
    data.write_image(folder / f"{m.name}.png", Image.fromarray(data.paint(m, *maps[m.name])))


def write_array(folder, m, maps, args):
    data.write_bytes(folder / f"{m.name}.npy", data.array_bytes(*maps[m.name]))


def write_depth16(folder, m, maps, args):
    """A 16-bit PNG that data.read_map reads: depth is its code times its text field "scale", and 0 is missing."""
    values, valid = maps[m.name]
    depth = torch.where(valid, values, 0)[0].numpy()
    scale = float(depth.max()) / 65535 or 1.0
    codes = np.where(depth > 0, np.round(depth / scale).clip(1), 0).astype(np.uint16)
    text = PngImagePlugin.PngInfo()
    text.add_text("scale", repr(scale))
    text.add_text("unit", f"that of {m.name}.npy")
    data.write_image(folder / f"{m.name}16.png", Image.fromarray(codes), pnginfo=text)


def write_cloud(folder, m, maps, args):
    """The pixels of the image as points, where a pinhole camera saw them."""
    if RGB.name not in maps:
        return
    rgb = data.paint(RGB, *maps[RGB.name])
    values, valid = maps[m.name]
    valid = (valid & (values > 0))[0].numpy()
    depth = values[0].numpy()
    write_ply(folder / "cloud.ply", rgb, depth, on_surface(depth, valid), args.fov)


def on_surface(depth, valid, tolerance=0.1):
    """Where depth (H, W) has no edge: in the image of a plane inverse depth is linear, and at an edge it bends."""
    inverse = 1 / np.where(valid, depth, np.nan)
    padded = np.pad(inverse, 1, mode="reflect", reflect_type="odd")
    vertical_bend = np.abs(2 * inverse - padded[:-2, 1:-1] - padded[2:, 1:-1])
    horizontal_bend = np.abs(2 * inverse - padded[1:-1, :-2] - padded[1:-1, 2:])
    bend = np.fmax(vertical_bend, horizontal_bend)
    return valid & ~(bend > tolerance * inverse)


def write_ply(path, rgb, depth, valid, fov):
    """Coloured points as PLY: rgb (H, W, 3) uint8; depth, valid (H, W); fov of the height, in degrees."""
    height, width = depth.shape
    row, column = np.mgrid[:height, :width]
    focal = height / 2 / np.tan(np.radians(fov) / 2)
    x = (column + 0.5 - width / 2) / focal * depth
    y = (height / 2 - row - 0.5) / focal * depth
    points = np.stack([x, y, -depth], -1)[valid].astype("<f4")  # (N, 3)
    records = np.concatenate([points.view(np.uint8), rgb[valid]], 1)  # (N, 15): three floats, three bytes

    properties = [f"property float {axis}" for axis in ("x", "y", "z")]
    properties += [f"property uchar {color}" for color in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header\n"]
    data.write_bytes(path, "\n".join(header).encode() + records.tobytes())


WRITERS = {  # by encoding
    "plain": [write_picture],
    "relative depth": [write_array, write_picture, write_depth16, write_cloud],
    "unit vectors": [write_array, write_picture],
}


def write_sample(folder, modalities, maps, args, metadata):
    folder.mkdir()
    for name in maps:
        for write in WRITERS[modalities[name].encoding]:
            write(folder, modalities[name], maps, args)
    data.write_json(folder / "metadata.json", metadata)


def label_pictures(modalities, given, made):
    """{label: picture (H, W, 3)} of what is given and what is made, {m: (values, valid)}, small enough for a grid."""
    pictures = {}
    for name, m in modalities.items():
        for origin, maps in (("given", given), ("made", made)):
            if name in maps:
                picture = data.enlarged(data.paint(m, *maps[name]), 128)
                pictures[f"{WORDS.get(name, name)}\n({origin})"] = np.asarray(picture)
    return pictures


def generate_files(sampler, inputs, jobs, out, settings):
    """Generate jobs of the same inputs and write them. Yields for each (caption, pictures), to be shown in the grid."""
    step = sampler.jobs_at_a_time()
    for start in tqdm(range(0, len(jobs), step), jobs[0].name, delay=1, leave=False):
        batch = jobs[start : start + step]
        for job, made in zip(batch, sampler.generate(inputs, batch), strict=True):
            metadata = {**asdict(job), "generated": list(made), "network_size": inputs.size, **settings}
            write_sample(out / job.name, sampler.modalities, inputs.maps | made, sampler.args, metadata)
            yield f"{job.name} {job.prompt}", label_pictures(sampler.modalities, inputs.maps, made)


def main():
    args = parse_flags()
    device = data.pick_device(args.device)
    network, state = data.open_network(args.checkpoint)
    config = network.config
    encoders = data.open_encoders(args.encoders, device, config, state["settings"].get("encoders", ""))
    sampler = make_sampler(args, network.to(device), encoders)
    prompts = list_prompts(args, 0 if config.text_dim else config.text_length)
    files = list_inputs(args)
    out = data.claim_folder(args.out)

    settings = {"checkpoint_step": state.get("step"), "torch": torch.__version__, "settings": vars(args)}
    shown = []
    num_unreadable = 0
    num_samples = 0
    for stem, paths in files.items():
        try:
            inputs = read_inputs(paths, sampler)
        except data.BadSample as error:
            data.log(str(error))
            num_unreadable += 1
            continue
        for labelled in generate_files(sampler, inputs, list_jobs(stem, paths, prompts, args), out, settings):
            num_samples += 1
            if len(shown) < SHOWN:
                shown.append(labelled)

    if shown:
        rows = {label: [pictures[label] for _, pictures in shown] for label in shown[0][1]}
        rows[""] = [caption for caption, _ in shown]
        data.write_image(out / "grid.png", data.draw_grid(list(rows.values()), list(rows)))
        print(f"{num_samples} samples in {out}; see {out}/grid.png")
    if num_unreadable:
        raise SystemExit(2)


if __name__ == "__main__":
    data.run_script(main)
