"""The mathematics of the method: closed forms, invariances, gradients that must be zero."""

import itertools
import math
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from model import (
    DEPTH,
    MU,
    NORMAL,
    PRESETS,
    RGB,
    SIGMA,
    T_MIN,
    TEXT_PATCH,
    Config,
    DiT,
    Modality,
    contract,
    corrupt,
    distillation_weight,
    draw_noise_levels,
    logit_normal,
    loss_mask,
    normalize_depth,
    orthogonalize,
    plateau_logit_normal,
    rope_angles,
    rotate,
    sampling_grid,
    split_by_mode,
    squared_error,
    token_positions,
    training_cost,
    uncontract,
    velocity_weight,
    warp,
)

NANO = Path(__file__).parent.parent / "assets/nano.pt"
SMALL = Config(width=64, depth=2, head=16, patch=4, size=16, decoder_depth=1, text_length=32)


def build(*modalities, seed=0, random=True, config=SMALL):
    """A network; random=True fills the zero-initialised parts too, so that nothing is trivially zero."""
    torch.manual_seed(seed)
    network = DiT(config.with_modalities(*modalities))
    if random:
        for p in network.parameters():
            if p.ndim > 1:
                p.data.normal_(std=0.1)
            else:
                p.data.add_(torch.randn_like(p) * 0.1)
    return network


def uniform(n):
    """A function that draws (n,) from U(0, 1)."""
    generator = torch.Generator().manual_seed(0)

    def rand():
        return torch.rand(n, generator=generator)

    return rand


def inputs(batch=2, height=16, width=16, seed=0, modalities=(RGB, DEPTH)):
    """(values, noise, noise levels, text): the first three {m: ...}, with values as they are diffused."""
    g = torch.Generator().manual_seed(seed)
    x = {}
    for m in modalities:
        shape = (batch, *m.shape((height, width)))
        if m.encoding == "relative depth":
            x[m.name] = torch.rand(shape, generator=g) * 2
        else:
            x[m.name] = m.finish(torch.randn(shape, generator=g))
    noise = {m: torch.randn(v.shape, generator=g) for m, v in x.items()}
    t = {m: torch.rand(batch, generator=g) for m in x}
    text = torch.randint(1, 255, (batch, SMALL.text_length), dtype=torch.uint8, generator=g)
    return x, noise, t, text


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- Flow matching ----


def test_velocity_weight_makes_the_x_prediction_loss_that_of_velocities():
    x, noise, t, _ = inputs(batch=8)
    x0 = x["rgb"]
    t = t["rgb"].clamp(min=T_MIN)
    guess = torch.randn_like(x0)
    x_t = corrupt(x0, noise["rgb"], t)
    implied = (guess - x_t) / t.view(-1, 1, 1, 1)
    wanted = (implied - (x0 - noise["rgb"])).square().sum((1, 2, 3))  # Eq. 7

    loss = velocity_weight(t) * squared_error(guess, x0, loss_mask(x0, t))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(RGB.loss_weight(t), velocity_weight(t))


def test_loss_clamps_t_in_the_division_only():
    t = torch.tensor([0.001])
    x0 = torch.zeros(1, 3, 4, 4)
    loss = velocity_weight(t) * squared_error(x0 + 1, x0, loss_mask(x0, t))
    assert loss.item() / x0.numel() == pytest.approx(1 / T_MIN**2)


def test_a_modality_chooses_its_loss_and_weight():
    t = torch.tensor([0.01, 0.5, 1.0])
    assert replace(RGB, loss="x0", weight=3.0).loss_weight(t).tolist() == [3, 3, 3]
    assert torch.equal(replace(RGB, weight=3.0).loss_weight(t), 3 * velocity_weight(t))


def test_clean_modality_and_missing_pixels_cost_nothing():
    x0 = torch.randn(2, 1, 4, 4)
    guess = torch.randn(2, 1, 4, 4, requires_grad=True)
    valid = torch.rand(2, 1, 4, 4) < 0.5
    mask = loss_mask(x0, torch.tensor([0.0, 0.5]), valid)
    squared_error(guess, x0, mask).sum().backward()
    assert mask.sum((1, 2, 3)).tolist() == [0, valid[1].sum()]
    assert torch.equal(guess.grad != 0, mask)


def test_squared_error_is_each_samples_own_and_sees_its_mask_alone():
    x0 = torch.randn(3, 3, 4, 4)
    guess = torch.randn(3, 3, 4, 4)
    mask = (torch.rand(3, 1, 4, 4) < 0.5).expand_as(x0)
    errors = squared_error(guess, torch.where(mask, x0, torch.nan), mask)
    for i in range(3):
        close(errors[i], (guess[i] - x0[i])[mask[i]].square().sum())


def test_distillation_weight_grows_with_the_noise_level_of_depth():
    assert distillation_weight(torch.tensor([0.0, 0.25, 1.0]), 0.1, 0.5).tolist() == pytest.approx([0.1, 0.2, 0.5])


def test_endpoints_of_the_interpolant():
    x, noise, _, _ = inputs()
    assert torch.equal(corrupt(x["rgb"], noise["rgb"], torch.zeros(2)), x["rgb"])
    assert torch.equal(corrupt(x["rgb"], noise["rgb"], torch.ones(2)), noise["rgb"])


def test_sums_by_mode_add_up():
    """At most one modality is held clean, so the modes of another one part its samples."""
    modalities = (RGB, DEPTH, NORMAL)
    t = draw_noise_levels(modalities, uniform(1000))
    values = torch.rand(2, 1000)
    sums = split_by_mode("rgb", values, t)
    assert list(sums) == ["", "_given_depth", "_given_normal", "_joint"]
    close(sums[""], values.sum(1))
    close(sums["_given_depth"], values[:, t["depth"] == 0].sum(1))
    close(sums["_given_depth"] + sums["_given_normal"] + sums["_joint"], sums[""])
    assert list(split_by_mode("rgb", values[0], {"rgb": t["rgb"]})) == [""]


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
        losses = {}
        for m in network.modalities:
            error = squared_error(x0_hat[m.name], x0[m.name], loss_mask(x0[m.name], t[m.name], valid[m.name]))
            losses[m.name] = m.loss_weight(t[m.name]) * error
        (losses["rgb"] + losses["depth"]).sum().backward()
        assert (depth.grad[~valid["depth"]] == 0).all()
        assert (depth.grad[valid["depth"]] != 0).any()
        results.append([x0_hat["rgb"], x0_hat["depth"], losses["depth"]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_wholly_missing_map_is_pure_noise_whatever_t_is(level):
    x, noise, _, _ = inputs()
    nothing = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    assert torch.equal(corrupt(x["depth"], noise["depth"], torch.full((2,), level), nothing), noise["depth"])


def test_wholly_missing_map_is_drawn_as_noise_level_one_and_never_beside_a_clean_image():
    has_pixels = {"depth": torch.arange(4000) % 2 == 0}
    for subsets in (False, True):
        t = draw_noise_levels((RGB, DEPTH), uniform(4000), has_pixels, subsets)
        assert (t["depth"][1::2] == 1).all()
        assert (t["rgb"][1::2] > 0).all()
        assert (t["depth"][0::2] < 1).all()
        assert (t["rgb"][0::2] == 0).any()


def test_depth_normalisation_uses_valid_pixels_only_and_ignores_scale():
    depth = torch.rand(3, 1, 8, 8) * 9 + 1
    valid = torch.rand(3, 1, 8, 8) < 0.5
    encoded = normalize_depth(torch.where(valid, depth, float("inf")), valid)
    torch.testing.assert_close(normalize_depth(depth * 1000, valid), encoded)
    relative = torch.where(valid, uncontract(encoded), 0).sum((1, 2, 3)) / valid.sum((1, 2, 3))
    close(relative, torch.ones(3))
    assert (normalize_depth(depth, torch.zeros_like(valid)) == 0).all()
    assert torch.equal(normalize_depth(depth, None), normalize_depth(depth, torch.ones_like(valid)))


def test_contraction_inverts_and_stays_below_two():
    z = torch.logspace(-3, 2.5, 1000, dtype=torch.float64)
    torch.testing.assert_close(uncontract(contract(z)), z, rtol=1e-9, atol=0)
    assert (contract(z).diff() > 0).all()
    assert contract(z).max() < 2
    assert contract(torch.tensor(1.0)) == 1
    assert contract(torch.tensor(4.0)) == 1.75


# ---- Noise levels ----


def kolmogorov_smirnov(samples, cdf):
    """Largest distance between the samples' distribution and cdf, times sqrt(n): above 1.95 once in a thousand."""
    expected = cdf(samples.sort().values)
    steps = torch.arange(len(samples) + 1) / len(samples)
    distance = torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs())
    return distance.max().item() * math.sqrt(len(samples))


def logit_normal_cdf(t):
    z = (torch.logit(t) - MU) / SIGMA
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def plateau_cdf(t):
    """By numerical integration: the logit-normal density up to its mode, constant from there, normalised."""
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    density = torch.exp(-(((torch.logit(grid) - MU) / SIGMA) ** 2) / 2) / (grid * (1 - grid))
    density = density.cummax(0).values
    cumulative = torch.cumulative_trapezoid(density, grid)
    cumulative = torch.cat([torch.zeros(1), cumulative / cumulative[-1]])
    place = (t - grid[0]) / (grid[1] - grid[0])
    low = place.long().clamp(0, len(grid) - 2)
    return torch.lerp(cumulative[low], cumulative[low + 1], (place - low).clamp(0, 1))


def test_logit_normal_matches_its_distribution():
    t = logit_normal(torch.rand(50_000, generator=torch.Generator().manual_seed(0)).double())
    assert kolmogorov_smirnov(t, logit_normal_cdf) < 1.95


def test_plateau_matches_its_density():
    shares = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    close(plateau_cdf(plateau_logit_normal(shares)), shares)
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(1)).double()
    assert kolmogorov_smirnov(plateau_logit_normal(u), plateau_cdf) < 1.95
    assert kolmogorov_smirnov(logit_normal(u), plateau_cdf) > 10  # the test can tell them apart


def test_a_share_of_the_levels_is_uniform():
    t = draw_noise_levels((RGB,), uniform(50_000), uniform=0.3)["rgb"].double()
    assert kolmogorov_smirnov(t, lambda x: 0.3 * x + 0.7 * logit_normal_cdf(x)) < 1.95
    assert kolmogorov_smirnov(t, logit_normal_cdf) > 10  # the test can tell them apart


def test_modes_occur_with_their_probabilities_and_levels_are_independent():
    n = 40_000
    t = draw_noise_levels((RGB, DEPTH), uniform(n))
    i2d = t["rgb"] == 0
    d2i = t["depth"] == 0
    assert not (i2d & d2i).any()
    for mode in (i2d, d2i):
        assert abs(mode.float().mean().item() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
    both = torch.stack([t["rgb"], t["depth"]])[:, ~i2d & ~d2i]
    assert abs(torch.corrcoef(both)[0, 1].item()) < 4 / math.sqrt(n * 0.6)
    assert kolmogorov_smirnov(both[0].double(), logit_normal_cdf) < 1.95
    assert kolmogorov_smirnov(t["depth"][i2d].double(), plateau_cdf) < 1.95


def test_any_subset_is_held_clean_with_its_probability_but_never_all():
    n = 40_000
    modalities = [replace(RGB, p_clean=0.5), replace(DEPTH, p_clean=0.3), replace(NORMAL, p_clean=0.6)]
    t = draw_noise_levels(modalities, uniform(n), subsets=True)
    clean = torch.stack([t[m.name] == 0 for m in modalities], 1)  # (n, 3)

    for subset in itertools.product((False, True), repeat=3):
        share = math.prod(m.p_clean if held else 1 - m.p_clean for m, held in zip(modalities, subset, strict=True))
        if all(subset):
            share = 0.0
        if not any(subset):  # a draw that would hold all clean holds none
            share += math.prod(m.p_clean for m in modalities)
        occurs = (clean == torch.tensor(subset)).all(1).float().mean().item()
        assert abs(occurs - share) <= 4 * math.sqrt(share * (1 - share) / n)
    assert kolmogorov_smirnov(t["rgb"][~clean[:, 0]].double(), logit_normal_cdf) < 1.95


def test_one_modality_alone_is_never_held_clean():
    for subsets in (False, True):
        assert (draw_noise_levels((RGB,), uniform(5000), subsets=subsets)["rgb"] > 0).all()


def test_sampling_grid_and_warp():
    grid = sampling_grid(50)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    alpha = math.exp(MU)  # with sigma = 1 the grid is f_alpha of the linear one
    torch.testing.assert_close(grid, warp(torch.linspace(1, 0, 51, dtype=torch.float64), math.log2(alpha)))
    torch.testing.assert_close(warp(grid, 0), grid)
    torch.testing.assert_close(warp(warp(grid, 3), -3), grid)
    assert (warp(grid, 5)[1:-1] > grid[1:-1]).all()
    assert warp(grid, 5)[-1] == 0
    assert warp(grid, -5)[0] == 1


# ---- Modalities ----


def test_finished_values_are_values_as_they_are_stored():
    mixed = torch.randn(2, 3, 8, 8) * 3
    close(NORMAL.finish(mixed).norm(dim=1), torch.ones(2, 8, 8), 1e-6)
    assert torch.equal(RGB.finish(mixed), mixed.clamp(-1, 1))
    depth = mixed[:, :1].abs()
    assert torch.equal(DEPTH.finish(depth), depth)


@pytest.mark.parametrize("m", [RGB, DEPTH, NORMAL], ids=attrgetter("name"))
def test_decoding_inverts_encoding_up_to_the_scale_of_depth(m):
    stored = m.finish(torch.rand(2, *m.shape((8, 8))) + 0.5)
    decoded = m.decode(m.encode(stored))
    ratio = decoded / stored
    close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    if m is not DEPTH:
        assert torch.equal(decoded, stored)


def test_modalities_of_one_name_or_one_id_are_refused():
    for entry in (replace(DEPTH, id=RGB.id), replace(DEPTH, name="rgb")):
        with pytest.raises(ValueError, match="different names and ids"):
            SMALL.with_modalities(RGB, entry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": 24}, "head is 24, must be a multiple of 16"),
        ({"width": 96}, "width is 96, must be a multiple of 4 x head, 64"),
        ({"text_length": 9}, "text_length is 9, must be a multiple of 8"),
        ({"modalities": (replace(RGB, stride=3),)}, "patch is 4, must be a multiple of the stride of rgb, 3"),
    ],
)
def test_a_config_of_which_no_network_can_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_p_clean_must_be_a_probability():
    for p_clean in (-0.1, 1.1):
        with pytest.raises(ValueError, match="depth: p_clean is"):
            replace(DEPTH, p_clean=p_clean)


@pytest.mark.parametrize("field", ["timesteps", "encoding", "loss"])
def test_an_entry_names_what_it_does_not_know(field):
    with pytest.raises(ValueError, match=f"depth: {field} is 'else', must be one of"):
        replace(DEPTH, **{field: "else"})


# ---- Network ----


class Nothing(torch.nn.Module):
    """Stands for a part of which nothing is added."""

    def forward(self, t):
        return 0


def test_cross_time_embedders_are_exact_identities_at_initialisation():
    network = build(RGB, DEPTH, random=False)
    with torch.no_grad():  # open everything but the cross embedders, which keep their initial values
        for name, p in network.named_parameters():
            if "cross_time_embedders" not in name:
                p.add_(torch.randn_like(p) * 0.1)
    x, _, t, text = inputs()
    before = network(x, t, text)
    for embedder in network.cross_time_embedders.values():
        embedder.mlp[0].weight.data.normal_()  # still silent: the last layer is zero
    after = network(x, t, text)
    network.cross_time_embedders = torch.nn.ModuleDict({pair: Nothing() for pair in network.cross_time_embedders})
    without = network(x, t, text)
    for m in x:
        assert torch.equal(before[m], after[m])
        assert torch.equal(before[m], without[m])


def test_conditioning_is_the_sum_of_own_and_cross_embeddings():
    """c_m = e_m(t_m) + sum over the others o of e_om(t_o), over the modalities that are there (Sec. 3.2)."""
    network = build(RGB, DEPTH, NORMAL)
    vectors = []

    def note_vector(module, args):
        vectors.append(args[1])

    network.decoders["depth"].register_forward_pre_hook(note_vector)
    x, _, t, text = inputs(modalities=network.modalities)
    network(x, t, text)
    own = network.time_embedders["depth"](t["depth"])
    from_image = network.cross_time_embedders["rgb_to_depth"](t["rgb"])
    from_normals = network.cross_time_embedders["normal_to_depth"](t["normal"])
    close(vectors[0], own + from_image + from_normals)

    del x["normal"]
    network(x, t, text)
    close(vectors[1], own + from_image)


def test_grown_checkpoint_predicts_the_same_image_without_depth_tokens():
    small = build(RGB)
    grown = build(RGB, DEPTH, seed=1)
    fresh = {k: v.clone() for k, v in grown.state_dict().items()}
    grown.warm_start(small.state_dict())
    x, _, t, text = inputs()
    noisy = {"rgb": x["rgb"]}
    assert torch.equal(small(noisy, t, text)["rgb"], grown(noisy, t, text)["rgb"])
    torch.testing.assert_close(grown.modulations["depth"].weight, small.modulations["rgb"].weight)
    for part in ("decoders.depth.head.weight", "cross_time_embedders.rgb_to_depth.mlp.0.weight"):
        assert torch.equal(grown.state_dict()[part], fresh[part])
    with pytest.raises(ValueError, match="does not fit"):
        grown.warm_start(build(RGB, config=PRESETS["nano"]).state_dict())


FLOW = Modality("flow", channels=2, id=4)


@pytest.mark.parametrize("m", [DEPTH, NORMAL, FLOW], ids=attrgetter("name"))
def test_a_new_modality_looks_like_an_image(m):
    """Its clean tokens and its conditioning are those of an image if it has as many channels, else of a grey image."""
    grown = build(RGB, m)
    grown.warm_start(build(RGB, seed=1).state_dict())
    values = torch.rand(2, m.channels, 8, 8) * 2 - 1
    patch = grown.config.patch
    center = 1.0 if m is DEPTH else 0.0  # depth is contracted into [0, 2)
    tokens = {}
    image = values if m is NORMAL else values.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    for name, x in ((m.name, values + center), ("rgb", image)):
        tokens[name] = grown.tokenizers[name](torch.nn.functional.pixel_unshuffle(x, patch).movedim(1, -1))
    close(tokens[m.name], tokens["rgb"], 1e-5)
    t = torch.tensor([0.0, 0.7])
    assert torch.equal(grown.time_embedders[m.name](t), grown.time_embedders["rgb"](t))


def test_a_tokenizer_of_another_stride_starts_at_random():
    latents = Modality("rgb", channels=3, id=0, stride=2)
    grown = build(latents, DEPTH)
    first = grown.tokenizers["depth"].weight.clone()
    grown.warm_start(build(latents, seed=1).state_dict())
    assert torch.equal(grown.tokenizers["depth"].weight, first)


@pytest.mark.parametrize("known", [DEPTH, NORMAL], ids=attrgetter("name"))
def test_a_network_of_two_modalities_grows_a_third(known):
    small = build(RGB, known)
    grown = build(RGB, DEPTH, NORMAL, seed=1)
    grown.warm_start(small.state_dict())
    x, _, t, text = inputs(modalities=(RGB, known))
    before = small(x, t, text)
    after = grown(x, t, text)
    for m in x:
        assert torch.equal(before[m], after[m])


def test_the_order_of_entries_behind_the_image_changes_nothing():
    """Positions are told apart by an entry's id, not by its place in the list."""
    modalities = (RGB, DEPTH, NORMAL)
    network = build(*modalities)
    other = build(RGB, NORMAL, DEPTH, seed=1)
    other.load_state_dict(network.state_dict())
    x, _, t, text = inputs(modalities=modalities)
    wanted = network(x, t, text)
    for m, x0_hat in other(x, t, text).items():
        close(x0_hat, wanted[m])

    renumbered = build(RGB, replace(DEPTH, id=NORMAL.id), replace(NORMAL, id=DEPTH.id))
    renumbered.load_state_dict(network.state_dict())
    assert (renumbered(x, t, text)["depth"] - wanted["depth"]).abs().max() > 1e-3


def test_surface_normals_are_one_entry_more():
    modalities = (RGB, DEPTH, NORMAL)
    network = build(*modalities)
    x, _, t, text = inputs(modalities=modalities)
    x0_hat = network(x, t, text)
    assert {m: v.shape for m, v in x0_hat.items()} == {m: v.shape for m, v in x.items()}
    x["normal"] = -x["normal"]
    for m, changed in network(x, t, text).items():
        assert not torch.equal(changed, x0_hat[m])  # every modality attends to the normals


def test_each_modality_is_modulated_by_its_own_timestep():
    network = build(RGB, DEPTH)
    for embedder in network.cross_time_embedders.values():
        embedder.mlp[-1].weight.data.zero_()
        embedder.mlp[-1].bias.data.zero_()
    modulations = []
    vectors = {"rgb": [], "depth": []}

    def note_modulation(module, args):
        modulations.append(args[1])

    def note_vector(module, args):
        name = "rgb" if module is network.decoders["rgb"] else "depth"
        vectors[name].append(args[1])

    network.blocks[0].register_forward_pre_hook(note_modulation)
    for decoder in network.decoders.values():
        decoder.register_forward_pre_hook(note_vector)
    x, _, t, text = inputs()
    network(x, t, text)
    network(x, {**t, "depth": t["depth"] / 2}, text)
    assert torch.equal(*vectors["rgb"])
    assert not torch.equal(*vectors["depth"])
    image_end = SMALL.text_length // TEXT_PATCH + 16  # text tokens go with the image's
    for first, second in zip(*modulations, strict=True):
        assert torch.equal(first[:, :image_end], second[:, :image_end])
        assert not torch.isclose(first[:, image_end:], second[:, image_end:]).all(-1).any()


def test_every_position_of_a_non_square_image_has_its_own_angle():
    angles = rope_angles(torch.cat([token_positions(m, 3, 7) for m in (0, 1)]), 32)
    assert len(torch.unique(angles, dim=0)) == 2 * 3 * 7
    assert torch.equal(angles[:21, 2:14], angles[21:, 2:14])  # row and column angles are shared by the modalities


@pytest.mark.parametrize("other", [DEPTH, NORMAL], ids=attrgetter("name"))
def test_the_network_gives_its_tokens_those_angles(other):
    network = build(RGB, other)
    seen = []

    def note_rope(module, args):
        seen.append(args[2])

    network.blocks[0].register_forward_pre_hook(note_rope)
    x, _, t, text = inputs(height=8, width=16, modalities=(RGB, other))
    network(x, t, text)
    text_ids = torch.zeros(SMALL.text_length // TEXT_PATCH, 4)
    text_ids[:, 3] = torch.arange(len(text_ids))
    angles = rope_angles(torch.cat([text_ids, token_positions(0, 2, 4), token_positions(other.id, 2, 4)]), SMALL.head)
    cos, sin = seen[0]
    torch.testing.assert_close(cos[:, 0], angles.cos())
    torch.testing.assert_close(sin[:, 0], angles.sin())


def rotated(x, position):
    angles = rope_angles(torch.tensor([position]), 32)[:, None]  # (1, 1, 16)
    return rotate(x, angles.cos(), angles.sin())


def test_rope_makes_attention_depend_on_differences_only():
    q = torch.randn(1, 1, 1, 32)
    k = torch.randn(1, 1, 1, 32)

    def product(q_position, k_position):
        return (rotated(q, q_position) * rotated(k, k_position)).sum()

    here = product((0, 1, 5, 0), (0, 4, 3, 0))
    shifted = product((0, 11, 25, 0), (0, 14, 23, 0))
    transposed = product((0, 5, 1, 0), (0, 3, 4, 0))
    close(here, shifted)
    assert (here - transposed).abs() > 1e-3


def test_rotation_keeps_lengths_and_is_by_the_angle():
    x = torch.randn(2, 5, 3, 8)
    angles = torch.rand(5, 1, 4) * 6
    turned = rotate(x, angles.cos(), angles.sin())
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    close(turned, torch.cat([pairs.real, pairs.imag], -1), 1e-5)


def test_rows_and_columns_are_told_apart():
    """A 2x1 and a 1x2 grid of the same patches must not look the same."""
    network = build(RGB)
    tall = torch.randn(1, 3, 8, 4)
    wide = torch.cat([tall[:, :, :4], tall[:, :, 4:]], 3)
    t = {"rgb": torch.tensor([0.5])}
    text = torch.zeros(1, 32, dtype=torch.uint8)
    from_tall = network({"rgb": tall}, t, text)["rgb"]
    from_wide = network({"rgb": wide}, t, text)["rgb"]
    assert from_tall.shape == (1, 3, 8, 4)
    assert from_wide.shape == (1, 3, 4, 8)
    assert (from_tall[:, :, :4] - from_wide[..., :4]).abs().max() > 1e-4


def test_head_is_float32_under_autocast():
    network = build(RGB, DEPTH)
    x, _, t, text = inputs()
    dtypes = []

    def note_dtypes(module, args, out):
        dtypes.extend([args[0].dtype, out.dtype])

    network.decoders["depth"].head.register_forward_hook(note_dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        network(x, t, text)
    assert dtypes == [torch.float32, torch.float32]


def test_a_fresh_network_predicts_zero():
    x, _, t, text = inputs()
    for values in build(RGB, DEPTH, random=False)(x, t, text).values():
        assert (values == 0).all()


# ---- Weights ----


def checkpoint_of(network):
    return {"config": asdict(network.config), "ema": network.state_dict()}


def test_a_checkpoint_gives_back_its_network():
    network = build(RGB, DEPTH, NORMAL)
    loaded = DiT.from_checkpoint(checkpoint_of(network))
    assert loaded.config == network.config
    assert not any(p.requires_grad for p in loaded.parameters())
    x, _, t, text = inputs(modalities=network.modalities)
    for m, x0_hat in loaded(x, t, text).items():
        assert torch.equal(x0_hat, network(x, t, text)[m])


def test_a_checkpoint_in_float16_loads():
    state = torch.load(NANO, weights_only=True)
    network = DiT.from_checkpoint(state)
    assert {p.dtype for p in network.parameters()} == {torch.float16}
    network.place(torch.device("cpu"))
    for name, parameter in network.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state["ema"][name].float())


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("text_tokenizer.bias", torch.zeros(3), "text_tokenizer.bias has shape"),
        ("text_tokenizer.bias", torch.full((64,), torch.inf), "text_tokenizer.bias is not finite"),
        ("text_tokenizer.else", torch.zeros(1), "holds text_tokenizer.else"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_network_is_refused(name, replacement, message):
    state = checkpoint_of(build(RGB))
    state["ema"][name] = replacement
    with pytest.raises(ValueError, match=message):
        DiT.from_checkpoint(state)


def test_a_checkpoint_that_lacks_weights_or_has_a_wrong_config_is_refused():
    state = checkpoint_of(build(RGB))
    del state["ema"]["text_tokenizer.bias"]
    with pytest.raises(ValueError, match=r"lacks text_tokenizer.bias"):
        DiT.from_checkpoint(state)
    state["config"]["experts"] = 8
    with pytest.raises(ValueError, match=r"its config is wrong: .*experts"):
        DiT.from_checkpoint(state)


# ---- Cost and optimizers ----


@pytest.mark.parametrize(("preset", "millions"), [("370m", 370), ("800m", 800), ("3b", 3300)])
def test_presets_have_the_papers_parameter_counts(preset, millions):
    parameters, flops = training_cost(PRESETS[preset], (256, 256))
    assert abs(parameters / 1e6 - millions) < 0.05 * millions
    assert flops > 6 * parameters * 256  # 6 FLOPs a parameter and token, at the least


def test_counted_flops_match_a_closed_form():
    """Blocks: 6 FLOPs a weight and token for matmuls, 12 N^2 D for attention; embedders and heads are a few percent."""
    config = PRESETS["370m"].with_modalities(RGB)
    tokens = 256 + 64
    matmuls = 6 * tokens * config.depth * 11.5 * config.width**2
    attention = 12 * tokens**2 * config.width * config.depth
    _, flops = training_cost(config, (256, 256))
    assert abs(flops / (matmuls + attention) - 1) < 0.05


def test_every_parameter_has_one_optimizer():
    network = build(RGB, DEPTH)
    for optimizer, matrices in (("muon", 2 * 3), ("adamw", 0)):
        optimizers = network.configure_optimizers(1e-3, optimizer, 0.95, 0.1)
        groups = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
        updated = [id(p) for group in groups for p in group]
        assert sorted(updated) == sorted(id(p) for p in network.parameters())
        assert len(updated) - len(groups[0]) == matrices  # two in each block of trunk and decoder


def test_optimizers_get_their_settings():
    adamw, muon = build(RGB, DEPTH).configure_optimizers(1e-3, "muon", beta2=0.7, weight_decay=0.3)
    assert {(group["betas"], group["weight_decay"]) for group in adamw.param_groups} == {((0.9, 0.7), 0.0)}
    assert {group["weight_decay"] for group in muon.param_groups} == {0.3}


def test_orthogonalize_brings_singular_values_near_one():
    g = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    for matrix in (g, g.T):
        values = torch.linalg.svdvals(orthogonalize(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7))
        assert values.min() > 0.6
        assert values.max() < 1.3
