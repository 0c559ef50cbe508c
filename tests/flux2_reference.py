"""Run the published FLUX.2 networks at tiny random sizes, and store their outputs in tests/flux2_reference.npz.

Only who changes this file runs it, in an environment with torch, diffusers (0.42), transformers (5.24) and einops:

    git clone https://github.com/Duisterhof/modality-forcing AUTHORS
    python tests/flux2_reference.py AUTHORS

The functions at the top need torch alone, and tests/test_flux2.py imports them. No weight is stored: every parameter
and every input is drawn from its name, here and in the tests.

Three references, all in float32:
  diffusers' Flux2Transformer2DModel     one forward pass: velocities of the image
  diffusers' Flux2KleinPipeline          whole denoising loops, without and with guidance
  the authors' FluxRGBD                  one forward pass of image and depth, and its sampler in all three modes
"""

import argparse
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch

FIXTURE = Path(__file__).with_suffix(".npz")

WIDTH = 64
HEAD = 16  # four axes of four channels: two rates of rotation each
DOUBLE = 2
SINGLE = 3
DECODER = 2
TEXT_CHANNELS = 24  # three hidden layers of 8 channels
IMAGE_VALUES = 16  # values of an image token: 4 latent channels, 2 x 2
DEPTH_VALUES = 256  # values of a depth token: 16 x 16 pixels
GRID = (3, 5)  # tokens of the forward passes and of the pipeline's loops
SMALL_GRID = (2, 3)  # tokens of the authors' sampler
TEXT_LENGTH = 7
PROMPTS = ["ball", "red hat"]
PROMPT_LENGTH = 32  # the chat template takes 25 tokens, a letter takes one
STEPS = 4
GUIDANCE = 4.0
LOG2_ALPHA = 1.0

# These levels are exact in binary, so that no reference rounds 1000 t in its own way.
T_IMAGE = torch.tensor([0.8125, 0.3125])
T_DEPTH = torch.tensor([0.25, 0.9375])


def draw(name, *shape):
    """Values from N(0, 1) that depend on name and shape alone. numpy never changes RandomState."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(values).float()


def draw_weight(name, shape):
    """A parameter in which nothing is zero: matrices keep the size of activations, gains and alphas are near one.

    But tokens, queries and keys are small before they are normalised, so that the eps of a norm matters.
    """
    values = draw(name, *shape)
    if len(shape) == 1:
        return 1 + 0.3 * values
    if name.endswith(("_in.weight", "qkv.weight")):
        values = values / 8
    if name.endswith("attn.proj.weight"):
        values = values * 8  # as the values of attention are small too
    return values / np.prod(shape[1:]) ** 0.5


def draw_weights(shapes):
    return {name: draw_weight(name, shape) for name, shape in shapes.items()}


def attention_shapes(prefix):
    return {f"{prefix}norm.{kind}_norm.scale": (HEAD,) for kind in ("query", "key")}


def single_block_shapes(prefix):
    return {
        f"{prefix}.linear1.weight": (9 * WIDTH, WIDTH),
        f"{prefix}.linear2.weight": (WIDTH, 4 * WIDTH),
        **attention_shapes(f"{prefix}."),
    }


def double_block_shapes(prefix, stream):
    return {
        f"{prefix}.{stream}_attn.qkv.weight": (3 * WIDTH, WIDTH),
        f"{prefix}.{stream}_attn.proj.weight": (WIDTH, WIDTH),
        f"{prefix}.{stream}_mlp.0.weight": (6 * WIDTH, WIDTH),
        f"{prefix}.{stream}_mlp.2.weight": (WIDTH, 3 * WIDTH),
        **attention_shapes(f"{prefix}.{stream}_attn."),
    }


def embedder_shapes(name):
    return {f"{name}.in_layer.weight": (WIDTH, 256), f"{name}.out_layer.weight": (WIDTH, WIDTH)}


def image_shapes(double=DOUBLE, single=SINGLE):
    """{published name: shape} of FLUX.2 [klein] at these sizes."""
    shapes = {
        "img_in.weight": (WIDTH, IMAGE_VALUES),
        "txt_in.weight": (WIDTH, TEXT_CHANNELS),
        **embedder_shapes("time_in"),
        "double_stream_modulation_img.lin.weight": (6 * WIDTH, WIDTH),
        "double_stream_modulation_txt.lin.weight": (6 * WIDTH, WIDTH),
        "single_stream_modulation.lin.weight": (3 * WIDTH, WIDTH),
        "final_layer.linear.weight": (IMAGE_VALUES, WIDTH),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
    }
    for i in range(double):
        shapes.update(double_block_shapes(f"double_blocks.{i}", "img"))
        shapes.update(double_block_shapes(f"double_blocks.{i}", "txt"))
    for i in range(single):
        shapes.update(single_block_shapes(f"single_blocks.{i}"))
    return shapes


def depth_shapes(double=DOUBLE, decoder=DECODER):
    """{published name: shape} of what the authors' released network adds to image_shapes."""
    shapes = {
        "depth_in.weight": (WIDTH, DEPTH_VALUES),
        **embedder_shapes("time_in_depth"),
        **embedder_shapes("time_in_depth_to_img"),
        **embedder_shapes("time_in_rgb_to_depth"),
        "cross_alpha_img": (1,),
        "cross_alpha_depth": (1,),
        "double_stream_modulation_depth.lin.weight": (6 * WIDTH, WIDTH),
        "single_stream_modulation_depth.lin.weight": (3 * WIDTH, WIDTH),
        "depth_final_layer.linear.weight": (DEPTH_VALUES, WIDTH),
        "depth_final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
    }
    for i in range(double):
        shapes.update(double_block_shapes(f"double_blocks.{i}", "depth"))
    if decoder:
        shapes["depth_decoder_modulation.lin.weight"] = (3 * WIDTH, WIDTH)
    for i in range(decoder):
        shapes.update(single_block_shapes(f"depth_decoder_blocks.{i}"))
    return shapes


def forward_inputs():
    """(image tokens, depth tokens, text) of the forward passes, each (B, N, channels)."""
    num_tokens = GRID[0] * GRID[1]
    image = draw("image", 2, num_tokens, IMAGE_VALUES)
    depth = draw("depth", 2, num_tokens, DEPTH_VALUES)
    text = draw("text", 2, TEXT_LENGTH, TEXT_CHANNELS)
    return image, depth, text


def sampler_inputs():
    """(image noise, depth noise, clean image, clean depth, text, no text) of the authors' sampler, as tokens."""
    num_tokens = SMALL_GRID[0] * SMALL_GRID[1]
    noises = [
        draw(f"{name} noise", 1, num_tokens, values)
        for name, values in (("image", IMAGE_VALUES), ("depth", DEPTH_VALUES))
    ]
    cleans = [
        draw(f"{name} clean", 1, num_tokens, values)
        for name, values in (("image", IMAGE_VALUES), ("depth", DEPTH_VALUES))
    ]
    texts = [draw(name, 1, TEXT_LENGTH, TEXT_CHANNELS) for name in ("text", "no text")]
    return *noises, *cleans, *texts


# ---- diffusers ----


def diffusers_weights(weights):
    """Published names -> the names of Flux2Transformer2DModel, which splits q, k and v, and swaps shift and scale."""
    renamed = {
        "x_embedder.weight": weights["img_in.weight"],
        "context_embedder.weight": weights["txt_in.weight"],
        "time_guidance_embed.timestep_embedder.linear_1.weight": weights["time_in.in_layer.weight"],
        "time_guidance_embed.timestep_embedder.linear_2.weight": weights["time_in.out_layer.weight"],
        "double_stream_modulation_img.linear.weight": weights["double_stream_modulation_img.lin.weight"],
        "double_stream_modulation_txt.linear.weight": weights["double_stream_modulation_txt.lin.weight"],
        "single_stream_modulation.linear.weight": weights["single_stream_modulation.lin.weight"],
        "proj_out.weight": weights["final_layer.linear.weight"],
    }
    shift, scale = weights["final_layer.adaLN_modulation.1.weight"].chunk(2)
    renamed["norm_out.linear.weight"] = torch.cat([scale, shift])

    streams = {  # q, k, v, gain of q, gain of k, output of attention, MLP
        "img": ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0", "ff"),
        "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out", "ff_context"),
    }
    for i in range(DOUBLE):
        theirs = f"transformer_blocks.{i}"
        for stream, (q, k, v, q_gain, k_gain, out, mlp) in streams.items():
            ours = f"double_blocks.{i}.{stream}"
            for name, part in zip((q, k, v), weights[f"{ours}_attn.qkv.weight"].chunk(3), strict=True):
                renamed[f"{theirs}.attn.{name}.weight"] = part
            renamed[f"{theirs}.attn.{q_gain}.weight"] = weights[f"{ours}_attn.norm.query_norm.scale"]
            renamed[f"{theirs}.attn.{k_gain}.weight"] = weights[f"{ours}_attn.norm.key_norm.scale"]
            renamed[f"{theirs}.attn.{out}.weight"] = weights[f"{ours}_attn.proj.weight"]
            renamed[f"{theirs}.{mlp}.linear_in.weight"] = weights[f"{ours}_mlp.0.weight"]
            renamed[f"{theirs}.{mlp}.linear_out.weight"] = weights[f"{ours}_mlp.2.weight"]
    for i in range(SINGLE):
        theirs = f"single_transformer_blocks.{i}.attn"
        ours = f"single_blocks.{i}"
        renamed[f"{theirs}.to_qkv_mlp_proj.weight"] = weights[f"{ours}.linear1.weight"]
        renamed[f"{theirs}.to_out.weight"] = weights[f"{ours}.linear2.weight"]
        renamed[f"{theirs}.norm_q.weight"] = weights[f"{ours}.norm.query_norm.scale"]
        renamed[f"{theirs}.norm_k.weight"] = weights[f"{ours}.norm.key_norm.scale"]
    return renamed


def diffusers_transformer():
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=IMAGE_VALUES,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(HEAD // 4,) * 4,
        guidance_embeds=False,
    )
    transformer.load_state_dict(diffusers_weights(draw_weights(image_shapes())))
    return transformer.eval()


CHAT_TEMPLATE = (  # as Qwen3's for one user turn
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)


def tiny_tokenizer():
    """Bytes as tokens of Qwen2's tokenizer, with Qwen3's special tokens and its layout of a chat."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary, merges=[], unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": words[-4:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def draw_state(module, prefix):
    """Draw all parameters of a module of another library, and positive statistics for its batch norm."""
    state = {}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif name.endswith("running_var"):
            state[name] = 0.5 + draw(prefix + name, *value.shape).square()
        elif name.endswith("bias"):
            state[name] = 0.1 * draw(prefix + name, *value.shape)
        else:
            state[name] = draw_weight(prefix + name, tuple(value.shape))
    module.load_state_dict(state)
    return module.eval()


def tiny_pipeline():
    """diffusers' own pipeline for FLUX.2 [klein], with tiny random parts."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_tokenizer()
    text_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_CHANNELS // 3,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=IMAGE_VALUES // 4, norm_num_groups=2
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=draw_state(autoencoder, "vae."),
        text_encoder=draw_state(Qwen3ForCausalLM(text_config), "text_encoder."),
        tokenizer=tokenizer,
        transformer=diffusers_transformer(),
    )


def image_ids(rows, columns):
    return torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns), torch.arange(1))


def text_ids(length):
    return torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(length))


def transformer_outputs():
    image, _, text = forward_inputs()
    velocity = diffusers_transformer()(
        hidden_states=image,
        encoder_hidden_states=text,
        timestep=T_IMAGE,
        img_ids=image_ids(*GRID),
        txt_ids=text_ids(TEXT_LENGTH),
        return_dict=False,
    )[0]
    return {"diffusers_velocity": velocity}


def pipeline_outputs():
    """The inputs of two denoising loops, which the transformer alone does not determine, and their last latents."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    outputs = {
        "pipeline_text": pipeline.encode_prompt(PROMPTS, max_sequence_length=PROMPT_LENGTH)[0],
        "pipeline_no_text": pipeline.encode_prompt("", max_sequence_length=PROMPT_LENGTH)[0],
    }
    last = {}

    def keep_latents(pipeline, step, timestep, tensors):
        last["latents"] = tensors["latents"]
        return {}

    for name, guidance in (("plain", 1.0), ("guided", GUIDANCE)):
        pipeline(
            prompt=PROMPTS,
            height=16 * GRID[0],
            width=16 * GRID[1],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=draw("pipeline latents", 2, IMAGE_VALUES, *GRID),
            max_sequence_length=PROMPT_LENGTH,
            output_type="latent",
            callback_on_step_end=keep_latents,
        )
        outputs[f"pipeline_{name}"] = last["latents"]  # (2, N, IMAGE_VALUES)
    outputs["pipeline_sigmas"] = pipeline.scheduler.sigmas  # (STEPS + 1,)
    return outputs


# ---- The authors' released code ----


def authors_network(folder):
    """Their FluxRGBD with mixing (variant flux_rgbd_9b_v2) at the sizes above, and their schedule's settings."""
    sys.path.insert(0, str(folder))
    from flux_rgbd.depth.schedule import ScheduleConfig
    from flux_rgbd.dit import FluxRGBDDiT
    from flux_rgbd.model import FluxRGBD

    dit = FluxRGBDDiT(
        in_channels=IMAGE_VALUES,
        depth_channels=DEPTH_VALUES,
        context_in_dim=TEXT_CHANNELS,
        hidden_size=WIDTH,
        num_heads=WIDTH // HEAD,
        depth_double=DOUBLE,
        depth_single=SINGLE,
        depth_decoder_num_layers=DECODER,
        axes_dim=(HEAD // 4,) * 4,
        cross_stream_timestep_mixing=True,
    )
    dit.load_state_dict(draw_weights({**image_shapes(), **depth_shapes()}))
    return FluxRGBD(dit).eval(), ScheduleConfig(rgb_shift_mu=1.1, depth_shift_mu=1.1)


def depth_pixels(tokens, grid):
    """Their tokens (B, N, 256) as their decode_depth lays them out, (B, 1, H, W). Decompression is left out."""
    from flux_rgbd.depth.preprocess import DepthConfig, decode_depth

    config = DepthConfig(depth_normalize_mode=("none",), patch_size=16)
    return decode_depth(tokens.unflatten(1, grid), config).movedim(-1, 1)


def authors_outputs(folder):
    """One forward pass, and of each mode of their sampler the noise levels (image's, depth's) and the results."""
    network, schedule = authors_network(folder)
    from flux_rgbd.depth.schedule import rollout_timesteps

    image, depth, text = forward_inputs()
    velocity, x0_hat = network(image, T_IMAGE, text, *GRID, depth, T_DEPTH)
    outputs = {"authors_velocity": velocity, "authors_depth": depth_pixels(x0_hat, GRID)}
    outputs["authors_depth_input"] = depth_pixels(depth, GRID)[:1, :, :16, :32]  # the layout of two tokens

    image_noise, depth_noise, clean_image, clean_depth, text, no_text = sampler_inputs()
    noise = {IMAGE_VALUES: image_noise, DEPTH_VALUES: depth_noise}
    modes = {
        "joint": {"cfg_scale": GUIDANCE, "null_text_embed": no_text, "log2_alpha": LOG2_ALPHA},
        "i2d": {"clean_rgb": clean_image},
        "d2i": {"clean_depth": clean_depth, "cfg_scale": GUIDANCE, "null_text_embed": no_text},
    }
    for mode, settings in modes.items():
        with mock.patch("torch.randn", lambda *shape, **_: noise[shape[-1]]):
            last_image, last_depth = network.sample(
                ctx=text,
                img_height=SMALL_GRID[0],
                img_width=SMALL_GRID[1],
                num_steps=STEPS,
                mode=mode,
                schedule_config=schedule,
                **settings,
            )
        levels = rollout_timesteps(schedule, STEPS, mode=mode, log2_alpha=settings.get("log2_alpha"))
        outputs[f"authors_{mode}_levels"] = torch.stack(levels)  # (2, STEPS + 1)
        if mode != "i2d":
            outputs[f"authors_{mode}_image"] = last_image
        if mode != "d2i":
            outputs[f"authors_{mode}_depth"] = depth_pixels(last_depth, SMALL_GRID)
    return outputs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("authors", type=Path, help="folder of a clone of the authors' repository")
    folder = parser.parse_args().authors

    with torch.no_grad():
        outputs = {**transformer_outputs(), **pipeline_outputs(), **authors_outputs(folder)}
    np.savez_compressed(FIXTURE, **{name: value.numpy() for name, value in outputs.items()})
    for name, value in outputs.items():
        print(f"{name}: {tuple(value.shape)}, root mean square {value.square().mean().sqrt():.3g}")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
