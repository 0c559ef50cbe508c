"""The memory plan counts what training really keeps, and the largest preset fits a node."""

import functools
import re
from pathlib import Path

import plan_memory
import pytest
import torch

import model

NODE = Path(__file__).parent.parent / "docs/gpu-node.md"


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_kept_by(network, inputs):
    """(bytes that the forward pass keeps for the backward pass without the weights, its predictions)."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x0_hat = network(*inputs)
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), x0_hat


def test_the_plan_counts_what_training_keeps():
    """Weights and optimizer state agree with a real network, activations with a real forward pass."""
    preset = model.PRESETS["nano"]
    config = preset.with_modalities(model.RGB, model.DEPTH)
    plans = plan_memory.memory_plan(config, (32, 32), 8, 4, "muon", preset, half=False)
    plain = plans[False, False]
    sharded = plans[True, False]
    checkpointed = plans[False, True]

    network = model.DiT(config)
    optimizers = network.configure_optimizers(1e-3, "muon")
    kept, x0_hat = bytes_kept_by(network, plan_memory.example_inputs(config, (32, 32), 8))
    assert plain["activations"] + plain["bfloat16 copies"] == pytest.approx(kept, rel=0.02)
    assert checkpointed["activations"] < 0.25 * plain["activations"]

    whole = bytes_of(network.parameters())
    assert plain["weights"] == plain["gradients"] == plain["EMA"] == whole
    assert plain["teacher"] == bytes_of(model.DiT(preset).parameters())

    sum(x.sum() for x in x0_hat.values()).backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    assert plain["optimizer"] == bytes_of(value for value in states if value.ndim > 0)

    for part in ("weights", "gradients", "optimizer", "EMA", "teacher"):
        assert sharded[part] == plain[part] / 4
    assert plain["gathered"] == 0 < sharded["gathered"]


@functools.cache
def plan_of_preset(name):
    """Stage 2 of a preset on 8 GPUs, 16 images at a time, as docs/gpu-node.md shows it."""
    teacher = model.PRESETS[name]
    config = teacher.with_modalities(model.RGB, model.DEPTH)
    return plan_memory.memory_plan(config, (256, 256), 16, 8, "muon", teacher)


def test_the_3b_preset_fits_eight_gpus_of_80_gb():
    total = {flags: sum(parts.values()) / plan_memory.GIB for flags, parts in plan_of_preset("3b").items()}
    assert total[True, True] < 72 < total[False, True] < total[False, False]  # an 80 GB GPU has about 79 GiB


@pytest.mark.parametrize("name", ["370m", "3b"])
def test_the_tables_of_the_documents_are_planned(name):
    """docs/gpu-node.md shows what the tool prints, to a hundredth of a GiB or to 2%."""
    shown = NODE.read_text().split(f"<!-- plan {name} -->")[1].split("<!-- /plan -->")[0]
    expected = plan_memory.format_plan(plan_of_preset(name))
    numbers = r"\d+\.\d+"
    assert re.sub(numbers, "", shown).split() == re.sub(numbers, "", expected).split()
    found = [float(number) for number in re.findall(numbers, shown)]
    assert found == pytest.approx([float(number) for number in re.findall(numbers, expected)], rel=0.02, abs=0.01)


def test_the_tool_prints_a_table_for_either_stage(monkeypatch, capsys):
    for line in ("--preset nano --t2i", "--preset nano --no-teacher --modalities rgb,depth,normal --size 16"):
        monkeypatch.setattr("sys.argv", ["plan_memory.py", *line.split()])
        plan_memory.main()
        rows = capsys.readouterr().out.splitlines()[2:]
        teacher = rows[0].split(" | ").index("teacher")
        assert len(rows) == 6 and all(row.split(" | ")[teacher] == "0.00" for row in rows[2:])


@pytest.mark.parametrize("line", ["--modalities rgb,sound", "--size 30 --preset nano", "--gpus 0"])
def test_bad_input_is_one_line(line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan_memory.py", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        plan_memory.main()
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
