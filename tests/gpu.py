"""Measure this code on a GPU, part by part, as rows of a markdown table. tests/gpu.sh runs all parts.

    python tests/gpu.py speed --preset 370m --batch-size 16          a training step: images/s, utilization, memory
    python tests/gpu.py speed --preset small --batch-size 8 --eager  on a CPU, in float32
    python tests/gpu.py sampling --preset nano --batch-size 64       images/s of sampling, peak memory

Rows go to stdout and to OUT/gpu.md as soon as they are known. What the scripts print goes to stderr. The exit code is 1
if a row says FAIL. Without a GPU the parts run on the CPU.
"""

import argparse
import contextlib
import functools
import gc
import json
import platform
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plan_memory import NETWORKS, memory_plan

import data
import train_forcing
from model import DEPTH, I2D_STEPS, RGB, make_schedule

ROOT = Path(__file__).resolve().parent.parent
VENDOR_PEAKS = {  # dense bfloat16 FLOP/s by the data sheets; the first name that is part of the device's name counts
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}
TOLERANCES = {"cuda": 0.01, "cpu": 0.001}  # of losses, relative: the rounding of bfloat16 adds up over the steps
LOW_RATE = 1e-3  # learning rate at which these differences stay small for 50 steps
CPU_ABSREL = 0.045  # of assets/nano.pt by `evaluate.py depth` on a CPU
FUSED = ("flash", "fmha", "cudnn", "efficient_attention")  # parts of the names of fused attention kernels
WITHOUT_INDUCTOR = """
import functools, runpy, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Report:
    """Writes rows of the table: part, what, result, and where it was measured."""

    def __init__(self, part, path, device):
        self.part = part
        self.path = path
        self.where = where(device)
        self.failed = False

    def row(self, what, result):
        line = f"| {self.part} | {what} | {result} | {self.where} |"
        print(line, flush=True)
        with open(self.path, "a") as file:
            file.write(line + "\n")

    def check(self, what, result, good):
        """A row that says PASS or FAIL."""
        self.failed = self.failed or not good
        self.row(what, f"{'PASS' if good else 'FAIL'}: {result}")


def where(device):
    """Device, version of torch and commit, as every row ends."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    commit = ""
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return f"{name} | {torch.__version__} | {commit or 'unknown'}"


# ---- Scripts, each in a process of its own ----


def command(args, name, *flags, ranks=1):
    """The command line of a script. With --toy, torch.compile traces graphs but generates no C++ for them."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    elif args.toy:
        start += ["-c", WITHOUT_INDUCTOR]
    return [*start, str(ROOT / name), *map(str, flags), "--device", args.device.type]


def run_all(*commands):
    """Run commands side by side; what they print goes to stderr. Returns the seconds that all took."""
    begin = time.perf_counter()
    running = [subprocess.Popen(words, cwd=ROOT, stdout=sys.stderr) for words in commands]
    codes = [process.wait() for process in running]
    for code, words in zip(codes, commands, strict=True):
        if code:
            raise SystemExit(f"exit code {code}: {shlex.join(words[-40:])}")
    return time.perf_counter() - begin


def results(out):
    """What evaluate.py has written."""
    return json.loads((out / "results.json").read_text())


def train_command(args, name, out, steps, *flags, ranks=1):
    """The command line of a training script that logs five rows and saves once, in args.work/out."""
    lines = ["--out", args.work / out, "--steps", steps, "--log-every", max(1, steps // 5)]
    lines += ["--checkpoint-every", steps, "--sample-every", steps]
    return command(args, name, *lines, *flags, ranks=ranks)


def metrics(args, out):
    """The rows of a training run's metrics.jsonl."""
    return [json.loads(row) for row in (args.work / out / "metrics.jsonl").read_text().splitlines()]


def compare_runs(args, report, what, runs):
    """Train two runs, {name: command}. A row says how much their losses differ and how fast they are."""
    if args.toy:
        run_all(*runs.values())
    else:  # in turn, so that neither slows the other
        for words in runs.values():
            run_all(words)
    one, other = (metrics(args, out) for out in runs)
    tolerance = TOLERANCES[args.device.type]
    apart = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(one, other, strict=True)]
    good = len(apart) > 0 and all(difference <= tolerance for difference in apart)  # NaN is not
    speeds = f"{one[-1]['images_per_s']:.0f} and {other[-1]['images_per_s']:.0f} images/s"
    result = f"losses at most {max(apart):.1e} apart, relative (tolerance {tolerance}); {speeds}"
    report.check(f"{what}, {other[-1]['step']} steps", result, good)


def network_flags(args):
    return ["--preset", args.preset, "--batch-size", args.batch_size, "--size", args.size]


def stages(args, report):
    """Compiled against eager, with the same seeds, in both stages. Both second stages start from one checkpoint."""
    steps = args.steps or 50
    init = ["--init", args.work / "t2i-eager" / "last.pt", "--distill-hi", 0.5, "--distill-lo", 0.05]
    for stage, more in (("t2i", []), ("forcing", init)):
        name = f"train_{stage}.py"
        flags = [*network_flags(args), "--lr", LOW_RATE, "--warmup", 50, *more]
        runs = {
            f"{stage}-compiled": train_command(args, name, f"{stage}-compiled", steps, *flags, "--compile"),
            f"{stage}-eager": train_command(args, name, f"{stage}-eager", steps, *flags, "--no-compile"),
        }
        compare_runs(args, report, f"{name}, {args.preset}: compiled, eager", runs)


def ranks(args, report):
    """Two ranks against one, on the same samples."""
    if args.device.type == "cuda" and torch.cuda.device_count() < 2:
        report.row("two ranks, one", "skipped: one GPU")
        return
    name = "train_forcing.py"
    compiled = "--no-compile" if args.toy else "--compile"
    flags = [*network_flags(args), "--lr", LOW_RATE, "--warmup", 50, "--init", "none", compiled]
    steps = args.steps or 50
    runs = {
        "two": train_command(args, name, "two", steps, *flags, ranks=2),
        "one": train_command(args, name, "one", steps, *flags),
    }
    compare_runs(args, report, f"{name}, {args.preset}: two ranks, one", runs)


def suite(args, report):
    """The tests of what CUDA does."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    if args.toy:
        words += ["-k", "fused"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    lines = done.stdout.strip().splitlines() or ["no output"]
    report.check("pytest tests/test_cuda.py", lines[-1], done.returncode == 0)


def evaluation(args, report):
    """The network of the repository must be as good here as on a CPU."""
    out = args.work / "evaluate-depth"
    seconds = run_all(command(args, "evaluate.py", "depth", "--out", out))
    found = results(out)["absrel"]
    result = f"AbsRel {found:.4f} in {seconds:.1f} s, on a CPU {CPU_ABSREL} (tolerance 0.002)"
    report.check("evaluate.py depth, assets/nano.pt", result, abs(found - CPU_ABSREL) <= 0.002)


def train_for(seconds, args, name, out, flags):
    """Train for about this many seconds. A short run before it measures a step, and the time to start and end."""
    if args.toy:
        run_all(train_command(args, name, out, 5, *flags))
        return
    few = 100
    begin = time.monotonic()
    run_all(train_command(args, name, f"{out}-short", few, *flags))
    took = time.monotonic() - begin
    per_step = args.batch_size / metrics(args, f"{out}-short")[-1]["images_per_s"]
    overhead = took - few * per_step
    steps = int(0.9 * (seconds - took - overhead) / per_step)
    run_all(train_command(args, name, out, max(few, steps), *flags))


def training(args, report):
    """Train and evaluate a network in --seconds."""
    if 0 < args.seconds < 240:
        report.row(f"{args.preset}, both stages", f"skipped: {args.seconds:.0f} s left, too few")
        return
    end = time.monotonic() + args.seconds - 120
    flags = [*network_flags(args), "--lr", 3e-3, "--ema", 0.998, "--max-skipped", 100]
    init = ["--init", args.work / "t2i" / "last.pt"]
    for stage, share, more in (("t2i", 0.45, []), ("forcing", 1.0, init)):
        name = f"train_{stage}.py"
        train_for(share * (end - time.monotonic()), args, name, stage, flags + more)
        first, *_, last = metrics(args, stage)
        result = f"loss {first['loss']:.3f} -> {last['loss']:.3f}, {last['images_per_s']:.0f} images/s"
        report.row(f"{name}, {args.preset}, {last['step']} steps of {args.batch_size}", result)
        tail = (args.work / stage / "metrics.jsonl").read_text().splitlines()[-5:]
        (args.out / f"metrics-{stage}.jsonl").write_text("\n".join(tail) + "\n")
    evaluate_trained(args, report)


def evaluate_trained(args, report):
    """Evaluate the trained network, and keep a picture of its samples."""
    model = ["--checkpoint", args.work / "forcing" / "last.pt"]
    few = ["--images", 4, "--steps", 2] if args.toy else []
    tasks = {
        "depth": ("absrel", "delta1", "baseline_absrel"),
        "image": ("frechet", "real_frechet", "following", "shuffled_following"),
        "follow": ("absrel", "delta1", "other_absrel"),
    }
    if args.toy:
        del tasks["image"], tasks["follow"]
    folders = {task: args.work / f"trained-{task}" for task in tasks}
    commands = [command(args, "evaluate.py", task, *model, *few, "--out", out) for task, out in folders.items()]
    prompt = ["--prompt", "a red ball and a blue box in a room", "--steps", 2 if args.toy else 50]
    commands.append(command(args, "sample.py", *model, *prompt, "--out", args.work / "samples"))
    run_all(*commands)
    shutil.copy(args.work / "samples" / "grid.png", args.out / "grid.png")
    for task, keys in tasks.items():
        found = results(folders[task])
        report.row(f"evaluate.py {task}", ", ".join(f"{key} {found[key]:.4f}" for key in keys))


# ---- Steps of training and sampling, in this process ----


class Training(data.Run):
    """The run of train_forcing.py on the built-in world. A call takes one step and keeps the seconds of its parts."""

    def __init__(self, args, batch_size, taught, checkpointing=False):
        flags = ["--out", tempfile.mkdtemp(dir=args.work), "--batch-size", str(batch_size)]
        flags += ["--size", str(args.config.size), "--no-compile" if args.eager else "--compile"]
        for never in ("--steps", "--log-every", "--checkpoint-every", "--sample-every"):
            flags += [never, str(10**9)]
        if checkpointing:
            flags.append("--checkpoint-activations")
        if args.no_ema:
            flags += ["--ema", "0"]
        sys.argv = ["train_forcing.py", *flags]
        super().__init__(train_forcing.parse(), args.device)
        for number in (signal.SIGTERM, signal.SIGINT):  # gpu.sh stops a part at once
            signal.signal(number, signal.SIG_DFL)

        config = with_depth(args.config)
        network = random_network(config, args.device)
        teacher = random_network(args.config, args.device).requires_grad_(False) if taught else None
        with contextlib.redirect_stdout(sys.stderr):
            self.start(network, None, teacher)
        if config.text_dim:
            self.encoders = RandomEncoders(config, args.device)
        else:
            self.encoders = data.open_encoders("", args.device, config)
        world = data.SyntheticWorld("train", (config.size, config.size), args.device)
        self.batches = data.training_batches(world, self.args, 0, self.rank, self.ranks, args.device)
        self.seconds = {"data": [], "network": [], "optimizer": []}

    def __call__(self):
        self.stopping = False
        self.begin = synchronized(self.device)
        train_forcing.train(self, self.batches, self.encoders, self.args)

    def note_seconds(self, part):
        end = synchronized(self.device)
        self.seconds[part].append(end - self.begin)
        self.begin = end

    def sum_over_ranks(self, values):
        self.note_seconds("data")
        return super().sum_over_ranks(values)

    def end_step(self):
        self.note_seconds("network")
        super().end_step()
        self.note_seconds("optimizer")
        self.stopping = True


def with_depth(config):
    return config.with_modalities(config.modalities[0], DEPTH)


def random_network(config, device):
    """A network on the device. One of FLUX.2, which has no weights of its own, gets random ones."""
    with torch.device(device):
        network = config.build()
    if next(network.parameters()).is_meta:
        network.to_empty(device=device)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return network


class RandomEncoders:
    """Stands in for frozen encoders: latents and embeddings of the right shapes, which cost no time."""

    def __init__(self, config, device):
        self.image = config.modalities[0]
        self.text_shape = (config.text_length, config.text_dim)
        self.device = device
        self.no_text = torch.zeros(1, *self.text_shape, device=device)

    def encode_image(self, rgb):
        return torch.randn(len(rgb), *self.image.shape(rgb.shape[2:]), device=self.device)

    def encode_text(self, captions):
        return torch.randn(len(captions), *self.text_shape, device=self.device)


def synchronized(device):
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(device, work, turns):
    """Median seconds of a call of work. The first call does not count."""
    found = []
    for _ in range(turns + 1):
        begin = synchronized(device)
        work()
        found.append(synchronized(device) - begin)
    return statistics.median(found[1:])


def peak_gib(device):
    """Most memory in use so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def out_of_memory(error):
    """Whether an exception of torch or of its compiler says that the GPU's memory is used up."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def free_memory(device):
    """Free what a failed attempt held. Call this outside of the handler of its exception."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def speed(args, report):
    """A training step with optimizers and EMA. If memory runs out: a quarter of the batch, then no teacher."""
    fewer = max(1, args.batch_size // 4)
    for batch_size, taught in ((args.batch_size, True), (fewer, True), (fewer, False)):
        how = f"{args.preset} at {args.config.size}, {'eager' if args.eager else 'compiled'}, {batch_size} images, "
        how += "with teacher" if taught else "no teacher"
        how += ", --checkpoint-activations" if args.checkpoint_activations else ""
        how += ", no EMA" if args.no_ema else ""
        planned = planned_gib(args, batch_size, taught)
        try:
            report.row(how, measure_speed(args, batch_size, taught, planned))
            return
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        free_memory(args.device)
        report.row(how, f"out of memory: planned {planned:.2f} GiB")


def planned_gib(args, batch_size, taught):
    half = args.device.type == "cuda"
    size = (args.config.size, args.config.size)
    teacher = args.config if taught else None
    plans = memory_plan(with_depth(args.config), size, batch_size, 1, "muon", teacher, half, not args.no_ema)
    return sum(plans[False, args.checkpoint_activations].values()) / 2**30


def measure_speed(args, batch_size, taught, planned):
    step = Training(args, batch_size, taught, args.checkpoint_activations)
    for _ in range(2 + args.turns):
        step()
    first = step.seconds["network"][0]
    medians = {name: statistics.median(found[2:]) for name, found in step.seconds.items()}
    seconds = sum(medians.values())

    rate = batch_size * step.flops / seconds  # without what checkpointing computes again
    result = f"{batch_size / seconds:.2f} images/s, {rate / 1e12:.2f} TFLOP/s, "
    result += f"MFU {rate / step.peak:.3f} of its matmul ({step.peak / 1e12:.2f} TFLOP/s)"
    vendor = [known for name, known in VENDOR_PEAKS.items() if name in where(args.device)]
    if vendor:
        result += f", {rate / vendor[0]:.3f} of the vendor's {vendor[0] / 1e12:.0f}"
    result += "; ms: " + ", ".join(f"{name} {1000 * value:.1f}" for name, value in medians.items())
    return f"{result}; first pass {first:.1f} s; peak {peak_gib(args.device):.2f} GiB, planned {planned:.2f}"


def graphs(args, report):
    """Count the graphs that are compiled in the first step, and after it."""
    args.config = replace(args.config, decoder_depth=3)
    for checkpointing in (False, True):
        torch._dynamo.reset()
        stats = torch._dynamo.utils.counters["stats"]
        stats.clear()
        step = Training(args, args.batch_size, True, checkpointing)
        step()
        compiled = stats["unique_graphs"]
        for _ in range(3):
            step()
        again = stats["unique_graphs"] - compiled
        what = f"graphs, {args.preset}, --checkpoint-activations {'on' if checkpointing else 'off'}"
        if compiled == 0:
            report.row(what, "this torch does not count them")
            continue
        result = f"{compiled} compiled in the first step, {again} later; expected 3 (trunk, detokenizer, teacher), 0"
        report.check(what, result, compiled == 3 and again == 0)


def attention_kernels(work):
    """Names of the attention operators and GPU kernels that work() uses."""
    with torch.profiler.profile() as profile:
        work()
    names = {event.key for event in profile.key_averages()}
    return {name for name in names if any(word in name.lower() for word in (*FUSED, "attention_math"))}


def kernels(args, report):
    """Attention must use a fused kernel. Without one, the whole matrix of scores is stored."""
    step = Training(args, args.batch_size, True)
    step()
    sample = sampler(args, step.ema)  # not compiled, as in sample.py
    found = {
        "training": attention_kernels(step),
        "sampling": attention_kernels(functools.partial(sample, 2, ["rgb"])),
    }
    for task, names in found.items():
        fused = any(word in name.lower() for name in names for word in FUSED)
        short = sorted({name.split("<")[0].split("(")[0] for name in names})
        good = fused and not any("attention_math" in name for name in names)
        report.check(f"attention, {task}, {args.preset}", ", ".join(short) or "no fused kernel", good)


def sampler(args, model):
    """A function sample(steps, given, guidance) that generates one batch."""
    size = (args.config.size, args.config.size)
    noise = {m.name: torch.randn(args.batch_size, *m.shape(size), device=args.device) for m in model.modalities}
    text = torch.zeros(args.batch_size, args.config.text_length, dtype=torch.uint8, device=args.device)

    def sample(steps, given, guidance=None):
        schedule = make_schedule(["rgb", "depth"], steps, strength=dict.fromkeys(given, 1.0))
        model.sample(schedule, noise, text, {m: (noise[m], None) for m in given}, guidance)

    return sample


def sampling(args, report):
    """Image to depth, and image and depth together with guidance."""
    model = random_network(with_depth(args.config), args.device).requires_grad_(False)
    sample = sampler(args, model)
    joint_steps = args.steps or 50
    for task, settings in (
        (f"image to depth, {I2D_STEPS} steps", (I2D_STEPS, ["rgb"])),
        (f"joint, guided, {joint_steps} steps", (joint_steps, [], {"rgb": 3.0})),
    ):
        what = f"{task}, {args.preset} at {args.config.size}, {args.batch_size} images"
        try:
            sample(1, *settings[1:])
            seconds = median_seconds(args.device, functools.partial(sample, *settings), 1)
            result = f"{args.batch_size / seconds:.2f} images/s ({seconds:.3f} s), peak {peak_gib(args.device):.2f} GiB"
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            result = "out of memory"
        free_memory(args.device)
        report.row(what, result)


def rendering(args, report):
    """The built-in world's scenes, and the noise of a step."""
    count = args.batch_size
    size = (args.config.size, args.config.size)
    world = data.SyntheticWorld("train", size, args.device)

    def render():
        world.samples(range(count))

    def draw():
        rng = data.PerSampleRNG(0, range(count), args.device)
        for m in (RGB, DEPTH):
            rng.rand()
            rng.randn(*m.shape(size))

    for what, work in (("SyntheticWorld.samples", render), ("PerSampleRNG, image and depth", draw)):
        seconds = median_seconds(args.device, work, args.turns)
        report.row(f"{what}, {count} at {size[0]}", f"{1000 * seconds:.1f} ms, {count / seconds:.0f} images/s")


PARTS = (stages, speed, graphs, kernels, suite, sampling, evaluation, rendering, ranks, training)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=("where", *(part.__name__ for part in PARTS)), help="where: the device alone")
    p.add_argument("--preset", choices=NETWORKS, default="nano", help="network (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")
    p.add_argument("--size", type=int, default=0, help="side in pixels; 0 is the preset's (default: %(default)s)")
    p.add_argument("--steps", type=int, default=0, help="of training or sampling; 0 is 50 (default: %(default)s)")
    p.add_argument("--turns", type=int, default=5, help="of which the median counts (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=0, help="training: how long (default: as short as it goes)")
    p.add_argument("--eager", action="store_true", help="speed: do not compile")
    p.add_argument("--checkpoint-activations", action="store_true", help="speed: compute blocks twice")
    p.add_argument("--no-ema", action="store_true", help="speed: no averaged weights, as --ema 0")
    p.add_argument("--toy", action="store_true", help="few steps, no code generation: tests the parts themselves")
    p.add_argument("--device", default="auto", help="auto, cuda or cpu (default: %(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="for gpu.md (default: %(default)s)")
    return p.parse_args()


def main():
    args = parse()
    args.device = data.pick_device(args.device)
    if args.part == "where":
        print(where(args.device))
        return
    args.out = args.out.resolve()
    args.work = args.out / "work" / args.part
    args.work.mkdir(parents=True, exist_ok=True)
    args.config = replace(NETWORKS[args.preset], size=args.size or NETWORKS[args.preset].size)
    if args.toy:
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    report = Report(args.part, args.out / "gpu.md", args.device)
    part = next(part for part in PARTS if part.__name__ == args.part)
    part(args, report)
    if report.failed:
        raise SystemExit(f"{args.part}: a check failed")


if __name__ == "__main__":
    main()
