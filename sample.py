"""Generate images, depth and normals. What you give is kept, or trusted in part; the rest of --order is generated.

    python sample.py --prompt "a red ball in a room" --prompt "a blue box"      images and their depth
    python sample.py --prompt "..." --order depth,rgb                           depth first (or rgb,depth; rgb alone)
    python sample.py --image photo.jpg --ensemble 10                            depth of an image
    python sample.py --image photos/ --count 1 --out depths                     depth of all images of a directory
    python sample.py --depth depth.npy --prompt "..."                           images that have this depth
    python sample.py --depth sketch.npy --strength depth=0.8 --refine depth --prompt "..."      roughly this depth
    python sample.py --image photo.jpg --depth lidar.png        depth of the image, fitted to sparse depth, in its unit
    python sample.py --checkpoint FOLDER --backbone extras/flux2.py ...     FLUX.2 [klein] and others (docs/backbone.md)

If the checkpoint has surface normals, they are generated too, or you give them as --normal normals.npy.

Each sample gets a folder in --out. The folder holds a picture NAME.png of every modality and, of depth and normals, an
array NAME.npy (0 where missing). Depth is relative, or in the unit of the depth that you give. cloud.ply shows it as
coloured points, without the edges of objects. metadata.json holds the settings, and grid.png shows the first samples.
"""

import math
import zlib
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from model import DEPTH, I2D_STEPS, MODALITIES, RGB, SAMPLING_STEPS, complete_depth, make_schedule

INPUT_FLAGS = {"rgb": "image", "depth": "depth", "normal": "normal"}  # modality: the flag that gives it
NUM_SHOWN = 8  # samples in grid.png
FIELD_OF_VIEW = 55.0  # of cloud.ply, vertical, in degrees
EDGE = 0.1  # cloud.ply leaves out pixels where inverse depth bends by more than this share of it


# ---- The command line ----


def parse():
    p = data.Flags(__doc__)
    data.sampling_settings(p)
    p.setting("--prompt", [], "what the image shows; you may give several", action="append")
    p.setting("--image", "", "image, or directory of images")
    p.setting("--depth", "", "depth map (.npy or 16-bit .png; 0 is missing), or directory")
    p.setting("--normal", "", "surface normals (.npy of shape (H, W, 3); 0 is missing), or directory")
    p.setting("--strength", {}, "trust in inputs, 0 to 1, as depth=0.8 (default: 1 each)", data.by_modality(data.SHARE))
    p.setting("--order", "joint", "joint; log2(alpha) of Sec. 4.2, -14 to 14; or names, as depth,rgb or rgb alone")
    p.setting("--refine", "", "a modality to generate again after the first pass, given all others clean")
    p.setting("--count", 4, "number of samples for every prompt and every input", data.whole(1, 10**5))
    p.setting("--size", "", "pixels that the network sees, HxW or one side; inputs keep their aspect")
    default = f"(default: {SAMPLING_STEPS}, or {I2D_STEPS} from an image)"
    p.setting("--steps", 0, f"of each pass or turn {default}", data.whole(0, 10**4))
    p.setting("--cfg-interval", [0.0, 1.0], "noise levels at which guidance acts", data.SHARE, nargs=2, metavar="T")
    p.setting("--seed", 0, "of the first sample's noise; the next adds 1, a file of a directory its hash", data.SEED)
    data.encoders_setting(p)
    p.setting("--out", "runs/samples", "directory to write to, new or empty")
    args = p.parse_args()
    if args.cfg_interval[0] > args.cfg_interval[1]:
        data.fail(f"--cfg-interval {args.cfg_interval}: must be two noise levels, the lower first")
    args.prompt = args.prompt or [""]
    return args


# ---- Inputs ----

Job = namedtuple("Job", ["name", "prompt", "seed", "inputs"])  # one sample: its folder's name, ..., {modality: path}
Inputs = namedtuple("Inputs", ["maps", "given", "file_size", "network_size"])


def list_files(path, name):
    """A file -> {"": path}; a directory -> {stem: path} of its files of the modality called name.

    A directory that mixes modalities, as data.py writes it, calls its maps STEM.NAME.npy.
    """
    if not Path(path).is_dir():
        return {"": path}
    suffixes = data.FORMATS[MODALITIES[name].encoding].suffixes
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix[1:].lower() in suffixes]
    marked = [file for file in files if file.stem.endswith(f".{name}")]
    unmarked = [file for file in files if Path(file.stem).suffix[1:] not in MODALITIES and file.name != "grid.png"]
    if not marked and not unmarked:
        data.fail(f"--{INPUT_FLAGS[name]} {path}: holds no file of type {', '.join(suffixes)}")
    return {file.stem.removesuffix(f".{name}"): str(file) for file in marked or unmarked}


def list_inputs(args):
    """{stem: {modality: path}}: the files that belong together. The stem is empty if you give no directory."""
    names = [name for name, flag in INPUT_FLAGS.items() if getattr(args, flag)]
    files = defaultdict(dict)
    for name in names:
        for stem, path in list_files(getattr(args, INPUT_FLAGS[name]), name).items():
            files[stem][name] = path
    for paths in files.values():
        if len(paths) < len(names):
            path = next(iter(paths.values()))
            flags = " and ".join(f"--{INPUT_FLAGS[name]}" for name in names)
            data.fail(f"{flags}: must be files, or directories with equal names; {path} has no partner")
    return files or {"": {}}


def read_inputs(paths, sampler):
    """Read files that belong together, {modality: path}. Exit code 2 if one cannot be read.

    Returns Inputs: maps is {m: (values (C, H, W), valid (1, H, W))} in the pixels of the files, file_size (H, W). given
    has the maps that the network sees, resized to network_size (h, w).
    """
    maps = {}
    file_size = sampler.size
    for name, path in paths.items():
        try:
            with data.reading(path):  # depth keeps the unit of the file
                values, valid = data.read_map(MODALITIES[name], path, Path(path).read_bytes())
                if maps and valid.shape != file_size:
                    raise data.BadSample(f"has shape {valid.shape}; must have that of the other input, {file_size}")
        except data.BadSample as error:
            data.fail(f"--{INPUT_FLAGS[name]} {error}")
        file_size = valid.shape
        maps[name] = (torch.from_numpy(values.copy()).movedim(-1, 0), torch.from_numpy(valid)[None])

    side = math.prod(sampler.size) ** 0.5
    network_size = sampler.network.config.fit(*file_size, side)  # the aspect of the files, at the area of --size
    given = {name: resize_map(MODALITIES[name], *maps[name], network_size) for name in sampler.strength}
    return Inputs(maps, given, file_size, network_size)


def resize_map(m, values, valid, size):
    """Resize values (C, H, W) and valid (1, H, W). Images are averaged; a map takes the nearest valid pixel."""
    if m.encoding == "plain":
        values = F.interpolate(values[None], size, mode="bicubic", antialias=True)
        return m.finish(values)[0], torch.ones(1, *size, dtype=torch.bool)
    box = (0, 0, values.shape[2], values.shape[1])
    values, valid = data.nearest(values.movedim(0, -1).numpy(), valid[0].numpy(), size, box)
    return torch.from_numpy(values).movedim(-1, 0), torch.from_numpy(valid)[None]


def list_jobs(stem, paths, args):
    """The samples of one input: args.count for every prompt."""
    prefix = f"{stem}-" if stem else ""
    seed = args.seed + zlib.crc32(stem.encode())  # no two inputs share their noise; the CRC of an empty stem is 0
    jobs = []
    for i in range(len(args.prompt) * args.count):
        jobs.append(Job(f"{prefix}{i:03}", args.prompt[i // args.count], (seed + i) % 2**31, paths))
    return jobs


# ---- Sampling ----


class Sampler:
    """A network with its encoders, and what the command line asks of them. Exit code 2 if the network cannot do it.

    strength   {m: 0 to 1} of the modalities that the network is given
    generated  names of the modalities that the first pass generates
    completes_depth  depth and image are given: depth is generated from the image, then fitted to the given depth
    """

    def __init__(self, args):
        self.args = args
        self.device = data.pick_device(args.device)
        self.network, state = data.open_network(args.checkpoint, backbone=args.backbone)
        self.network.place(self.device, frozen=True)
        self.step = state.get("step")
        config = self.network.config
        self.encoders = data.open_encoders(args.encoders, self.device, config, state["settings"].get("encoders", ""))
        self.modalities = {m.name: m for m in config.modalities}
        self.check_prompts()

        self.size = data.parse_size(args.size) if args.size else (config.size, config.size)
        if self.size[0] % config.patch or self.size[1] % config.patch:
            data.fail(f"--size {args.size}: must be a multiple of the patch size, {config.patch}")
        self.choose_modalities()

    def check_prompts(self):
        """Refuse a prompt of more bytes than the network reads. With --encoders, the text encoder may cut it."""
        config = self.network.config
        for prompt in self.args.prompt:
            lost = "" if config.text_dim else data.truncated_words(prompt, config.text_length)
            if lost:
                data.fail(f'--prompt "{prompt[:24]}...": is too long, the network does not read "{lost}"; shorten it')

    def choose_modalities(self):
        args = self.args
        names = list(self.modalities)
        given = [name for name, flag in INPUT_FLAGS.items() if getattr(args, flag)]
        missing = {*given, args.refine} - {*names, ""}
        if missing:
            data.fail(f"--checkpoint {args.checkpoint}: has no {missing.pop()}, only {', '.join(names)}")
        if args.ensemble > 1 and RGB.name not in given:
            data.fail(f"--ensemble {args.ensemble}: requires --image; it is the median of maps of one image")

        self.completes_depth = RGB.name in given and DEPTH.name in given
        if self.completes_depth:
            given.remove(DEPTH.name)
        self.strength = {name: args.strength.get(name, 1.0) for name in given}
        for name in args.strength:
            if name not in given:
                data.fail(f"--strength {name}: the network is not given it, only {', '.join(given) or 'noise'}")

        self.order = data.parse_order(args.order, names)
        listed = self.order if isinstance(self.order, list) else names
        self.generated = [name for name in names if name in listed and name not in given]
        if not self.generated:
            data.fail(f"--checkpoint {args.checkpoint}: nothing is left to generate; it has {', '.join(names)}")

    def generate_batches(self, inputs, jobs):
        """Yield (job, generated maps) for all jobs of the same inputs, --batch-size samples at a time."""
        num_jobs = max(1, self.args.batch_size // self.args.ensemble)
        for start in tqdm(range(0, len(jobs), num_jobs), jobs[0].name, delay=1, leave=False):
            batch = jobs[start : start + num_jobs]
            yield from zip(batch, self.generate(inputs, batch), strict=True)

    def generate(self, inputs, jobs):
        """Generate the maps of each job: a list of {m: (values (C, H, W), valid (1, H, W))} in the files' pixels."""
        members = [(job, k) for job in jobs for k in range(self.args.ensemble)]
        rng = data.PerSampleRNG("sample", [job.seed + (k << 32) for job, k in members])
        noise = {name: rng.randn(*m.shape(inputs.network_size)).to(self.device) for name, m in self.modalities.items()}
        text = self.encoders.encode_text([job.prompt for job, _ in members]).to(self.device)
        given = {}
        for name, maps in inputs.given.items():
            values, valid = (x.to(self.device).expand(len(members), -1, -1, -1) for x in maps)
            given[name] = self.to_x0(name, values, valid)

        x0 = self.run_pass(noise, text, given, self.order, self.strength)
        generated = {name: self.from_x0(name, x0[name]) for name in self.generated}

        refined = self.args.refine
        if refined:
            known = dict(given)
            for name, values in generated.items():
                known[name] = self.to_x0(name, values)
            known.pop(refined, None)
            x0 = self.run_pass(noise, text, known, [refined], dict.fromkeys(known, 1.0))
            generated[refined] = self.from_x0(refined, x0[refined])

        merged = {name: self.merge(name, values, inputs) for name, values in generated.items()}
        valid = torch.ones(1, *inputs.file_size, dtype=torch.bool)
        return [{name: (values[i], valid) for name, values in merged.items()} for i in range(len(jobs))]

    def run_pass(self, noise, text, given, order, strength):
        """Sample all modalities once: {m: (B, C, h, w)}, to be decoded."""
        args = self.args
        # A clean image leaves little to choose, so few steps suffice.
        steps = args.steps or (I2D_STEPS if strength.get(RGB.name) == 1 else SAMPLING_STEPS)
        schedule = make_schedule(list(noise), steps, order, strength)
        no_text = self.encoders.no_text
        return self.network.sample(schedule, noise, text, given, args.cfg, args.cfg_interval, no_text=no_text)

    def to_x0(self, name, values, valid=None):
        """Values (B, C, h, w), valid (B, 1, h, w) or None -> (x0, valid), a modality that Denoiser.sample is given."""
        if name == RGB.name:
            return self.encoders.encode_image(values), None
        return self.modalities[name].encode(values, valid), valid

    def from_x0(self, name, x0):
        if name == RGB.name:
            x0 = self.encoders.decode_image(x0)
        m = self.modalities[name]
        return m.finish(m.decode(x0))

    def merge(self, name, values, inputs):
        """Decoded values of all members (B * K, C, h, w) -> their medians (B, C, H, W) in the files' pixels."""
        m = self.modalities[name]
        members = values.cpu().float().unflatten(0, (-1, self.args.ensemble))  # (B, K, C, h, w)
        x = torch.from_numpy(np.median(members, 1))  # (B, C, h, w)
        if inputs.file_size != inputs.network_size:
            x = F.interpolate(x, inputs.file_size, mode="bicubic" if m.encoding == "plain" else "bilinear")
        x = m.finish(x)
        if name == DEPTH.name and self.completes_depth:
            depth, valid = inputs.maps[name]
            x = complete_depth(x, depth.expand_as(x), valid.expand_as(x))
        return x


# ---- Files ----


def write_sample(folder, modalities, maps, metadata):
    """Write the folder of a sample. maps: {m: (values (C, H, W), valid (1, H, W))}, given and generated."""
    folder.mkdir()
    for name, (values, valid) in maps.items():
        m = modalities[name]
        data.write_image(folder / f"{name}.png", Image.fromarray(data.paint(m, values, valid)))
        if m.encoding != "plain":
            data.write_bytes(folder / f"{name}.npy", data.array_bytes(values, valid))
    if RGB.name in maps and DEPTH.name in maps:
        depth, valid = maps[DEPTH.name]
        surface = on_surface(depth[0].numpy(), (valid & (depth > 0))[0].numpy())
        write_ply(folder / "cloud.ply", data.paint(RGB, *maps[RGB.name]), depth[0].numpy(), surface)
    data.write_json(folder / "metadata.json", metadata)


def on_surface(depth, valid):
    """Where depth (H, W) has no edge: in the image of a plane inverse depth is linear, and at an edge it bends."""
    inverse = 1 / np.where(valid, depth, np.nan)
    padded = np.pad(inverse, 1, mode="reflect", reflect_type="odd")
    vertical_bend = np.abs(2 * inverse - padded[:-2, 1:-1] - padded[2:, 1:-1])
    horizontal_bend = np.abs(2 * inverse - padded[1:-1, :-2] - padded[1:-1, 2:])
    bend = np.fmax(vertical_bend, horizontal_bend)
    return valid & ~(bend > EDGE * inverse)


def write_ply(path, rgb, depth, valid):
    """Write the points that a pinhole camera saw in valid pixels: rgb (H, W, 3) uint8, depth and valid (H, W)."""
    height, width = depth.shape
    row, column = np.mgrid[:height, :width]
    focal = height / 2 / np.tan(np.radians(FIELD_OF_VIEW) / 2)
    x = (column + 0.5 - width / 2) / focal * depth
    y = (height / 2 - row - 0.5) / focal * depth
    points = np.stack([x, y, -depth], -1)[valid].astype("<f4")  # (N, 3)
    records = np.concatenate([points.view(np.uint8), rgb[valid]], 1)  # (N, 15): three floats, three bytes

    properties = [f"property float {axis}" for axis in ("x", "y", "z")]
    properties += [f"property uchar {color}" for color in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header\n"]
    data.write_bytes(path, "\n".join(header).encode() + records.tobytes())


def draw_samples(samples, modalities):
    """Draw samples, [(job, given maps, generated maps)], as a grid: a column for each, with its prompt below."""
    rows = defaultdict(list)
    for job, given, generated in samples:
        for name, m in modalities.items():
            for origin, maps in (("given", given), ("generated", generated)):
                if name in maps:
                    rows[f"{INPUT_FLAGS.get(name, name)}\n({origin})"].append(data.paint(m, *maps[name]))
        rows[""].append(f"{job.name} {job.prompt}")
    return data.draw_grid(list(rows.values()), list(rows))


def main():
    args = parse()
    sampler = Sampler(args)
    files = list_inputs(args)
    out = data.claim_folder(args.out)
    settings = {"checkpoint_step": sampler.step, "torch": torch.__version__, "settings": vars(args)}

    shown = []
    for stem, paths in files.items():
        inputs = read_inputs(paths, sampler)
        for job, generated in sampler.generate_batches(inputs, list_jobs(stem, paths, args)):
            metadata = {**job._asdict(), "generated": list(generated), "network_size": inputs.network_size, **settings}
            maps = inputs.maps | generated
            write_sample(out / job.name, sampler.modalities, maps, metadata)
            if len(shown) < NUM_SHOWN:
                shown.append((job, inputs.maps, generated))

    data.write_image(out / "grid.png", draw_samples(shown, sampler.modalities))
    print(f"{len(files) * len(args.prompt) * args.count} samples in {out}; see {out}/grid.png")


if __name__ == "__main__":
    data.run_script(main)
