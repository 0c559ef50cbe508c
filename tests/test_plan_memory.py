"""The memory plan counts what training really takes, and the largest networks fit a node."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import plan_memory
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import model

DOCS = Path(__file__).parent.parent / "docs"


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def allocated_by(function):
    """The most bytes that PyTorch's CPU allocator has handed out at once during function()."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]  # a free is negative
    return torch.tensor(sizes).cumsum(0).max().item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_activations_are_what_the_allocator_hands_out(checkpointing):
    config = replace(model.PRESETS["nano"], depth=2).with_modalities(model.RGB, model.DEPTH)
    network = model.DiT(config)
    inputs = plan_memory.example_inputs(config, (32, 32), 4)
    if checkpointing:
        network.checkpoint_activations()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    allocated = allocated_by(lambda: sum(x.sum() for x in network(*inputs).values()).backward())
    counted = plan_memory.held_bytes(config, (32, 32), 4, False, checkpointing)
    assert counted == pytest.approx(allocated, rel=0.01)


def test_counted_weights_are_what_training_keeps():
    """Weights and optimizer state agree with a real network after a real step."""
    preset = model.PRESETS["nano"]
    config = preset.with_modalities(model.RGB, model.DEPTH)
    plans = plan_memory.memory_plan(config, (32, 32), 1, 4, "muon", preset, half=False)
    plain = plans[False, False]
    network = model.DiT(config)
    optimizers = network.configure_optimizers(1e-3, "muon", 0.95, 0.1)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()

    assert plain["weights"] == plain["gradients"] == plain["EMA"] == bytes_of(network.parameters())
    assert plain["teacher"] == bytes_of(model.DiT(preset).parameters())
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    assert plain["optimizer"] == bytes_of(value for value in states if value.ndim > 0)

    sharded = plans[True, False]
    for part in ("weights", "gradients", "optimizer", "EMA", "teacher"):
        assert sharded[part] == plain[part] / 4
    assert plain["gathered"] == 0 < sharded["gathered"]


def load_empty(config):
    """A network with weights that have no values, for fake tensors."""
    with torch.device("meta"):
        network = config.build()
    weights = {name: torch.empty(parameter.shape) for name, parameter in network.named_parameters()}
    network.load_state_dict(weights, assign=True)
    return network


def test_a_whole_step_of_klein_takes_what_is_planned():
    """Few blocks of klein-4B's width: the second step with a teacher, AdamW and EMA peaks within 2% of the plan."""
    teacher_config = replace(plan_memory.NETWORKS["klein-4B"], double_depth=1, depth=2, decoder_depth=1)
    config = teacher_config.with_modalities(*teacher_config.modalities, model.DEPTH)
    size = (512, 512)
    with FakeTensorMode(), plan_memory.LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        network = load_empty(config)
        network.checkpoint_activations()
        ema = load_empty(config).requires_grad_(False)
        teacher = load_empty(teacher_config).requires_grad_(False)
        for weight in teacher.matrices():
            weight.data = weight.data.bfloat16()
        (optimizer,) = network.configure_optimizers(1e-5, "adamw", 0.95, 0.0)
        noisy, t, text = plan_memory.example_inputs(config, size, 2)
        for _ in range(2):
            live.peak = 0
            x0_hat = network(noisy, t, text)
            with torch.no_grad():
                target = teacher({"rgb": noisy["rgb"]}, t, text)
            loss = sum(x.square().sum() for x in x0_hat.values()) + (x0_hat["rgb"] - target["rgb"]).square().sum()
            loss.backward()
            optimizer.step()
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 0.1)
            optimizer.zero_grad(set_to_none=False)

    plan = plan_memory.memory_plan(config, size, 2, 1, "adamw", teacher_config)[False, True]
    assert sum(plan.values()) == pytest.approx(live.peak, rel=0.02)


@functools.cache
def plan_of(name):
    """Stage 2 of a network on 8 GPUs, as the documents show it."""
    teacher = plan_memory.NETWORKS[name]
    config = teacher.with_modalities(*teacher.modalities, model.DEPTH)
    size = (teacher.size, teacher.size)
    if name.startswith("klein"):
        return plan_memory.memory_plan(config, size, 8, 8, "adamw", teacher, choices=[(True, True)])
    return plan_memory.memory_plan(config, size, 16, 8, "muon", teacher)


@pytest.mark.parametrize("name", ["3b", "klein-9B"])
def test_the_largest_networks_fit_eight_gpus_of_80_gb(name):
    both_flags = plan_of(name)[True, True]
    assert sum(both_flags.values()) < 72 * plan_memory.GIB  # an 80 GB GPU has about 79 GiB


def check_table(page, mark, expected):
    """A table of a document shows what the tool prints, to a hundredth of a GiB or to 2%."""
    shown = (DOCS / page).read_text().split(f"<!-- plan {mark} -->")[1].split("<!-- /plan -->")[0]
    numbers = r"\d+\.\d+"
    assert re.sub(numbers, "", shown).split() == re.sub(numbers, "", expected).split()
    found = [float(number) for number in re.findall(numbers, shown)]
    assert found == pytest.approx([float(number) for number in re.findall(numbers, expected)], rel=0.02, abs=0.01)


@pytest.mark.parametrize("name", ["370m", "3b"])
def test_the_tables_of_presets_are_planned(name):
    check_table("gpu-node.md", name, plan_memory.format_plan(plan_of(name)))


def test_the_table_of_backbones_is_planned():
    rows = []
    for name in ("klein-4B", "klein-9B"):
        *heading, row = plan_memory.format_plan(plan_of(name)).splitlines()
        rows.append(row.replace("`--shard` `--checkpoint-activations`", name))
    check_table("backbone.md", "klein", "\n".join([*heading, *rows]))


def test_the_tool_prints_a_table_for_either_stage(monkeypatch, capsys):
    for line in ("--preset nano --t2i", "--preset nano --no-teacher --modalities rgb,depth,normal --size 16"):
        monkeypatch.setattr("sys.argv", ["plan_memory.py", *line.split()])
        plan_memory.main()
        rows = capsys.readouterr().out.splitlines()[2:]
        teacher = rows[0].split(" | ").index("teacher")
        assert len(rows) == 6 and all(row.split(" | ")[teacher] == "0.00" for row in rows[2:])


@pytest.mark.parametrize("line", ["--modalities rgb,sound", "--size 30 --preset nano", "--gpus 0", "--batch-size 9"])
def test_bad_input_is_one_line(line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan_memory.py", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        plan_memory.main()
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
