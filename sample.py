"""Sample. What you give is held clean, or in part; what you don't give is generated; --order says which comes first.

    python sample.py --prompt "a red ball in a room" --prompt "a blue box"      images and their depth
    python sample.py --prompt "..." --order depth,rgb                           depth first (or rgb,depth; rgb alone)
    python sample.py --image photo.jpg --ensemble 10                            depth of an image
    python sample.py --image photos/ --count 1 --out depths --resume            depth of all images of a directory
    python sample.py --depth depth.npy --prompt "..."                           images that have this depth
    python sample.py --depth sketch.png --depth-strength 0.8 --refine depth --prompt "..."      roughly this depth
    python sample.py --image photo.jpg --depth lidar.png                        sparse depth completed, in its own unit

Each sample gets a folder in --out: rgb.png; depth.npy (0 where missing; relative, or in the unit of the depth given),
depth16.png (the same, over its text field "scale"), depth.png (coloured, near is bright), cloud.ply (coloured points,
edges left out) and metadata.json, whose command makes this sample again. grid.png shows the first of them.
"""

import shlex
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import data
from model import I2D_STEPS, JOINT, Config, DiT, complete_depth, noise_levels

ORDERS = {"": JOINT, "joint": JOINT, "image-first": ["rgb", "depth"], "depth-first": ["depth", "rgb"]}
OF_THE_CALL = {"count", "out", "resume", "batch_size", "device", "animate", "prompts"}  # settings that no sample sees


def parse():
    p = data.Flags(__doc__)
    data.sampling_settings(p)
    p.setting("--prompt", [], "what the picture shows; may be given several times", action="append")
    p.setting("--prompts", "", "file of more prompts, one a line")
    p.setting("--image", "", "image, or directory of images, to generate depth from")
    measured = "beside --image, in its pixels (in directories: files of one name), it is measured, and completed"
    p.setting("--depth", "", f"depth map or directory: .npy, .pfm, 16-bit .png, 0 where missing; {measured}")
    p.setting("--image-strength", 1.0, "how far the image given is trusted: 1 is clean, 0 ignored", data.SHARE)
    p.setting("--depth-strength", 1.0, "the same for --depth, without an image", data.SHARE)
    names = "or names rgb,depth (image-first), depth,rgb (depth-first), rgb alone"
    p.setting("--order", "", f"joint (if not given); log2(alpha) of Sec. 4.2, -14 to 14 (joint: {JOINT:g}); {names}")
    refined = "rgb or depth: regenerate it from the other in a second pass"
    p.setting("--refine", "", refined, data.one_of("", "rgb", "depth"))
    p.setting("--count", 4, "samples of every prompt for every input", data.whole(1, 10**5))
    size = "HxW in pixels, or a side; empty is the network's. An input keeps its shape, in this area"
    p.setting("--size", "", size, data.size_text())
    steps = f"steps of a pass; 0 is {I2D_STEPS} where the image is given, clean, else 50"
    p.setting("--steps", 0, steps, data.whole(0, 10**4))
    p.setting("--cfg-depth", 1.0, "classifier-free guidance of the depth", data.number(0, 100))
    p.setting("--cfg-interval", [0.0, 1.0], "noise levels where guidance acts", data.SHARE, nargs=2, metavar="T")
    p.setting("--fov", 55.0, "vertical field of view of cloud.ply, in degrees", data.number(1, 179))
    p.setting("--animate", False, "also animation.gif: how the first four lose their noise")
    p.setting("--seed", 0, "of the first sample's noise; the next one's is one more", data.SEED)
    p.setting("--encoders", "", "FILE.py of the frozen encoders that the checkpoint was trained with; it is run")
    p.setting("--resume", False, "go on with an --out that has samples: what is there is skipped")
    p.setting("--out", "runs/samples", "directory to write to, new or empty unless you --resume")
    args = p.parse_args()

    for flag in ("image", "depth"):
        strength = getattr(args, f"{flag}_strength")
        if strength < 1 and not getattr(args, flag):
            data.fail(f"--{flag}-strength {strength}: of no --{flag}; give one")
    if args.image and args.depth_strength < 1:
        data.fail(f"--depth-strength {args.depth_strength}: beside an --image depth is measured, so kept; leave it out")
    if args.order and (args.image or args.depth):
        data.fail(f"--order {args.order}: what is given comes first (--image-strength, --depth-strength); leave it out")
    if args.ensemble > 1 and (not args.image or args.refine == "rgb"):
        data.fail(f"--ensemble {args.ensemble}: it is for depth from an --image; leave it out")
    if (args.image and args.refine == "depth") or (args.depth and not args.image and args.refine == "rgb"):
        data.fail(f"--refine {args.refine}: it is made from what is given in the first pass; leave it out")
    if args.image and args.image_strength == 1 and args.refine:
        data.fail(f"--refine {args.refine}: the image is given, clean; leave it out, or lower --image-strength")
    if args.cfg_interval[0] > args.cfg_interval[1]:
        data.fail(f"--cfg-interval {args.cfg_interval}: must be two noise levels, the lower first")
    return args, {action.dest: action.default for action in p._actions}


def read_order(args, names):
    """--order -> log2(alpha), or a list of names. Refuses what a network of these modalities can't make."""
    if "depth" not in names and (args.image or args.depth or args.refine or args.order not in ("", "rgb")):
        data.fail(f"--checkpoint {args.checkpoint}: a text-to-image one knows no depth; give one of train_forcing.py")
    order = ORDERS[args.order] if args.order in ORDERS else data.parse_order(args.order, names)
    other = {"rgb": "depth", "depth": "rgb"}.get(args.refine)
    if other and isinstance(order, list) and other not in order:
        data.fail(f"--refine {args.refine}: there is no {other} to make it from; add it to --order {args.order}")
    return order


@dataclass
class Job:
    """One sample to be: its folder's name and what it is made from."""

    name: str
    prompt: str
    image: str
    depth: str
    seed: int
    given: dict = field(default_factory=dict)
    """{modality: (stored values (C, H, W), valid (1, H, W))} in the pixels of the files, once they are read."""
    seen: dict = field(default_factory=dict)
    """The same at the size at which the network sees it."""


def list_inputs(path, flag, suffixes):
    """A file -> {"": path}; a directory -> {name: path} of its files with these suffixes; .depth is not of the name."""
    if not Path(path).is_dir():
        return {"": path}
    files = [p for p in sorted(Path(path).iterdir()) if p.suffix[1:].lower() in suffixes and p.name != "grid.png"]
    maps = [p for p in files if p.stem.endswith(".depth")]  # beside images, as data.py writes them
    files = (maps or files) if flag == "--depth" else [p for p in files if not p.stem.endswith((".depth", ".mask"))]
    found = {p.stem.removesuffix(".depth"): str(p) for p in files}
    if not found or len(found) < len(files):
        data.fail(f"{flag} {path}: {'two files of one name' if found else 'no file'} among its {', '.join(suffixes)}")
    return found


def read_prompts(path):
    """The lines of a text file, --prompts, that are not empty."""
    try:
        text = data.read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        data.fail(f"--prompts {path}: not a text file in UTF-8")
    except data.BadSample as error:
        data.fail(f"--prompts {path}: {error}")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]


def list_jobs(args, length):
    """Every prompt for every input, args.count times. length: bytes of a prompt that the network reads, 0 is any."""
    prompts = list(args.prompt)
    if args.prompts:
        prompts += read_prompts(args.prompts)
    prompts = prompts or [""]
    for prompt in prompts:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
            data.fail(f"prompt {prompt[:24]!r}: holds a control character, or what is no text; leave it out")
        if length and (cut := data.left_out(prompt, length)):
            data.fail(f'prompt "{prompt[:24]}...": too long, the network would not read "{cut}"; shorten it')
    kinds = {"image": data.IMAGES, "depth": data.MAPS}
    inputs = {m: list_inputs(path, f"--{m}", kinds[m]) for m in kinds if (path := getattr(args, m))}
    stems = sorted(set.intersection(*map(set, inputs.values()))) if inputs else [""]
    if not stems:
        data.fail(f"--depth {args.depth}: no file of the name of one of --image {args.image}; give two files")
    if alone := sorted(set().union(*inputs.values()) - set(stems)):
        data.tell(f"{len(alone)} files are left out: {alone[0]} is not in both directories")
    jobs = []
    for stem in stems:
        paths = {m: inputs[m][stem] if m in inputs else "" for m in kinds}
        first = args.seed + (zlib.crc32(stem.encode()) if stem else 0)  # inputs do not share their noise
        for i, prompt in enumerate(p for p in prompts for _ in range(args.count)):
            jobs.append(Job(f"{stem}-{i:03}" if stem else f"{i:03}", prompt, **paths, seed=(first + i) % 2**31))
    return jobs


def read_inputs(job, args, config, area):
    """Fill in job.given and job.seen -> the latter's size (H, W), which keeps the shape in about this area.

    Raises data.BadSample, whose message begins with the file's name.
    """
    if job.image:
        rgb, shape = data.parse(job.image, lambda: data.load_rgb(data.read_file(job.image)))
        job.given["rgb"] = torch.from_numpy(rgb.copy()).movedim(-1, 0) / 127.5 - 1, torch.ones(1, *shape) > 0
    if job.depth:
        depth, valid = data.parse(job.depth, lambda: data.read_depth(job.depth, data.read_file(job.depth)))
        job.given["depth"], whole = (torch.from_numpy(depth)[None], torch.from_numpy(valid)[None]), valid.all()
        if job.image and depth.shape != shape:
            data.refuse(f"{job.depth}: its shape is {depth.shape}; must be that of {job.image}, {shape}")
        if job.image and whole:
            data.refuse(f"{job.depth}: misses no pixel, so beside --image nothing is left to generate; leave one out")
        if whole and args.refine == "depth" and args.depth_strength == 1:
            data.refuse(f"{job.depth}: is whole and clean, nothing to --refine; lower --depth-strength")
        shape = depth.shape
    if min(shape) < config.patch:
        data.refuse(f"{job.image or job.depth}: {shape} pixels, less than a patch of {config.patch}; give a larger one")
    size = config.fit(*shape, area**0.5)
    if job.image:
        seen = F.interpolate(job.given["rgb"][0][None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        job.seen["rgb"] = seen, torch.ones(1, *size) > 0
    if job.depth:
        seen = data.nearest(depth, valid, size, (0, 0, shape[1], shape[0]))
        job.seen["depth"] = tuple(torch.from_numpy(x)[None] for x in seen)
    return size


def jobs_at_a_time(args):
    """How many jobs make --batch-size samples for the network: one job is several in an ensemble, or guided."""
    image_is_given = args.image and args.image_strength == 1
    guided = args.cfg_depth != 1 or (args.cfg != 1 and not image_is_given)
    copies = 2 if guided else 1
    return max(1, args.batch_size // (args.ensemble * copies))


def batches(jobs, args, config, size, refused):
    """(size, jobs of this size, read), as many as go through the network at a time.

    An input that can't be used ends the program; in a directory it is reported, left out, and added to refused.
    """
    waiting, many = {}, any(Path(path).is_dir() for path in (args.image, args.depth) if path)
    for job in jobs:
        try:
            seen_at = read_inputs(job, args, config, size[0] * size[1]) if job.image or job.depth else size
        except data.BadSample as error:
            if not many:
                data.fail(str(error))
            if str(error) not in refused:
                data.tell(str(error))
            refused.add(str(error))
            continue
        waiting.setdefault(seen_at, []).append(job)
        if len(waiting[seen_at]) == jobs_at_a_time(args):
            yield seen_at, waiting.pop(seen_at)
    yield from waiting.items()


def generate(model, encoders, jobs, size, args, order, watch):
    """-> for each job {modality: (values (C, H, W), valid (1, H, W))}, in the pixels of what is given.

    Each task is a table of noise levels and what is known: model.noise_levels and DiT.sample tell.
    """
    entries, members = {m.name: m for m in model.modalities}, range(args.ensemble)
    device = model.text_tokenizer.weight.device
    known = {}
    for m in jobs[0].seen:
        parts = zip(*(job.seen[m] for job in jobs for _ in members), strict=True)
        known[m] = tuple(torch.stack(part).to(device) for part in parts)
    if args.image:
        known["rgb"] = encoders.encode_image(known["rgb"][0]), None
        strength = {"rgb": args.image_strength}  # depth beside it is measured, and completed
    else:
        strength = {m: args.depth_strength for m in known}
    draws = data.Draws("sample", [job.seed + (k << 32) for job in jobs for k in members])
    noise = {m: draws.randn(*entries[m].shape(size)).to(device) for m in entries}
    text = encoders.encode_text([job.prompt for job in jobs for _ in members]).to(device)

    def run(order, strength, known):
        steps = args.steps or (I2D_STEPS if strength.get("rgb") == 1 else 50)
        levels = noise_levels(list(entries), steps, order, strength)
        share = 1 / (len(levels["rgb"]) - 1) / (2 if args.refine else 1)  # of all steps
        guidance, tell = {"rgb": args.cfg, "depth": args.cfg_depth}, lambda x: watch(x, share)
        x = model.sample(levels, noise, text, known, guidance, args.cfg_interval, args.solver, tell, hints=strength)
        made = {m: entries[m].decode(x[m], *known.get(m, ())) for m in x}
        return made | {"rgb": encoders.decode_image(made["rgb"]).clamp(-1, 1)}

    made = run(order, strength, known)
    kept = {m for m in known if m != args.refine or strength.get(m, 1) == 1}  # a hint is made again as a whole
    if args.refine:
        finished = made if args.refine == "rgb" else made | {"rgb": encoders.encode_image(made["rgb"])}
        others = {m: (finished[m], None) for m in made if m != args.refine}
        measured = {m: known[m] for m in kept if m == args.refine}
        made[args.refine] = run(JOINT, dict.fromkeys(others, 1.0), others | measured)[args.refine]
    results = []
    for i, job in enumerate(jobs):
        result, shape = {}, next(iter(job.given.values()))[1].shape[1:] if job.given else size
        for m in made:
            if isinstance(order, list) and m not in order and m != args.refine:
                continue  # it stayed noise
            x = torch.from_numpy(np.median(made[m][i * len(members) :][: len(members)].float().cpu(), 0))
            x = F.interpolate(x[None], shape, mode="bicubic" if m == "rgb" else "bilinear")[0] if shape != size else x
            if m in strength and m != args.refine:
                result[m] = job.given[m]
                continue
            if m in kept:  # in the files' pixels, of which the network has seen few
                values, valid = job.given[m]
                x = values if valid.all() else complete_depth(x[None], values[None], valid[None])[0]
            result[m] = x, torch.ones(1, *shape) > 0
        results.append(result)
    return results


def on_surface(depth, valid, tolerance=0.1):
    """Where depth (H, W) is no edge, bool: on any plane inverse depth is linear in the image, at an edge it bends."""
    near = np.pad(1 / np.where(valid, depth, np.nan), 1, mode="reflect", reflect_type="odd")
    middle, up, down, left, right = near[1:-1, 1:-1], near[:-2, 1:-1], near[2:, 1:-1], near[1:-1, :-2], near[1:-1, 2:]
    bend = np.fmax(np.abs(2 * middle - up - down), np.abs(2 * middle - left - right))
    return valid & ~(bend > tolerance * middle)


def write_ply(path, rgb, depth, valid, fov):
    """Coloured points of a pinhole camera as PLY: rgb (H, W, 3) uint8, depth, valid (H, W), vertical fov in degrees."""
    height, width = depth.shape
    y, x = np.mgrid[:height, :width]
    focal = height / 2 / np.tan(np.radians(fov) / 2)
    points = np.empty((height, width), [(c, "<f4") for c in "xyz"] + [(c, "u1") for c in ("red", "green", "blue")])
    points["x"], points["y"] = (x + 0.5 - width / 2) / focal * depth, (height / 2 - y - 0.5) / focal * depth
    points["z"] = -depth
    points["red"], points["green"], points["blue"] = np.moveaxis(rgb, -1, 0)
    points = points[valid]
    properties = "".join(f"property {'float' if c in 'xyz' else 'uchar'} {c}\n" for c in points.dtype.names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    data.write_bytes(path, header.encode() + points.tobytes())


def write(folder, made, metadata, fov):
    """The files of one sample; metadata.json last, so that it tells that the others are there."""
    for m in made.keys() - {"rgb", "depth"}:
        data.write_bytes(folder / f"{m}.npy", data.to_bytes(np.save, made[m][0].numpy()))
    if "rgb" in made:
        rgb = data.paint_rgb(made["rgb"][0])
        data.write_image(folder / "rgb.png", Image.fromarray(rgb))
    if "depth" in made:
        values, valid = made["depth"]
        depth, valid = torch.where(valid, values, 0)[0].numpy(), (valid & (values > 0))[0].numpy()
        data.write_bytes(folder / "depth.npy", data.to_bytes(np.save, depth))
        data.write_image(folder / "depth.png", data.depth_picture(values, torch.from_numpy(valid)[None]))
        metadata["depth16_scale"], text = float(depth.max()) / 65535 or 1.0, PngImagePlugin.PngInfo()
        text.add_text("scale", repr(metadata["depth16_scale"])), text.add_text("unit", metadata["depth_unit"])
        codes = np.where(valid, np.round(depth / metadata["depth16_scale"]).clip(1), 0).astype(np.uint16)
        data.write_image(folder / "depth16.png", Image.fromarray(codes), pnginfo=text)
        if "rgb" in made:
            write_ply(folder / "cloud.ply", rgb, depth, on_surface(depth, valid), fov)
    data.write_json(folder / "metadata.json", metadata)


def command(settings, defaults):
    """The command line that makes one sample again."""
    words = ["python", "sample.py", "--count", "1"]
    for key, value in settings.items():
        if key == "cfg_interval":
            words += ["--cfg-interval", *map(str, value)]
        elif value not in (defaults[key], [""]):
            words.append(f"--{key.replace('_', '-')}={value[0] if isinstance(value, list) else value}")
    return shlex.join(words)


def read_metadata(folder):
    """What write has written last, or None if the sample is not there, or damaged."""
    try:
        metadata = data.parse_json(data.read_file(folder / "metadata.json"))
    except ValueError:  # among them data.BadSample: it cannot be read
        return None
    if not isinstance(metadata.get("settings", {}), dict):
        return None
    return {"settings": {}, "checkpoint_step": None} | metadata


def contact_sheet(out, jobs, labels, columns=8, most=24):
    """Image of the first samples on disk, captions below; labels {"image", "given", "depth": text beside its row}."""
    read_map = lambda path: data.paint_depth(torch.from_numpy(data.read_depth(path, data.read_file(path))[0])[None])
    readers = {
        "image": lambda job: np.asarray(Image.open(out / job.name / "rgb.png")),
        "given": lambda job: read_map(job.depth),
        "depth": lambda job: read_map(str(out / job.name / "depth.npy")),
    }
    rows, beside = [], []
    for start in range(0, min(len(jobs), most), columns):
        block = jobs[start : start + columns]
        for key, label in labels.items():
            rows.append([readers[key](job) for job in block])
            beside.append(label)
        rows.append([f"{job.name} {job.prompt}" for job in block])
        beside.append("")
    return data.draw_grid(rows, beside)


def animation(path, frames, most=40):
    """GIF of frames {"rgb", "depth": (B, C, H, W) as diffused}, at most so many; the last one is shown longer."""
    pictures = []
    for frame in frames[:: -(-len(frames) // most)] + frames[-1:]:
        rows = [[data.paint_rgb(x) for x in frame["rgb"]]]
        if "depth" in frame:  # brightness linear in contracted depth
            rows.append([data.paint_depth(1 / (2.05 - x.clamp(0, 2))) for x in frame["depth"]])
        pictures.append(data.draw_grid(rows, cell=96))
    times = [80] * (len(pictures) - 1) + [2000]
    data.write_image(path, pictures[0], save_all=True, append_images=pictures[1:], duration=times, loop=0)


def main():
    args, defaults = parse()
    state, device = data.load_checkpoint(args.checkpoint), data.pick_device(args.device)
    model = DiT(Config(**state["config"])).requires_grad_(False)
    model.load_state_dict(state["ema"])
    model.to(device)
    config, members = model.config, args.ensemble
    encoders = data.open_encoders(args.encoders, device, config, state["settings"].get("encoders", ""))
    order = read_order(args, [m.name for m in model.modalities])
    size = data.parse_size(args.size) if args.size else (config.size, config.size)
    if any(n % config.patch for n in size):
        data.fail(f"--size {args.size}: must be a multiple of the network's patch, {config.patch}")

    out, jobs, todo = Path(args.out), list_jobs(args, 0 if config.text_dim else config.text_length), []
    common, told = {k: v for k, v in vars(args).items() if k not in OF_THE_CALL}, {}
    for job in jobs:
        own = {"prompt": [job.prompt], "image": job.image, "depth": job.depth, "seed": job.seed}
        told[job.name] = {"settings": common | own, "checkpoint_step": state.get("step")}
        done = read_metadata(out / job.name)
        if not done:
            todo.append(job)
        elif not args.resume:
            data.fail(f"--out {out}: already holds samples; go on with --resume, or choose another --out")
        elif other := [k for k, v in told[job.name]["settings"].items() if done["settings"].get(k) != v]:
            data.fail(f"--resume: {job.name} was made with another --{other[0].replace('_', '-')}; change --out")
        elif done["checkpoint_step"] != state.get("step"):
            data.fail(f"--resume: {job.name} was made when the checkpoint was at another step; change --out")
    data.claim_folder(out, *(["*/metadata.json", "*/rgb.png", "*/depth.npy"] if args.resume else []))

    frames, refused, bar, layout = [], set(), None, "{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
    for i, (seen_at, batch) in enumerate(batches(todo, args, config, size, refused)):
        bar = bar or tqdm(total=len(todo), bar_format=layout, leave=False)

        def watch(x, share, bar=bar, batch=batch, show=args.animate and i == 0):
            bar.update(min(share * len(batch), bar.total - bar.n))
            if show:
                x = {m: x[m][: 4 * members : members] for m in x}
                frames.append(x | {"rgb": encoders.decode_image(x["rgb"])})

        for job, made in zip(batch, generate(model, encoders, batch, seen_at, args, order, watch), strict=True):
            as_given = job.depth and not (args.refine == "depth" and args.depth_strength < 1)
            metadata = {"command": command(told[job.name]["settings"], defaults), **told[job.name]}
            metadata |= {"depth_unit": "that of the depth given" if as_given else "relative", "network_saw": seen_at}
            (out / job.name).mkdir(exist_ok=True)
            write(out / job.name, made, metadata | {"torch": torch.__version__}, args.fov)
            job.given, job.seen = {}, {}
    if bar:
        bar.close()
    if frames:
        animation(out / "animation.gif", frames)
    there = [job for job in jobs if (out / job.name / "metadata.json").exists()]
    if there:
        labels = {"image": f"image\n({'given' if args.image and args.refine != 'rgb' else 'made'})"}
        labels |= {"given": "depth\n(given)"} if args.depth else {}
        labels |= {"depth": "depth\n(made)"} if not args.depth or args.image or args.refine == "depth" else {}
        files = {"image": "rgb.png", "given": "metadata.json", "depth": "depth.npy"}
        labels = {key: label for key, label in labels.items() if (out / there[0].name / files[key]).exists()}
        data.write_image(out / "grid.png", contact_sheet(out, there, labels))
    print(f"{len(there)} samples in {out}; see {out}/grid.png")
    if refused:
        raise SystemExit(2)


if __name__ == "__main__":
    data.run_script(main)
