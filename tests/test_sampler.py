"""The sampler's mathematics, every task as a schedule of noise levels, and the completion of depth."""

import itertools
from operator import attrgetter

import pytest
import torch
from test_model import build, close, inputs

from model import (
    DEPTH,
    JOINT,
    NORMAL,
    RGB,
    complete_depth,
    corrupt,
    make_schedule,
    normalize_depth,
    sampling_grid,
    warp,
)

NAMES = ["rgb", "depth"]
THREE = ["rgb", "depth", "normal"]


def note_inputs(network):
    """A list that gets (noisy, t, text) whenever the network is called from now on."""
    seen = []

    def note(module, args):
        seen.append(args)

    network.register_forward_pre_hook(note)
    return seen


# ---- The sampler ----


def test_euler_step_is_the_textbook_step():
    network = build(RGB, DEPTH)
    _, noise, _, text = inputs()
    schedule = {"rgb": [1.0, 0.7, 0.2], "depth": [1.0, 0.9, 0.5]}
    made = network.sample(schedule, noise, text)
    x = dict(noise)
    for step in range(2):
        t = {m: torch.full((2,), row[step]) for m, row in schedule.items()}
        x0_hat = network(x, t, text)
        for m, row in schedule.items():
            velocity = (x0_hat[m] - x[m]) / row[step]  # it points at the data
            x[m] = x[m] + (row[step] - row[step + 1]) * velocity
    for m in x:
        close(made[m], x[m])


def test_euler_is_of_first_order():
    """The flow carries N(0, 1) onto the data exactly, as noise times their deviation; errors fall as 1 / steps."""
    network = build(RGB, DEPTH)
    variance = {"rgb": 4.0, "depth": 0.25}

    def best_prediction(noisy, t, text):
        """E[x0 | x_t] for values that are N(0, variance)."""
        x0_hat = {}
        for m, x in noisy.items():
            level = t[m].view(-1, 1, 1, 1)
            x0_hat[m] = variance[m] * (1 - level) / (variance[m] * (1 - level) ** 2 + level**2) * x
        return x0_hat

    network.forward = best_prediction
    calls = note_inputs(network)
    _, noise, _, text = inputs()
    errors = {}
    for steps in (40, 80):
        calls.clear()
        made = network.sample(make_schedule(NAMES, steps, 1.0), noise, text)
        errors[steps] = {m: (made[m] / noise[m] - variance[m] ** 0.5).abs().mean().item() for m in made}
        assert len(calls) == steps
    for m in NAMES:
        assert errors[40][m] / errors[80][m] == pytest.approx(2, rel=0.15)
        assert errors[80][m] < 0.05


def test_last_step_lands_on_the_prediction_and_given_values_stay():
    network = build(RGB, DEPTH)
    x, noise, _, text = inputs()
    made = network.sample({"rgb": [0, 0], "depth": [1, 0]}, noise, text, {"rgb": (x["rgb"], None)})
    t = {"rgb": torch.zeros(2), "depth": torch.ones(2)}
    close(made["depth"], network({"rgb": x["rgb"], "depth": noise["depth"]}, t, text)["depth"])
    assert torch.equal(made["rgb"], x["rgb"])


@pytest.mark.parametrize("strength", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("hint", [DEPTH, NORMAL], ids=attrgetter("name"))
def test_given_values_are_noised_as_in_training_at_every_step(hint, strength):
    """So missing pixels are noise, and what is stored in them, NaN included, never reaches the network."""
    network = build(RGB, hint)
    seen = note_inputs(network)
    x, noise, _, text = inputs(modalities=network.modalities)
    valid = torch.rand(2, 1, 16, 16) < 0.3
    values = hint.encode(torch.where(valid, x[hint.name], torch.nan), valid)
    schedule = make_schedule(["rgb", hint.name], 4, 2.0, {hint.name: strength})
    made = network.sample(schedule, noise, text, {hint.name: (values, valid)})
    assert len(seen) == 4
    for step, (noisy, t, _) in enumerate(seen):
        assert torch.equal(t[hint.name], torch.full((2,), schedule[hint.name][step], dtype=torch.float32))
        assert torch.equal(noisy[hint.name], corrupt(values, noise[hint.name], t[hint.name], valid))
        assert noisy[hint.name].isfinite().all()
    assert torch.equal(made[hint.name], corrupt(values, noise[hint.name], torch.zeros(2), valid))
    assert not torch.equal(made["rgb"], noise["rgb"])


def test_guidance_of_one_is_no_guidance_and_guidance_extrapolates():
    network = build(RGB, DEPTH)
    _, noise, _, text = inputs()
    schedule = {"rgb": [1, 0], "depth": [1, 0]}
    plain = network.sample(schedule, noise, text)
    same = network.sample(schedule, noise, text, guidance={"rgb": 1.0, "depth": 1.0})
    assert torch.equal(same["rgb"], plain["rgb"])
    without = network.sample(schedule, noise, torch.zeros_like(text))
    guided = network.sample(schedule, noise, text, guidance={"rgb": 3.0, "depth": 2.0})
    for m, scale in (("rgb", 3), ("depth", 2)):
        close(guided[m], without[m] + scale * (plain[m] - without[m]))
    close(network.sample(schedule, noise, text, guidance={"rgb": 3.0})["depth"], plain["depth"])


def levels_of_captions(seen):
    """The image's noise levels of all calls with a caption, and those of all calls without."""
    levels = {True: [], False: []}
    for _, t, text in seen:
        levels[bool(text.any())].append(t["rgb"][0].item())
    return levels[True], levels[False]


def test_guidance_acts_in_its_interval_alone():
    network = build(RGB, DEPTH)
    seen = note_inputs(network)
    _, noise, _, text = inputs()
    network.sample(make_schedule(NAMES, 8), noise, text, guidance={"rgb": 3.0}, guidance_interval=(0.5, 0.9))
    with_caption, without_caption = levels_of_captions(seen)
    assert with_caption == sampling_grid(8)[:-1].float().tolist()
    assert without_caption == [level for level in with_caption if 0.5 <= level <= 0.9]
    assert 0 < len(without_caption) < 8


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_not_generated_is_not_guided(strength):
    """A given modality, and one whose turn is over or has not come, costs no second pass."""
    network = build(RGB, DEPTH)
    seen = note_inputs(network)
    x, noise, _, text = inputs()
    given = {"depth": (x["depth"], None)}
    network.sample(make_schedule(NAMES, 4, strength={"depth": strength}), noise, text, given, {"depth": 3.0})
    assert len(seen) == 4
    seen.clear()
    network.sample(make_schedule(NAMES, 2, ["rgb", "depth"]), noise, text, guidance={"rgb": 3.0})
    with_caption, without_caption = levels_of_captions(seen)
    assert len(with_caption) == 4
    assert without_caption == with_caption[:2]


def test_sampling_alone_or_in_a_batch_agrees():
    network = build(RGB, DEPTH)
    x, noise, _, text = inputs()
    valid = torch.stack([torch.rand(1, 16, 16) < 0.1, torch.ones(1, 16, 16) > 0])  # sparse, and whole
    schedule = make_schedule(NAMES, 3, 2.0, {"depth": 0.8})
    together = network.sample(schedule, noise, text, {"depth": (x["depth"], valid)}, {"rgb": 2.0})
    again = network.sample(schedule, noise, text, {"depth": (x["depth"], valid)}, {"rgb": 2.0})
    last_noise = {m: v[1:] for m, v in noise.items()}
    alone = network.sample(schedule, last_noise, text[1:], {"depth": (x["depth"][1:], valid[1:])}, {"rgb": 2.0})
    for m in NAMES:
        assert torch.equal(together[m], again[m])  # same noise, same bits
        close(together[m][1:], alone[m])


def test_the_callback_sees_each_step():
    network = build(RGB, DEPTH)
    seen = note_inputs(network)
    _, noise, _, text = inputs()
    steps = []
    made = network.sample(make_schedule(NAMES, 3), noise, text, callback=steps.append)
    assert len(steps) == 3
    for m in NAMES:
        assert torch.equal(steps[0][m], seen[1][0][m])
        assert torch.equal(steps[2][m], made[m])


def test_a_modality_without_a_row_is_no_input():
    network = build(RGB, DEPTH)
    seen = note_inputs(network)
    _, noise, _, text = inputs()
    made = network.sample(make_schedule(["rgb"], 2), noise, text)
    assert list(made) == ["rgb"]
    assert all(list(noisy) == ["rgb"] for noisy, _, _ in seen)


def test_normals_are_generated_beside_depth_and_from_what_is_given():
    network = build(RGB, DEPTH, NORMAL)
    x, noise, _, text = inputs(modalities=network.modalities)
    joint = network.sample(make_schedule(THREE, 3), noise, text)
    normals = NORMAL.finish(NORMAL.decode(joint["normal"]))
    close(normals.norm(dim=1), torch.ones(2, 16, 16))

    results = []
    for given in (["rgb"], ["depth"], ["rgb", "depth"]):
        schedule = make_schedule(THREE, 3, strength=dict.fromkeys(given, 1.0))
        made = network.sample(schedule, noise, text, {m: (x[m], None) for m in given})
        assert all(torch.equal(made[m], x[m]) for m in given)
        results.append(made["normal"])
    for first, second in itertools.combinations([joint["normal"], *results], 2):
        assert (first - second).abs().max() > 1e-3


# ---- Every task is a schedule ----


def test_an_order_of_what_is_given_alone_generates_nothing():
    for strength in (0.0, 0.5, 1.0):
        schedule = make_schedule(NAMES, 4, ["rgb"], {"rgb": strength})
        assert schedule["depth"].tolist() == [1] * 5
        assert schedule["rgb"][-1] == 0
        assert len(schedule["rgb"]) == 5
        assert {row.dtype for row in schedule.values()} == {torch.float64}
    unlisted = make_schedule(THREE, 4, ["rgb"], {"normal": 1.0})
    assert {row.dtype for row in unlisted.values()} == {torch.float64}


def test_joint_generation_runs_the_image_through_the_grid_and_the_others_behind():
    grid = sampling_grid(4)
    schedule = make_schedule(THREE, 4)
    assert torch.equal(schedule["rgb"], grid)
    assert torch.equal(schedule["depth"], warp(grid, JOINT))
    assert torch.equal(schedule["normal"], warp(grid, JOINT))


def test_an_ignored_input_stays_noise_until_the_end_in_every_turn():
    schedule = make_schedule(["rgb", "depth", "normal"], 4, ["rgb", "normal"], {"depth": 0.0})
    assert torch.equal(schedule["depth"], torch.cat([torch.ones(8), torch.zeros(1)]).double())


def test_beside_a_given_image_all_others_run_through_the_grid():
    grid = sampling_grid(4)
    schedule = make_schedule(THREE, 4, -2.0, {"rgb": 1.0})
    assert (schedule["rgb"] == 0).all()
    assert torch.equal(schedule["depth"], grid)
    assert torch.equal(schedule["normal"], grid)
    given_depth = make_schedule(THREE, 4, -2.0, {"depth": 1.0})
    assert torch.equal(given_depth["rgb"], grid)
    assert torch.equal(given_depth["normal"], warp(grid, -2))


def test_a_list_of_names_is_generated_in_turn():
    grid = sampling_grid(4).tolist()
    image_first = make_schedule(NAMES, 4, ["rgb", "depth"])
    assert image_first["rgb"].tolist() == [*grid, 0, 0, 0, 0]
    assert image_first["depth"].tolist() == [1, 1, 1, 1, *grid]
    assert make_schedule(NAMES, 4, ["rgb"])["depth"].tolist() == [1] * 5  # text to image: depth stays noise
    three = make_schedule(THREE, 2, ["normal", "rgb", "depth"])
    assert three["rgb"].tolist() == [1, 1, *sampling_grid(2).tolist(), 0, 0]


def test_strength_runs_from_unseen_to_clean():
    rows = [make_schedule(NAMES, 50, strength={"depth": s})["depth"] for s in (0, 0.1, 0.5, 0.85, 0.992, 1)]
    assert rows[0].tolist() == [1.0] * 50 + [0]
    assert (rows[-1] == 0).all()
    for weaker, stronger in itertools.pairwise(rows):
        assert (weaker >= stronger).all()
        assert (weaker > stronger).any()
    grid = sampling_grid(50)
    close(rows[2], grid)
    close(rows[3], warp(grid, -5), 1e-2)
    close(rows[4], warp(grid, -14), 1e-2)


def test_a_hint_falls_with_what_is_generated_first():
    grid = sampling_grid(4)
    schedule = make_schedule(THREE, 4, ["depth", "rgb"], {"normal": 0.5})
    assert torch.equal(schedule["depth"][:5], grid)
    close(schedule["normal"], schedule["depth"])
    assert (schedule["normal"][4:] == 0).all()


@pytest.mark.parametrize(("first", "other"), [(0, DEPTH), (0, NORMAL), (1, NORMAL)])
def test_one_after_the_other_is_two_tasks(first, other):
    """The limits of the trajectory: text to image, then image to depth; and the other alone, then an image from it."""
    network = build(RGB, other)
    names = ["rgb", other.name]
    order = [names[first], names[1 - first]]
    _, noise, _, text = inputs(modalities=network.modalities)
    guidance = {"rgb": 2.0, other.name: 1.5}
    both = network.sample(make_schedule(names, 5, order), noise, text, guidance=guidance)
    alone = network.sample(make_schedule(names, 5, order[:1]), noise, text, guidance=guidance)[order[0]]
    close(both[order[0]], alone)
    schedule = make_schedule(names, 5, strength={order[0]: 1.0})
    then = network.sample(schedule, noise, text, {order[0]: (alone, None)}, guidance)
    close(both[order[1]], then[order[1]])


def test_strength_zero_is_not_looked_at_and_strength_one_is_given():
    network = build(RGB, DEPTH)
    x, noise, _, text = inputs()
    clean = normalize_depth(x["depth"], None)
    given = {"depth": (clean, None)}
    unseen = network.sample(make_schedule(NAMES, 4, strength={"depth": 0.0}), noise, text, given)
    assert torch.equal(unseen["rgb"], network.sample(make_schedule(NAMES, 4, ["rgb"]), noise, text)["rgb"])
    seen = network.sample(make_schedule(NAMES, 4, strength={"depth": 1.0}), noise, text, given)
    assert not torch.equal(seen["rgb"], unseen["rgb"])
    for made in (unseen, seen):
        assert torch.equal(made["depth"], clean)


# ---- Completion ----


def make_depth(count=4, side=32):
    """Maps of a floor that recedes to a wall, with two boxes on it: (count, 1, side, side)."""
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    scenes = []
    for i in range(count):
        depth = (1 / y.clamp(min=0.05)).clamp(max=10.0)
        for distance, left, top in ((3.0, 0.1 + 0.05 * i, 0.3), (1.8, 0.5 + 0.05 * i, 0.4)):
            box = (x > left) & (x < left + 0.3) & (y > top) & (y < 1 / distance + 0.2)
            depth = torch.where(box, distance, depth)
        scenes.append(depth)
    return torch.stack(scenes)[:, None]


@pytest.mark.parametrize("steps", [1, 4])
def test_completion_by_a_network_that_is_right_gives_the_depth_in_the_unit_of_the_input(steps):
    network = build(RGB, DEPTH)
    truth = make_depth()
    d = normalize_depth(truth, None)

    def know_depth(noisy, t, text):
        return {"rgb": noisy["rgb"], "depth": d}

    network.forward = know_depth
    noise = {"rgb": torch.randn(4, 3, 32, 32), "depth": torch.randn(4, 1, 32, 32)}
    schedule = make_schedule(NAMES, steps, strength={"rgb": 1.0})
    made = network.sample(schedule, noise, torch.zeros(4, 32).byte(), {"rgb": (noise["rgb"], None)})
    valid = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) < 0.02
    sparse = torch.where(valid, truth * 1000, 0)  # in millimetres
    close(complete_depth(DEPTH.decode(made["depth"]), sparse, valid) / 1000, truth, 1e-3)


def test_completion_keeps_measured_pixels_and_bends_the_rest_towards_them():
    """A prediction that is wrong by a smooth factor: completion is exact where it is measured, better elsewhere."""
    truth = make_depth()
    wrong = truth * (1 + 0.5 * torch.linspace(-1, 1, 32).view(1, 1, 1, -1))
    errors = []
    for share in (0.02, 0.05, 0.2):
        valid = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) < share
        made = complete_depth(wrong / 7, torch.where(valid, truth, torch.nan), valid)
        assert torch.equal(made[valid], truth[valid])
        errors.append(((made - truth).abs() / truth)[~valid].mean().item())
    assert 0.25 / 2 > errors[0] > errors[1] > errors[2]  # uncorrected, it is 0.25
    assert errors[2] < 0.015


def test_a_correction_stays_on_its_surface():
    """Stripes of two depths, predicted too near and too far by a fifth: each measured pixel speaks for its own kind."""
    near = (torch.arange(32) // 2 % 2 == 0).expand(1, 1, 32, 32)
    truth = torch.where(near, 1.0, 3.0)
    wrong = torch.where(near, 1.2, 3 / 1.2)
    valid = torch.zeros_like(near)
    valid[..., 3::8, 1::2] = True
    made = complete_depth(wrong, truth, valid)
    assert ((made - truth).abs() / truth).mean() < 0.05


def test_completion_depends_on_no_unit_and_on_no_other_sample():
    truth = make_depth()
    predicted = torch.rand(4, 1, 32, 32) + 0.5
    share = torch.tensor([0.03, 0.3, 0.0, 2.0]).view(4, 1, 1, 1)
    valid = torch.rand(truth.shape) < share
    made = complete_depth(predicted, truth, valid)
    measured = torch.tensor([0, 1, 3])
    close(complete_depth(predicted * 3, truth, valid)[measured], made[measured], 1e-3)
    close(complete_depth(predicted, truth * 100, valid)[:2], made[:2] * 100, 1e-2)
    for i in range(4):
        alone = complete_depth(predicted[i : i + 1], truth[i : i + 1], valid[i : i + 1])
        close(alone, made[i : i + 1])
    assert torch.equal(made[2], predicted[2])  # nothing is measured
    assert torch.equal(made[3], truth[3])  # everything is
