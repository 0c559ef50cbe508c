"""CUDA's autocast rules, emulated on a CPU; graphs compiled once; on a GPU, fused attention kernels."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import model
from extras import flux2

SIZES = {"width": 64, "depth": 3, "head": 16, "size": 16, "decoder_depth": 3, "text_length": 16}
CONFIG = model.Config(**SIZES, patch=4)
LATENT = replace(model.RGB, channels=8, stride=16)
FLUX2 = flux2.Flux2Config(**SIZES, patch=16, double_depth=3, text_dim=8, modalities=[LATENT])
JOINT = {"DiT": CONFIG.with_modalities(model.RGB, model.DEPTH), "FLUX.2": FLUX2.with_modalities(LATENT, model.DEPTH)}
IN_BFLOAT16 = {F.linear, F.scaled_dot_product_attention, torch.matmul}
IN_FLOAT32 = {F.rms_norm, torch.rms_norm, F.layer_norm, F.softmax, torch.exp, torch.log, torch.sum, torch.pow}
PROMOTED_TO_FLOAT32 = {torch.addcmul, torch.cat, torch.stack}


class EmulatedCudaAutocast(TorchFunctionMode):
    """CUDA's autocast on a CPU, for the functions that the network uses, by the lists in torch's documentation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if function in IN_BFLOAT16:
                args, kwargs = cast((args, kwargs), torch.bfloat16)
            if function in IN_FLOAT32:
                args, kwargs = cast((args, kwargs), torch.float32)
            if function in PROMOTED_TO_FLOAT32 and torch.float32 in dtypes_of((args, kwargs)):
                args, kwargs = cast((args, kwargs), torch.float32)
        return function(*args, **kwargs)


def cast(tree, dtype):
    def convert(leaf):
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return torch.utils._pytree.tree_map(convert, tree)


def dtypes_of(tree):
    return {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def build(config):
    """A network with random weights everywhere: a new one has zero gates and output layers."""
    torch.manual_seed(0)
    network = config.build().to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture(params=JOINT)
def network(request):
    return build(JOINT[request.param])


def inputs(config):
    generator = torch.Generator().manual_seed(0)
    noisy = {m.name: torch.randn(2, *m.shape((32, 32)), generator=generator) for m in config.modalities}
    t = {m: torch.rand(2, generator=generator) for m in noisy}
    text = torch.randint(0, 255, (2, 16), dtype=torch.uint8, generator=generator)
    if config.text_dim:
        text = torch.randn(2, 16, config.text_dim, generator=generator)
    return noisy, t, text


def lists_of_blocks(network):
    """Lists of blocks that are alike: the trunk's (of FLUX.2, double and single ones) and the depth decoder's."""
    return [part for part in network.modules() if isinstance(part, torch.nn.ModuleList) and len(part)]


def watch_blocks(network):
    """A list that gets (block, dtype, strides) of each tensor that a block is given from now on."""
    seen = []

    def note(block, args):
        for tensor in torch.utils._pytree.tree_leaves(args):
            seen.append((block, tensor.dtype, tensor.stride()))

    for block in network.all_blocks():
        block.register_forward_pre_hook(note)
    return seen


def test_blocks_are_given_one_dtype_and_one_layout_by_the_rules_of_cuda(network):
    seen = watch_blocks(network)
    with torch.autocast("cpu", torch.bfloat16), EmulatedCudaAutocast():
        network(*inputs(network.config))
    assert {dtype for _, dtype, _ in seen} == {torch.float32}
    for blocks in lists_of_blocks(network):
        layouts = [[strides for block, _, strides in seen if block is one] for one in blocks]
        assert len(layouts) == 3
        assert layouts[0] == layouts[1] == layouts[2]


def test_rules_of_cpu_and_cuda_give_equal_results(network):
    """The lists of CPU and CUDA differ in norms and addcmul; dtypes are explicit, so the results are the same."""
    with torch.autocast("cpu", torch.bfloat16):
        by_cpu = network(*inputs(network.config))
        with EmulatedCudaAutocast():
            by_cuda = network(*inputs(network.config))
    exact = network(*inputs(network.config))
    for m in exact:
        assert torch.equal(by_cpu[m], by_cuda[m])
        assert not torch.equal(by_cpu[m], exact[m])  # autocast was on
        assert (by_cpu[m] - exact[m]).norm() < 0.05 * exact[m].norm()


def test_attention_and_matmuls_are_in_bfloat16_by_the_rules_of_cuda(network, monkeypatch):
    seen = set()
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.update({q.dtype, k.dtype, v.dtype})
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16), EmulatedCudaAutocast():
        network(*inputs(network.config))
    assert seen == {torch.bfloat16}


def test_each_kind_of_block_compiles_once(network, monkeypatch):
    """However many blocks there are, in bfloat16; each is compiled in the first step. The teacher sees no depth."""
    graphs = []

    def note_graph(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note_graph))
    image = network.modalities[0]
    teacher = build(replace(network.config, modalities=[image])).requires_grad_(False)
    network.compile_blocks()
    teacher.compile_blocks()
    noisy, t, text = inputs(network.config)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            x0_hat = network(noisy, t, text)
            with torch.no_grad():
                teacher({"rgb": noisy["rgb"]}, {"rgb": t["rgb"]}, text)
        sum(x.sum() for x in x0_hat.values()).backward()
        assert len(graphs) == len(lists_of_blocks(network)) + len(lists_of_blocks(teacher))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_and_sampling_take_a_fused_attention_kernel(network):
    """No fused kernel takes float32 with grouped keys; the fallback stores the whole matrix of scores."""
    noisy, t, text = inputs(network.config)
    network.cuda()
    noisy = {m: x.cuda() for m, x in noisy.items()}
    t = {m: level.cuda() for m, level in t.items()}
    text = text.cuda()
    schedule = model.make_schedule(["rgb", "depth"], 2)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        x0_hat = network(noisy, t, text)
        sum(x.sum() for x in x0_hat.values()).backward()
        made = network.sample(schedule, noisy, text, guidance={"rgb": 2.0})
    for x in (*x0_hat.values(), *made.values()):
        assert x.isfinite().all()
        assert x.dtype == torch.float32
