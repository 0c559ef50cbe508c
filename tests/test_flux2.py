"""extras/flux2.py equals the published networks: stored outputs of diffusers and of the authors' code, plain formulas.

tests/flux2_reference.py made the stored outputs. The plain functions below say once more, without classes and in
another way, what the network computes; the stored outputs judge them as well.
"""

import math
from dataclasses import asdict, replace

import flux2_reference as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flux2_reference import GRID, HEAD, IMAGE_VALUES, SMALL_GRID, T_DEPTH, T_IMAGE, WIDTH, draw
from tiny_flux2 import write_layout

import model
from extras import flux2
from extras.encoders import Klein

STORED = {name: torch.from_numpy(array) for name, array in np.load(reference.FIXTURE).items()}
IMAGE_WEIGHTS = reference.draw_weights(reference.image_shapes())
ALL_WEIGHTS = reference.draw_weights({**reference.image_shapes(), **reference.depth_shapes()})
IDS = {"img": model.RGB.id, "depth": model.DEPTH.id}


def difference(a, b):
    """Largest difference, relative to the largest value of b."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_close(a, b, tolerance, what):
    measured = difference(a, b)
    print(f"{what}: largest difference {measured:.1e}")
    assert measured < tolerance


def open_network(weights):
    config = asdict(flux2.read_config(weights))
    return flux2.Network.from_checkpoint({"config": config, "ema": weights})


def latents(tokens, grid):
    """(B, N, C) -> (B, C, rows, columns)"""
    return tokens.transpose(1, 2).unflatten(2, grid)


def pixels(tokens, grid):
    """(B, N, C * 256) -> (B, C, H, W)"""
    channels = tokens.shape[2] // 256
    patches = tokens.view(-1, *grid, channels, 16, 16)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, 16 * grid[0], 16 * grid[1])


def joint_inputs():
    """The inputs of the stored forward passes as our network takes them: noisy, t, text."""
    image, depth, text = reference.forward_inputs()
    return {"rgb": latents(image, GRID), "depth": pixels(depth, GRID)}, {"rgb": T_IMAGE, "depth": T_DEPTH}, text


# ---- The network as plain functions ----


def normalize(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def embed_time(w, name, t):
    rates = torch.exp(torch.arange(128) / 128 * -math.log(10000))
    angles = torch.outer(1000 * t, rates)
    hidden = torch.cat([torch.cos(angles), torch.sin(angles)], 1) @ w[f"{name}.in_layer.weight"].T
    return (hidden * torch.sigmoid(hidden)) @ w[f"{name}.out_layer.weight"].T


def modulation(w, name, vector):
    out = (vector * torch.sigmoid(vector)) @ w[f"{name}.weight"].T
    return out[:, None].split(WIDTH, -1)


def swiglu(x):
    half = x.shape[-1] // 2
    return x[..., :half] * torch.sigmoid(x[..., :half]) * x[..., half:]


def rotate(x, positions):
    """Multiply channels (2i, 2i + 1), as complex numbers, by e^(i angle): x (B, N, heads, HEAD), positions (N, 4)."""
    pairs = HEAD // 4 // 2
    angles = [positions[:, axis] * 2000 ** (-i / pairs) for axis in range(4) for i in range(pairs)]
    angles = torch.stack(angles, 1)[:, None]  # (N, 1, HEAD / 2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def split_heads(w, name, qkv):
    heads = []
    for part, gain in zip(qkv.split(WIDTH, -1), ("query", "key", None), strict=True):
        part = part.unflatten(-1, (-1, HEAD))  # (B, n, heads, HEAD)
        if gain:
            rms = (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            part = part / rms * w[f"{name}.{gain}_norm.scale"]
        heads.append(part)
    return heads


def attend(q, k, v, positions):
    scores = torch.einsum("bnhe,bmhe->bhnm", rotate(q, positions), rotate(k, positions)) / math.sqrt(HEAD)
    return torch.einsum("bhnm,bmhe->bnhe", scores.softmax(-1), v).flatten(2)


def double_block(w, name, x, modulations, positions):
    parts = []
    for stream, tokens in x.items():
        shift, scale = modulations[stream][:2]
        qkv = ((1 + scale) * normalize(tokens) + shift) @ w[f"{name}.{stream}_attn.qkv.weight"].T
        parts.append(split_heads(w, f"{name}.{stream}_attn.norm", qkv))
    q, k, v = [torch.cat(part, 1) for part in zip(*parts, strict=True)]
    attended = attend(q, k, v, positions)

    out = {}
    start = 0
    for stream, tokens in x.items():
        own = attended[:, start : start + tokens.shape[1]]
        start += tokens.shape[1]
        gate, shift, scale, mlp_gate = modulations[stream][2:]
        tokens = tokens + gate * (own @ w[f"{name}.{stream}_attn.proj.weight"].T)
        hidden = ((1 + scale) * normalize(tokens) + shift) @ w[f"{name}.{stream}_mlp.0.weight"].T
        out[stream] = tokens + mlp_gate * (swiglu(hidden) @ w[f"{name}.{stream}_mlp.2.weight"].T)
    return out


def single_block(w, name, x, shift, scale, gate, positions):
    hidden = ((1 + scale) * normalize(x) + shift) @ w[f"{name}.linear1.weight"].T
    q, k, v = split_heads(w, f"{name}.norm", hidden[..., : 3 * WIDTH])
    joined = torch.cat([attend(q, k, v, positions), swiglu(hidden[..., 3 * WIDTH :])], -1)
    return x + gate * (joined @ w[f"{name}.linear2.weight"].T)


def final_layer(w, name, x, vector):
    shift, scale = modulation(w, f"{name}.adaLN_modulation.1", vector)
    return ((1 + scale) * normalize(x) + shift) @ w[f"{name}.linear.weight"].T


def plain_network(w, tokens, t, text, grid, double, single, decoder):
    """tokens {stream: (B, n, values)}, t {stream: (B,)}, streams "img" and "depth" -> outputs of the heads."""
    vectors = {"img": embed_time(w, "time_in", t["img"])}
    if "depth" in tokens:
        vectors["depth"] = embed_time(w, "time_in_depth", t["depth"])
        vectors["depth"] = vectors["depth"] + w["cross_alpha_depth"] * embed_time(w, "time_in_rgb_to_depth", t["img"])
        vectors["img"] = vectors["img"] + w["cross_alpha_img"] * embed_time(w, "time_in_depth_to_img", t["depth"])
    vectors = {"txt": vectors["img"], **vectors}

    x = {"txt": text @ w["txt_in.weight"].T}
    positions = {"txt": torch.tensor([(0.0, 0, 0, i) for i in range(text.shape[1])])}
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    for stream, values in tokens.items():
        x[stream] = values @ w[f"{stream}_in.weight"].T
        positions[stream] = torch.tensor([(float(IDS[stream]), row, column, 0) for row, column in cells])
    everywhere = torch.cat(list(positions.values()))

    modulations = {stream: modulation(w, f"double_stream_modulation_{stream}.lin", vectors[stream]) for stream in x}
    for i in range(double):
        x = double_block(w, f"double_blocks.{i}", x, modulations, everywhere)

    names = {"txt": "single_stream_modulation", "img": "single_stream_modulation"}
    names["depth"] = "single_stream_modulation_depth"
    lengths = [part.shape[1] for part in x.values()]
    by_token = []
    for stream, length in zip(x, lengths, strict=True):
        by_token.append(torch.stack(modulation(w, f"{names[stream]}.lin", vectors[stream])).expand(-1, -1, length, -1))
    joint = torch.cat(list(x.values()), 1)
    for i in range(single):
        joint = single_block(w, f"single_blocks.{i}", joint, *torch.cat(by_token, 2), everywhere)
    x = dict(zip(x, joint.split(lengths, 1), strict=True))

    out = {"img": final_layer(w, "final_layer", x["img"], vectors["img"])}
    if "depth" in tokens:
        for i in range(decoder):
            of_decoder = modulation(w, "depth_decoder_modulation.lin", vectors["depth"])
            x["depth"] = single_block(w, f"depth_decoder_blocks.{i}", x["depth"], *of_decoder, positions["depth"])
        out["depth"] = final_layer(w, "depth_final_layer", x["depth"], vectors["depth"])
    return out


# ---- The network ----


def test_parameters_have_the_published_names_and_shapes():
    for weights in (IMAGE_WEIGHTS, ALL_WEIGHTS):
        published = {name: weight.shape for name, weight in weights.items()}
        network = flux2.read_config(weights).build()
        assert {name: p.shape for name, p in network.named_parameters()} == published


def test_text_to_image_equals_diffusers():
    noisy, t, text = joint_inputs()
    x0_hat = open_network(IMAGE_WEIGHTS)({"rgb": noisy["rgb"]}, {"rgb": t["rgb"]}, text)["rgb"]
    velocity = latents(STORED["diffusers_velocity"], GRID)
    expected = noisy["rgb"] - T_IMAGE.view(2, 1, 1, 1) * velocity
    assert_close(x0_hat, expected, 1e-5, "text to image, against diffusers")

    image, _, text = reference.forward_inputs()
    plain = plain_network(IMAGE_WEIGHTS, {"img": image}, {"img": T_IMAGE}, text, GRID, 2, 3, 0)
    assert_close(plain["img"], STORED["diffusers_velocity"], 1e-5, "plain functions, against diffusers")


@pytest.mark.parametrize("layout", ["authors", "file", "folder", "shards"])
def test_image_and_depth_equal_the_authors(tmp_path, layout):
    state = flux2.read_checkpoint(write_layout(tmp_path, layout, ALL_WEIGHTS))
    network = flux2.Network.from_checkpoint(state)
    noisy, t, text = joint_inputs()
    assert torch.equal(noisy["depth"][:1, :, :16, :32], STORED["authors_depth_input"])

    x0_hat = network(noisy, t, text)
    image = noisy["rgb"] - T_IMAGE.view(2, 1, 1, 1) * latents(STORED["authors_velocity"], GRID)
    assert_close(x0_hat["rgb"], image, 1e-5, f"image of the joint pass, against the authors, {layout}")
    assert_close(x0_hat["depth"], STORED["authors_depth"], 1e-5, f"depth, against the authors, {layout}")


def test_files_in_bfloat16_are_read_exactly(tmp_path):
    weights = {name: weight.bfloat16() for name, weight in ALL_WEIGHTS.items()}
    read = flux2.read_checkpoint(write_layout(tmp_path, "authors", weights))["ema"]
    assert read.keys() == weights.keys()
    assert all(
        torch.equal(read[name], weight) and read[name].dtype == torch.bfloat16 for name, weight in weights.items()
    )


@pytest.mark.parametrize(
    ("double", "single", "decoder"),
    [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 2)],
    ids=["input, timestep and final layer", "double block", "single block", "decoder block", "all"],
)
def test_parts_equal_plain_formulas(double, single, decoder):
    shapes = {**reference.image_shapes(double, single), **reference.depth_shapes(double, decoder)}
    weights = reference.draw_weights(shapes)
    config = replace(
        flux2.read_config(ALL_WEIGHTS),
        double_depth=double,
        depth=single,
        modalities=(
            replace(model.RGB, channels=IMAGE_VALUES, stride=16),
            replace(model.DEPTH, decoder_depth=decoder),
        ),
    )
    network = flux2.Network.from_checkpoint({"config": asdict(config), "ema": weights})

    image, depth, text = reference.forward_inputs()
    times = {"img": T_IMAGE, "depth": T_DEPTH}
    plain = plain_network(weights, {"img": image, "depth": depth}, times, text, GRID, double, single, decoder)
    noisy, t, text = joint_inputs()
    x0_hat = network(noisy, t, text)

    # The image's head predicts u = noise - x0, and x_t = x0 + t u: what is left of x_t is t u.
    displacement = noisy["rgb"] - x0_hat["rgb"]
    assert_close(displacement, T_IMAGE.view(2, 1, 1, 1) * latents(plain["img"], GRID), 1e-5, "t u")
    assert_close(x0_hat["depth"], pixels(plain["depth"], GRID), 1e-5, "depth")


# ---- The sampler ----


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_denoising_loop_equals_diffusers_pipeline(name):
    last = open_network(IMAGE_WEIGHTS).sample(
        schedule={"rgb": STORED["pipeline_sigmas"]},
        noise={"rgb": draw("pipeline latents", 2, IMAGE_VALUES, *GRID)},
        text=STORED["pipeline_text"],
        guidance={"rgb": reference.GUIDANCE if name == "guided" else 1},
        no_text=STORED["pipeline_no_text"],
    )["rgb"]
    assert_close(last, latents(STORED[f"pipeline_{name}"], GRID), 1e-4, f"{name} loop of the pipeline")


@pytest.mark.parametrize("mode", ["joint", "i2d", "d2i"])
def test_sampler_equals_the_authors(mode):
    image_noise, depth_noise, clean_image, clean_depth, text, no_text = reference.sampler_inputs()
    clean = {"rgb": latents(clean_image, SMALL_GRID), "depth": pixels(clean_depth, SMALL_GRID)}
    given = {"joint": [], "i2d": ["rgb"], "d2i": ["depth"]}[mode]
    scale = 1 if mode == "i2d" else reference.GUIDANCE
    schedule = model.make_schedule(
        ["rgb", "depth"], reference.STEPS, order=reference.LOG2_ALPHA, strength=dict.fromkeys(given, 1)
    )
    levels = dict(zip(["rgb", "depth"], STORED[f"authors_{mode}_levels"], strict=True))
    for m, row in levels.items():
        assert torch.allclose(schedule[m].float(), row, rtol=1e-6)

    last = open_network(ALL_WEIGHTS).sample(
        schedule=levels,  # theirs, which are rounded to float32
        noise={"rgb": latents(image_noise, SMALL_GRID), "depth": pixels(depth_noise, SMALL_GRID)},
        text=text,
        given={m: (clean[m], None) for m in given},
        guidance={"rgb": scale, "depth": scale},
        no_text=no_text,
    )
    if mode != "i2d":
        expected = latents(STORED[f"authors_{mode}_image"], SMALL_GRID)
        assert_close(last["rgb"], expected, 1e-4, f"image of the authors' {mode}")
    if mode != "d2i":
        assert_close(last["depth"], STORED[f"authors_{mode}_depth"], 1e-4, f"depth of the authors' {mode}")


# ---- Fewer and more modalities ----


def hide_last_tokens(monkeypatch, count):
    """No token attends to the last count tokens, unless they are alone, as in a decoder."""
    attend_to_all = F.scaled_dot_product_attention

    def attend_to_others(q, k, v):
        if k.shape[2] == count:
            return attend_to_all(q, k, v)
        return attend_to_all(q, k[:, :, :-count], v[:, :, :-count])

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_to_others)


def test_image_alone_is_the_text_to_image_network():
    noisy, t, text = joint_inputs()
    alone = open_network(ALL_WEIGHTS)({"rgb": noisy["rgb"]}, t, text)
    expected = open_network(IMAGE_WEIGHTS)({"rgb": noisy["rgb"]}, t, text)
    assert alone.keys() == {"rgb"}
    assert torch.equal(alone["rgb"], expected["rgb"])


def test_new_depth_acts_on_the_image_by_attention_alone(monkeypatch):
    noisy, t, text = joint_inputs()
    expected = open_network(IMAGE_WEIGHTS)({"rgb": noisy["rgb"]}, t, text)["rgb"]
    image = flux2.read_config(IMAGE_WEIGHTS).modalities[0]
    network = replace(flux2.read_config(IMAGE_WEIGHTS), decoder_depth=2).with_modalities(image, model.DEPTH).build()
    network.warm_start(IMAGE_WEIGHTS)
    network.place(torch.device("cpu"))
    state = network.state_dict()
    pairs = {"single_stream_modulation_depth.lin.weight": "single_stream_modulation.lin.weight"}
    for name in state:
        if name.startswith("double_") and "depth" in name:
            pairs[name] = name.replace("depth", "img")
    assert len(pairs) == 2 + 6 * reference.DOUBLE
    for name, source in pairs.items():
        assert torch.equal(state[name], IMAGE_WEIGHTS[source])
        assert state[name].data_ptr() != state[source].data_ptr()  # a copy: training will change them apart

    t = {**t, "depth": torch.ones(2)}
    with torch.no_grad():
        seen = network(noisy, t, text)
        hide_last_tokens(monkeypatch, GRID[0] * GRID[1])
        hidden = network(noisy, t, text)
    assert seen["depth"].isfinite().all()
    assert difference(seen["rgb"], expected) > 1e-2
    assert_close(hidden["rgb"], expected, 1e-6, "image with new depth tokens hidden, against text to image")


def test_a_third_modality_is_one_more_entry(monkeypatch):
    noisy, t, text = joint_inputs()
    config = flux2.read_config(ALL_WEIGHTS)
    network = replace(config, decoder_depth=2).with_modalities(*config.modalities, model.NORMAL).build()
    network.warm_start(ALL_WEIGHTS)

    # Its parameters are named as depth's; only mixing, which has more pairs now, names both ends.
    names = {name for name, _ in network.named_parameters()}
    new = names - ALL_WEIGHTS.keys()
    mixing = {name for name in new if "_to_" in name}
    as_depth = {name.replace("depth", "normal") for name in ALL_WEIGHTS.keys() - IMAGE_WEIGHTS.keys()}
    as_depth = {name for name in as_depth if "_to_" not in name and "cross_alpha" not in name}
    assert ALL_WEIGHTS.keys() <= names
    assert new - mixing == as_depth
    assert len(mixing) == 4 * 3  # both ways between it and the two others: two matrices and a scalar

    noisy["normal"] = draw("normal", 2, 3, 16 * GRID[0], 16 * GRID[1])
    t["normal"] = torch.ones(2)
    hide_last_tokens(monkeypatch, GRID[0] * GRID[1])
    with torch.no_grad():
        x0_hat = network(noisy, t, text)
    assert x0_hat["normal"].shape == noisy["normal"].shape
    image = noisy["rgb"] - T_IMAGE.view(2, 1, 1, 1) * latents(STORED["authors_velocity"], GRID)
    assert_close(x0_hat["rgb"], image, 1e-5, "image with new normals hidden, against the authors")
    assert_close(x0_hat["depth"], STORED["authors_depth"], 1e-5, "depth with new normals hidden, against the authors")


# ---- Frozen encoders, where their packages are installed ----


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    pipeline = reference.tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def encoders(pipeline, tmp_path_factory):
    """Our encoders, of a folder with the layout of a published one: vae/, text_encoder/, tokenizer/."""
    folder = tmp_path_factory.mktemp("klein")
    pipeline.save_pretrained(folder)
    return Klein(torch.device("cpu"), str(folder))


def test_encoders_equal_diffusers_pipeline(pipeline, encoders):
    rgb = draw("pixels", 2, 3, 16 * GRID[0], 16 * GRID[1]).tanh()
    assert (encoders.image_channels, encoders.image_stride) == (IMAGE_VALUES, 16)
    expected = pipeline._encode_vae_image(rgb, generator=None)
    assert_close(encoders.encode_image(rgb), expected, 1e-5, "latents of the pipeline")

    captions = ["", "red hat", "a caption that is cut at 512 tokens " * 20]
    expected = pipeline.encode_prompt(captions)[0]
    assert expected.shape == (3, encoders.text_length, encoders.text_dim)
    assert_close(encoders.encode_text(captions), expected, 1e-5, "embeddings of the pipeline")


def test_picture_of_a_prompt_equals_diffusers_pipeline(pipeline, encoders):
    noise = draw("pipeline latents", 2, IMAGE_VALUES, *GRID)
    expected = pipeline(
        prompt=reference.PROMPTS,
        height=16 * GRID[0],
        width=16 * GRID[1],
        num_inference_steps=reference.STEPS,
        guidance_scale=reference.GUIDANCE,
        latents=noise,
        output_type="pt",
    ).images  # (2, 3, H, W) in [0, 1]

    latent = open_network(IMAGE_WEIGHTS).sample(
        schedule={"rgb": pipeline.scheduler.sigmas},
        noise={"rgb": noise},
        text=encoders.encode_text(reference.PROMPTS),
        guidance={"rgb": reference.GUIDANCE},
        no_text=encoders.encode_text([""]),
    )["rgb"]
    rgb = encoders.decode_image(latent)
    assert expected.std() > 0.1
    assert_close((rgb + 1) / 2, expected, 1e-4, "pictures of the pipeline")
