"""The mathematics of the method: closed forms, invariances, gradients that must be zero."""

import math

import pytest
import torch

from model import (
    DEPTH,
    MU,
    PRESETS,
    RGB,
    SIGMA,
    T_MIN,
    TEXT_PATCH,
    Config,
    DiT,
    contract,
    corrupt,
    distillation_weight,
    draw_noise_levels,
    logit_normal,
    normalize_depth,
    orthogonalize,
    plateau_constants,
    plateau_logit_normal,
    rope_angles,
    rotate,
    sampling_grid,
    scored,
    token_ids,
    training_cost,
    uncontract,
    velocity_loss,
    warp,
)

SMALL = Config(width=64, depth=2, head=16, patch=4, size=16, decoder_depth=1, text_length=32)


def build(*modalities, seed=0, random=True, config=SMALL):
    """A network; random=True fills the zero-initialised parts too, so that nothing is trivially zero."""
    torch.manual_seed(seed)
    network = DiT(config.with_modalities(*modalities))
    if random:
        for p in network.parameters():
            p.data.normal_(std=0.1) if p.ndim > 1 else p.data.add_(torch.randn_like(p) * 0.1)
    return network


def uniform(n):
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.rand(n, generator=generator)


def inputs(batch=2, height=16, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {
        "rgb": torch.randn(batch, 3, height, width, generator=g),
        "depth": torch.rand(batch, 1, height, width, generator=g) * 2,
    }
    noise = {m: torch.randn(v.shape, generator=g) for m, v in x.items()}
    t = {m: torch.rand(batch, generator=g) for m in x}
    text = torch.randint(1, 255, (batch, SMALL.text_length), dtype=torch.uint8, generator=g)
    return x, noise, t, text


# ---- Flow matching ----


def test_x_prediction_loss_equals_velocity_loss():
    x, noise, t, _ = inputs(batch=8)
    x0, eps, t = x["rgb"], noise["rgb"], t["rgb"].clamp(min=T_MIN)
    guess = torch.randn_like(x0)
    x_t = corrupt(x0, eps, t)
    implied = (guess - x_t) / t.view(-1, 1, 1, 1)
    loss = velocity_loss(guess, x0, t).sum() / scored(x0, t).sum()
    torch.testing.assert_close(loss, (implied - (x0 - eps)).square().mean(), rtol=1e-4, atol=1e-5)


def test_loss_clamps_t_in_the_division_only():
    x0 = torch.zeros(1, 3, 4, 4)
    assert velocity_loss(x0 + 1, x0, torch.tensor([0.001])) / x0.numel() == pytest.approx(1 / T_MIN**2)


def test_clean_modality_and_missing_pixels_cost_nothing():
    x0 = torch.randn(2, 1, 4, 4)
    guess = torch.randn(2, 1, 4, 4, requires_grad=True)
    valid = torch.rand(2, 1, 4, 4) < 0.5
    t = torch.tensor([0.0, 0.5])
    velocity_loss(guess, x0, t, valid).sum().backward()
    assert scored(x0, t, valid).sum((1, 2, 3)).tolist() == [0, valid[1].sum()]
    assert (guess.grad[0] == 0).all() and (guess.grad[1][~valid[1]] == 0).all() and (guess.grad[1][valid[1]] != 0).all()


def test_distillation_weight_scales_each_sample():
    guess, taught, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.4, 0.8])
    weight = torch.tensor([0.5, 0.0])
    torch.testing.assert_close(velocity_loss(guess, taught, t, weight=weight), velocity_loss(guess, taught, t) * weight)


def test_distillation_is_strongest_where_depth_is_noise():
    assert distillation_weight(torch.tensor([0.0, 0.25, 1.0]), 0.1, 0.5).tolist() == pytest.approx([0.1, 0.2, 0.5])


def test_endpoints_of_the_interpolant():
    x, noise, _, _ = inputs()
    assert torch.equal(corrupt(x["rgb"], noise["rgb"], torch.zeros(2)), x["rgb"])
    torch.testing.assert_close(corrupt(x["rgb"], noise["rgb"], torch.ones(2)), noise["rgb"])


# ---- Missing depth ----


def test_values_in_missing_pixels_reach_nothing():
    network = build(RGB, DEPTH)
    x, noise, t, text = inputs()
    valid = {"rgb": None, "depth": torch.rand(2, 1, 16, 16) < 0.3}
    results = []
    for fill in (0.0, 1e6, float("nan")):
        depth = torch.where(valid["depth"], x["depth"], fill).requires_grad_()
        x0 = {"rgb": x["rgb"], "depth": DEPTH.encode(depth, valid["depth"])}
        x0_hat = network({m: corrupt(x0[m], noise[m], t[m], valid[m]) for m in x0}, t, text)
        losses = {m: velocity_loss(x0_hat[m], x0[m], t[m], valid[m]) for m in x0}
        (losses["rgb"] + losses["depth"]).sum().backward()
        assert (depth.grad[~valid["depth"]] == 0).all() and (depth.grad[valid["depth"]] != 0).any()
        results.append([x0_hat["rgb"], x0_hat["depth"], losses["depth"]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_wholly_missing_map_is_pure_noise_whatever_t_is(level):
    x, noise, _, _ = inputs()
    nothing = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    assert torch.equal(corrupt(x["depth"], noise["depth"], torch.full((2,), level), nothing), noise["depth"])


def test_wholly_missing_map_is_drawn_as_noise_level_one_and_never_beside_a_clean_image():
    present = {"depth": torch.arange(4000) % 2 == 0}
    t = draw_noise_levels((RGB, DEPTH), uniform(4000), present)
    assert (t["depth"][1::2] == 1).all() and (t["rgb"][1::2] > 0).all()
    assert (t["depth"][0::2] < 1).all() and (t["rgb"][0::2] == 0).any()


def test_depth_normalisation_uses_valid_pixels_only_and_ignores_scale():
    depth, valid = torch.rand(3, 1, 8, 8) * 9 + 1, torch.rand(3, 1, 8, 8) < 0.5
    encoded = normalize_depth(torch.where(valid, depth, float("inf")), valid)
    torch.testing.assert_close(normalize_depth(depth * 1000, valid), encoded)
    relative = torch.where(valid, uncontract(encoded), 0).sum((1, 2, 3)) / valid.sum((1, 2, 3))
    torch.testing.assert_close(relative, torch.ones(3), rtol=1e-4, atol=1e-4)
    assert (normalize_depth(depth, torch.zeros_like(valid)) == 0).all()


def test_contraction_inverts_and_stays_below_two():
    z = torch.logspace(-3, 2.5, 1000, dtype=torch.float64)
    torch.testing.assert_close(uncontract(contract(z)), z, rtol=1e-9, atol=0)
    assert (contract(z).diff() > 0).all() and contract(z).max() < 2
    assert contract(torch.tensor(1.0)) == 1 and contract(torch.tensor(4.0)) == 1.75


# ---- Noise levels ----


def kolmogorov_smirnov(samples, cdf):
    """Largest distance between the samples' distribution and cdf, times sqrt(n): above 1.95 once in a thousand."""
    x = samples.sort().values
    steps = torch.arange(len(x) + 1) / len(x)
    return (torch.maximum((cdf(x) - steps[:-1]).abs(), (cdf(x) - steps[1:]).abs()).max() * math.sqrt(len(x))).item()


def normal_cdf(z):
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def test_logit_normal_matches_its_distribution():
    t = logit_normal(torch.rand(50_000, generator=torch.Generator().manual_seed(0)).double())
    assert kolmogorov_smirnov(t, lambda t: normal_cdf((torch.logit(t) - MU) / SIGMA)) < 1.95


def plateau_cdf(t):
    """By numerical integration: the logit-normal density up to its mode, constant from there, normalised."""
    mode = plateau_constants()[0]
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    x = grid.clamp(max=mode)
    density = torch.exp(-(((torch.logit(x) - MU) / SIGMA) ** 2) / 2) / (x * (1 - x))
    cumulative = torch.cumulative_trapezoid(density, grid)
    cumulative = torch.cat([torch.zeros(1), cumulative / cumulative[-1]])
    place = (t - grid[0]) / (grid[1] - grid[0])
    low = place.long().clamp(0, len(grid) - 2)
    return torch.lerp(cumulative[low], cumulative[low + 1], (place - low).clamp(0, 1))


def test_plateau_matches_its_density():
    mode = plateau_constants()[0]
    assert math.log(mode / (1 - mode)) - MU == pytest.approx(SIGMA**2 * (2 * mode - 1))
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(1)).double()
    assert kolmogorov_smirnov(plateau_logit_normal(u), plateau_cdf) < 1.95
    assert kolmogorov_smirnov(logit_normal(u), plateau_cdf) > 10  # the test can tell them apart


def test_modes_occur_with_their_probabilities_and_levels_are_independent():
    n = 40_000
    t = draw_noise_levels((RGB, DEPTH), uniform(n))
    i2d, d2i = t["rgb"] == 0, t["depth"] == 0
    assert not (i2d & d2i).any()
    for mode in (i2d, d2i):
        assert abs(mode.float().mean().item() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
    both = torch.stack([t["rgb"], t["depth"]])[:, ~i2d & ~d2i]
    assert abs(torch.corrcoef(both)[0, 1].item()) < 4 / math.sqrt(n * 0.6)
    assert kolmogorov_smirnov(both[0].double(), lambda t: normal_cdf((torch.logit(t) - MU) / SIGMA)) < 1.95
    assert kolmogorov_smirnov(t["depth"][i2d].double(), plateau_cdf) < 1.95


def test_one_modality_alone_is_never_held_clean():
    assert (draw_noise_levels((RGB,), uniform(5000))["rgb"] > 0).all()


def test_sampling_grid_and_warp():
    grid = sampling_grid(50)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    alpha = math.exp(MU)  # with sigma = 1 the grid is f_alpha of the linear one
    torch.testing.assert_close(grid, warp(torch.linspace(1, 0, 51, dtype=torch.float64), math.log2(alpha)))
    torch.testing.assert_close(warp(grid, 0), grid)
    torch.testing.assert_close(warp(warp(grid, 3), -3), grid)
    assert (warp(grid, 5)[1:-1] > grid[1:-1]).all() and warp(grid, 5)[-1] == 0 and warp(grid, -5)[0] == 1


# ---- Network ----


def test_mixers_are_exact_identities_at_initialisation():
    network = build(RGB, DEPTH, random=False)
    with torch.no_grad():  # open everything but the mixers, which keep their initial values
        for name, p in network.named_parameters():
            if "mixers" not in name:
                p.add_(torch.randn_like(p) * 0.1)
    x, _, t, text = inputs()
    before = network(x, t, text)
    for mixer in network.mixers.values():
        mixer.mlp[0].weight.data.normal_()  # still silent: the last layer is zero
    after = network(x, t, text)
    network.mixers = torch.nn.ModuleDict(
        {k: type("None_", (torch.nn.Module,), {"forward": lambda s, t: 0})() for k in network.mixers}
    )
    without = network(x, t, text)
    for m in x:
        assert torch.equal(before[m], after[m]) and torch.equal(before[m], without[m])
    network = build(RGB, DEPTH)
    other = network(x, {**t, "depth": t["depth"] * 0.5}, text)["rgb"]
    assert not torch.equal(network(x, t, text)["rgb"], other)  # once trained they are not


def test_grown_checkpoint_predicts_the_same_image_without_depth_tokens():
    small = build(RGB)
    grown = build(RGB, DEPTH, seed=1)
    fresh = {k: v.clone() for k, v in grown.state_dict().items()}
    grown.warm_start(small.state_dict())
    x, _, t, text = inputs()
    alone = {"rgb": x["rgb"]}, {"rgb": t["rgb"]}, text
    assert torch.equal(small(*alone)["rgb"], grown(*alone)["rgb"])
    torch.testing.assert_close(grown.modulations["depth"].weight, small.modulations["rgb"].weight)
    for part in ("tokenizers.depth.weight", "timesteps.depth.mlp.0.weight", "decoders.depth.head.weight"):
        assert torch.equal(grown.state_dict()[part], fresh[part])
    with pytest.raises(ValueError, match="does not fit"):
        grown.warm_start(build(RGB, config=PRESETS["nano"]).state_dict())


def test_each_modality_is_modulated_by_its_own_timestep():
    network = build(RGB, DEPTH)
    for mixer in network.mixers.values():
        mixer.mlp[-1].weight.data.zero_(), mixer.mlp[-1].bias.data.zero_()
    seen, modulations = {}, []
    network.blocks[0].register_forward_hook(lambda module, args, out: modulations.append(args[1]))
    network.decoders["rgb"].register_forward_hook(lambda module, args, out: seen.setdefault("rgb", []).append(args[1]))
    network.decoders["depth"].register_forward_hook(
        lambda module, args, out: seen.setdefault("depth", []).append(args[1])
    )
    x, _, t, text = inputs()
    network(x, t, text)
    network(x, {**t, "depth": t["depth"] / 2}, text)
    assert torch.equal(*seen["rgb"]) and not torch.equal(*seen["depth"])
    image_end = SMALL.text_length // TEXT_PATCH + 16  # text tokens go with the image's
    for first, second in zip(*modulations, strict=True):
        assert torch.equal(first[:, :image_end], second[:, :image_end])
        assert not torch.isclose(first[:, image_end:], second[:, image_end:]).all(-1).any()


def test_every_position_of_a_non_square_image_has_its_own_angle():
    angles = rope_angles(torch.cat([token_ids(m, 3, 7) for m in (0, 1)]), 32)
    assert len(torch.unique(angles, dim=0)) == 2 * 3 * 7
    assert torch.equal(angles[:21, 2:14], angles[21:, 2:14])  # row and column angles are shared by the modalities


def test_the_network_gives_its_tokens_those_angles():
    network, seen = build(RGB, DEPTH), []
    network.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[2]))
    x, _, t, text = inputs(height=8, width=16)
    network(x, t, text)
    text_ids = torch.nn.functional.pad(torch.arange(SMALL.text_length // TEXT_PATCH)[:, None], (3, 0))
    angles = rope_angles(torch.cat([text_ids, token_ids(0, 2, 4), token_ids(1, 2, 4)]), SMALL.head)
    cos, sin = seen[0]
    torch.testing.assert_close(cos[:, 0, : SMALL.head // 2], angles.cos())
    torch.testing.assert_close(sin[:, 0, SMALL.head // 2 :], angles.sin())


def test_rope_makes_attention_depend_on_differences_only():
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def product(a, b):
        tables = []
        for position in (a, b):
            angles = rope_angles(torch.tensor([position]), 32)[:, None]
            tables.append((torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)))
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    torch.testing.assert_close(
        product((0, 1, 5, 0), (0, 4, 3, 0)), product((0, 11, 25, 0), (0, 14, 23, 0)), rtol=1e-4, atol=1e-4
    )
    assert (product((0, 1, 5, 0), (0, 4, 3, 0)) - product((0, 5, 1, 0), (0, 3, 4, 0))).abs() > 1e-3


def test_rows_and_columns_are_told_apart():
    """A 2x1 and a 1x2 grid of the same patches must not look the same."""
    network = build(RGB)
    patches = torch.randn(1, 3, 8, 4)
    tall, wide = patches, torch.cat([patches[:, :, :4], patches[:, :, 4:]], 3)
    t, text = {"rgb": torch.tensor([0.5])}, torch.zeros(1, 32, dtype=torch.uint8)
    a, b = network({"rgb": tall}, t, text)["rgb"], network({"rgb": wide}, t, text)["rgb"]
    assert a.shape == (1, 3, 8, 4) and b.shape == (1, 3, 4, 8)
    assert (a[:, :, :4] - b[..., :4]).abs().max() > 1e-4


def test_head_is_float32_under_autocast():
    network = build(RGB, DEPTH)
    x, _, t, text = inputs()
    dtypes = []
    network.decoders["depth"].head.register_forward_hook(
        lambda module, args, out: dtypes.extend([args[0].dtype, out.dtype])
    )
    with torch.autocast("cpu", torch.bfloat16):
        network(x, t, text)
    assert dtypes == [torch.float32, torch.float32]


def test_a_fresh_network_predicts_zero():
    x, _, t, text = inputs()
    for values in build(RGB, DEPTH, random=False)(x, t, text).values():
        assert (values == 0).all()


@pytest.mark.parametrize(("preset", "millions"), [("370m", 370), ("800m", 800), ("3b", 3300)])
def test_presets_have_the_papers_parameter_counts(preset, millions):
    parameters, flops = training_cost(PRESETS[preset], (256, 256))
    assert abs(parameters / 1e6 - millions) < 0.05 * millions
    assert flops > 6 * parameters * 256  # 6 FLOPs a parameter and token, at the least


def test_counted_flops_match_a_closed_form():
    """Blocks: 6 FLOPs a weight and token for matmuls, 12 N^2 D for attention; embedders and heads are a few percent."""
    config, n = PRESETS["370m"].with_modalities(RGB), 256 + 64
    matmuls = 6 * n * config.depth * 11.5 * config.width**2
    attention = 12 * n**2 * config.width * config.depth
    _, flops = training_cost(config, (256, 256))
    assert abs(flops / (matmuls + attention) - 1) < 0.05


def test_orthogonalize_brings_singular_values_near_one():
    g = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    for matrix in (g, g.T):
        values = torch.linalg.svdvals(orthogonalize(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7))
        assert values.min() > 0.6 and values.max() < 1.3
