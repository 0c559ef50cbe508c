"""The built-in world: exact geometry, determinism, honest captions; sparse patterns; files."""

import math

import pytest
import torch

from data import (
    COLORS,
    GOLDEN,
    PATTERNS,
    SHAPES,
    PerSampleRNG,
    SyntheticWorld,
    caption,
    draw_scenes,
    encode_text,
    paint_depth,
    render,
    sensor_mask,
    split_mix,
    training_indices,
)
from model import PRESETS, TEXT_PATCH

AWAY = [-100.0] * 3


def scene_in_a_room(centre=AWAY, shape="box", angle=0.0, fov=0.9):
    """A metre-wide object in a room 6 m wide and 3 m high, whose far wall is 6 m from a level camera at half height."""
    scene = draw_scenes("val", [0])
    scene |= {"outside": torch.tensor([False]), "pitch": torch.zeros(1), "height": torch.tensor([1.5])}
    scene |= {"fov": torch.tensor([fov]), "angle": torch.tensor([[angle, 0, 0, 0]])}
    scene["centre"] = torch.tensor([[centre, AWAY, AWAY, [0.0, 1.5, 2.0]]])
    scene["half"] = torch.tensor([[[0.5] * 3] * 3 + [[3.0, 1.5, 4.0]]])
    scene["quadric"] = torch.tensor([[SHAPES[shape]] * 3 + [SHAPES["box"]]])
    return scene


def test_depth_of_walls_and_floor_is_exact():
    depth = render(scene_in_a_room(fov=math.pi / 2), 64)["depth"][0, 0]
    rows = (63 - 2 * torch.arange(64)) / 64  # slope of the ray through each row
    torch.testing.assert_close(depth[:, 31], torch.minimum(torch.tensor(6.0), 1.5 / rows.abs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "angle", "depth", "facing"),
    [
        ("ball", 0.3, 3.5, 1),
        ("pillar", 0.7, 3.5, 1),
        ("box", 0.0, 3.5, 1),
        ("box", 0.3, 4 - 0.5 / math.cos(0.3), math.cos(0.3)),
    ],
)
def test_depth_and_normal_of_solids_are_exact(shape, angle, depth, facing):
    """The ray through the image's middle meets a solid 4 m away where geometry says."""
    out = render(scene_in_a_room([0.0, 1.5, 4.0], shape, angle), 101)
    assert out["depth"][0, 0, 50, 50].item() == pytest.approx(depth, abs=1e-4)
    assert -out["normal"][0, 2, 50, 50].item() == pytest.approx(facing, abs=1e-4)


def test_a_ball_off_the_axis():
    """The edge of a ball: the tangent cone from the camera has sine radius / distance."""
    distance = math.hypot(1, 4)
    out = render(scene_in_a_room([1.0, 1.5, 4.0], "ball"), 401)
    near = out["depth"][0, 0, 200] < 5
    columns = (2 * torch.arange(401)[near] - 400) / 401 * math.tan(0.45)
    angles = torch.atan(columns) - math.atan2(1, 4)
    assert angles.min().item() == pytest.approx(-math.asin(0.5 / distance), abs=3e-3)
    assert angles.max().item() == pytest.approx(math.asin(0.5 / distance), abs=3e-3)


def test_normals_agree_with_depth():
    """Cross products of neighbouring surface points, where depth is smooth, point along the exact normals."""
    scene = draw_scenes("val", range(4))
    out = render(scene, 128)
    y, x = torch.meshgrid((127 - 2 * torch.arange(128)) / 128, (2 * torch.arange(128) - 127) / 128, indexing="ij")
    tan = (scene["fov"] / 2).tan().view(-1, 1, 1)
    z = out["depth"][:, 0]
    points = torch.stack([x * tan * z, y * tan * z, z], 1)
    right = points.diff(dim=3)[:, :, :-1]
    down = points.diff(dim=2)[..., :-1]
    normal = torch.nn.functional.normalize(torch.linalg.cross(right, down, dim=1), dim=1)
    agree = (normal * out["normal"][:, :, :-1, :-1]).sum(1).abs()
    assert (agree[z[:, :-1, :-1] > 0] > 0.99).float().mean() > 0.9
    seen = out["normal"].norm(dim=1)
    torch.testing.assert_close(seen, (z > 0).float(), rtol=1e-4, atol=1e-4)


def test_scenes_depend_on_split_and_index_alone():
    alone = SyntheticWorld("val", (16, 16)).samples([7])
    batch = SyntheticWorld("val", (16, 16)).samples(range(10))
    for name, values in alone.values.items():
        torch.testing.assert_close(values[0], batch.values[name][7], rtol=0, atol=1e-6)
    assert alone.captions == batch.captions[7:8] and alone.names == batch.names[7:8] == ["000007"]
    train = SyntheticWorld("train", (16, 16)).samples(range(10))
    assert (train.values["depth"] - batch.values["depth"]).abs().flatten(1).amax(1).min() > 0.1
    scenes = torch.cat([draw_scenes(s, range(4000))["centre"][:, 0, 2] for s in ("train", "val")])
    assert len(torch.unique(scenes)) > 7900  # float32 values: a few coincide by chance


def test_worlds_are_those_that_networks_were_trained_on():
    """A change of the columns, or of the order of sums, changes every scene: these are scenes of the first version."""
    expected = {
        ("train", 0): ("a small cyan ball left of a small red ball in a room", 0.377525, 3.673077, -0.026717),
        ("val", 123): ("a small blue ball on open striped ground", 0.092905, 4.847778, 0.022873),
    }
    for (split, index), (line, *means) in expected.items():
        batch = SyntheticWorld(split, (32, 32)).samples([index])
        assert batch.captions == [line]
        found = [batch.values[name].mean().item() for name in ("rgb", "depth", "normal")]
        assert found == pytest.approx(means, abs=1e-5)


def test_captions_describe_the_scene():
    scenes = draw_scenes("val", range(300))
    out = render(scenes, 48)
    for i in range(300):
        line = caption(scenes, i)
        k = int(scenes["count"][i])
        words = [w for w in line.split() if w in COLORS]
        assert len(words) == k == len(set(words))
        columns = scenes["centre"][i, :k, 0] / scenes["centre"][i, :k, 2]
        assert (columns.diff() > 0).all()  # drawn left to right
        if k == 2:
            color = [list(COLORS)[c] for c in scenes["color"][i, :2]]
            if " left of " in line:
                assert words == color
            elif " right of " in line:
                assert words == color[::-1]
            else:
                nearer = scenes["centre"][i, 0, 2] < scenes["centre"][i, 1, 2]
                assert words == color and nearer == (" in front of " in line)
        text = encode_text([line], PRESETS["nano"].text_length)[0]  # no caption is cut
        assert bytes(text.tolist()).replace(b"\0", b"").decode() == line.replace(" ", "")
        assert " open " in line or (out["depth"][i] > 0).all()  # sky is outside only


def masks_of(pattern, count=200):
    """(images, masks) of so many scenes as a sensor of this pattern sees them."""
    rgb = SyntheticWorld("train", (32, 32)).samples(range(count)).values["rgb"]
    return rgb, sensor_mask(rgb, pattern, PerSampleRNG(0, range(count)).rand)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_keep_pixels_in_their_own_way(pattern):
    rgb, mask = masks_of(pattern)
    assert mask.shape == (200, 1, 32, 32) and mask.dtype == torch.bool
    share = mask.float().mean((1, 2, 3))
    if pattern == "dense":
        assert mask.all()
    elif pattern == "uniform":
        assert share.min() > 0 and share.max() < 0.6 and 0.01 < share.median() < 0.15
    elif pattern == "lidar":
        rows = mask.any(3)[:, 0].float().mean(1)
        assert (rows <= 0.5).all() and (rows > 0).all()
    elif pattern == "sfm":
        grey = rgb.mean(1, keepdim=True)
        across = torch.nn.functional.pad(grey.diff(dim=3).abs(), (0, 1))
        down = torch.nn.functional.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1))
        assert ((across + down)[mask] > 0.05).all() and share.mean() < 0.4
    else:
        assert share.min() > 0.1 and (share < 1).float().mean() > 0.9


def test_mixed_gives_each_sample_one_of_the_patterns():
    _, mixed = masks_of("mixed", 400)
    same = torch.stack([(masks_of(pattern, 400)[1] == mixed).flatten(1).all(1) for pattern in PATTERNS])
    assert same.any(0).all()
    assert same.float().mean(1).tolist() == pytest.approx(list(PATTERNS.values()), abs=0.07)


def test_a_number_is_a_share_of_pixels():
    tenth = sensor_mask(torch.zeros(400, 3, 32, 32), "0.1", PerSampleRNG(0, range(400)).rand).float().mean()
    assert tenth.item() == pytest.approx(0.1, abs=0.003)


def test_text_is_bytes_with_words_on_token_boundaries():
    text = encode_text(["a red ball", "", "überlänge checkered"], 32).view(3, 4, TEXT_PATCH)
    assert bytes(text[0, 1]) == b"red\0\0\0\0\0" and not text[1].any()
    assert bytes(text[2].flatten()).replace(b"\0", b"").decode() == "überlängecheckered"
    assert encode_text(["word " * 100], 32).shape == (1, 32)


def test_ranks_share_a_step_without_overlap():
    whole = list(training_indices(0, 5, 8))
    assert [i for rank in range(4) for i in training_indices(0, 5, 8, rank, 4)] == whole
    assert whole[0] == 40 and not set(whole) & set(training_indices(1, 5, 8))


def test_split_mix_is_the_published_generator():
    """The first outputs of SplitMix64 with seed 1234567, as its public test vectors have them."""
    outputs = split_mix(1234567 + torch.arange(1, 6) * GOLDEN)
    expected = (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    assert [output % (1 << 64) for output in outputs.tolist()] == list(expected)


def test_random_numbers_of_a_sample_do_not_depend_on_its_batch():
    together = PerSampleRNG(0, [4, 5, 6])
    alone = PerSampleRNG(0, [6])
    for kind, shape in (("rand", ()), ("randn", (1, 4, 4)), ("rand", (3,)), ("randn", (3, 3)), ("randn", ())):
        drawn = getattr(together, kind)(*shape)
        assert drawn.shape == (3, *shape)
        assert torch.equal(drawn[2:], getattr(alone, kind)(*shape))
    rows = torch.cat([PerSampleRNG(key, [index]).randn(50) for key in (0, 1) for index in (0, 1, 1 << 32, 2 << 32)])
    assert len(torch.unique(rows, dim=0)) == 8  # of 64-bit indices every bit counts


def test_draws_are_independent_and_have_their_distributions():
    """Kolmogorov's distance at a level of 1e-6; no correlation of values, draws, samples or neighbouring indices."""
    draws = PerSampleRNG(0, range(1000))
    uniform = draws.rand(100)
    again = draws.rand(100)
    normal = draws.randn(100)
    normal_again = draws.randn(100)
    expected = torch.linspace(0, 1, 100_000, dtype=torch.float64)
    for values in (uniform, torch.special.ndtr(normal.double())):
        assert values.min() >= 0 and values.max() < 1
        assert (values.flatten().double().sort().values - expected).abs().max() < 2.7 / 100_000**0.5
    assert normal.abs().max() > 4
    centred = uniform - 0.5
    centred_again = again - 0.5
    pairs = (
        (centred, centred_again),
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (normal, normal_again),
        (normal[1:], normal[:-1]),
        (normal[:, 1:], normal[:, :-1]),
        (normal[:, :50], normal[:, 50:]),  # cosine and sine of the same bits
        (normal[:, :50] ** 2 - 1, normal[:, 50:] ** 2 - 1),
    )
    for a, b in pairs:
        correlation = (a * b).mean() / (a.std() * b.std())
        assert correlation.abs() < 5 / a.numel() ** 0.5


def test_near_is_bright_and_missing_is_black():
    depth = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    brightness = paint_depth(depth)[0].sum(-1)
    assert brightness[0] > brightness[1] > brightness[2] > brightness[3] == 0
