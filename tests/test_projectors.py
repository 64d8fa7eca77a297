"""
The projectors against the equations of their papers, written out here a second time: region by region, tap by tap, in
float64, from the projector's own weights.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from llava_vr.projectors_llava_vr import PROJECTORS


VISION_SIZE, TEXT_SIZE, NUM_HEADS, LAYERS, TILES = 16, 24, 4, 3, 2
GRIDS = [(4, 2), (5, 2), (6, 3), (7, 4), (8, 4), (3, 3)]  # (patches per side, s)
PADDED_GRIDS = [(5, 2), (7, 4), (5, 3)]
OPTIONS = {
    "avg_pool": {"pooled_mlp": False},
    "c_abstractor": {
        "depth": 2,
        "mlp_depth": 2,
        "hidden_size": VISION_SIZE,
        "position_embedding": True,
        "pre_norm": False,
    },
    "tokenpacker": {"feature_layers": [0] * LAYERS, "num_heads": NUM_HEADS},
    "resampler": {"depth": 2, "num_heads": NUM_HEADS},
}
ANY_DOWNSAMPLE = [name for name, projector in PROJECTORS.items() if projector.any_downsample]


# ------------------------------------------------------------------------------------------------------------- builders


def make_config(name, grid_size, downsample, **options):
    return SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=VISION_SIZE),
        text_config=SimpleNamespace(hidden_size=TEXT_SIZE),
        projector_hidden_act="gelu",
        projector_downsample=downsample,
        projector_kwargs={**OPTIONS.get(name, {}), **options},
        feature_grid=grid_size,
        feature_size=VISION_SIZE,
    )


def randomize(module):
    """Matrices scaled by their fan-in, vectors between 0.5 and 1.5: no weight is zero, no scale is one."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module


def make_projector(name, grid_size, downsample, **options):
    return randomize(PROJECTORS[name](make_config(name, grid_size, downsample, **options)))


def per_side(grid_size, downsample):
    """Tokens along one side."""
    return math.ceil(grid_size / downsample)


def make_inputs(name, grid_size):
    features = torch.randn(TILES, grid_size**2, VISION_SIZE)
    levels = torch.randn(TILES, grid_size**2, VISION_SIZE * LAYERS) if PROJECTORS[name].uses_levels else None
    return features, levels


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_projectors_of_any_downsample():
    assert ANY_DOWNSAMPLE == ["avg_pool", "ldpv2", "c_abstractor", "tokenpacker"]


# ---------------------------------------------------------------------------------------- the same numbers, another way


def regions(grid_size, downsample):
    """The patches of each region, as lists of (row, column) that lie inside the grid."""
    starts = range(0, grid_size, downsample)
    side = range(downsample)
    for top in starts:
        for left in starts:
            patches = [(top + i, left + j) for i in side for j in side]
            yield [(row, column) for row, column in patches if row < grid_size and column < grid_size]


def gather_regions(features, grid_size, downsample):
    """One tensor `(tiles, patches of the region, features)` for each region."""
    for patches in regions(grid_size, downsample):
        yield torch.stack([features[:, row * grid_size + column] for row, column in patches], dim=1)


def mean_of_regions(features, grid_size, downsample):
    return torch.stack([region.mean(1) for region in gather_regions(features, grid_size, downsample)], dim=1)


def linear(features, weights, name):
    out = torch.einsum("...i,oi->...o", features, weights[f"{name}.weight"])
    return out + weights.get(f"{name}.bias", 0)


def mlp(features, weights, name=""):
    return linear(F.gelu(linear(features, weights, f"{name}linear_1")), weights, f"{name}linear_2")


def layer_norm(features, weights, name, eps=1e-5):
    centred = features - features.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def depthwise_3x3(tokens, weight, side):
    """Sum of nine shifted and weighted copies of a grid `(tiles, side * side, channels)` with a border of zeros."""
    out = torch.zeros_like(tokens)
    for row in range(side):
        for column in range(side):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= row + i < side and 0 <= column + j < side:
                        neighbour = tokens[:, (row + i) * side + column + j]
                        out[:, row * side + column] += neighbour * weight[:, 0, i + 1, j + 1]
    return out


def multi_head_attention(query, key, value, weights, name):
    attention = nn.MultiheadAttention(VISION_SIZE, NUM_HEADS, batch_first=True).double()
    attention.load_state_dict(
        {key.removeprefix(f"{name}."): weight for key, weight in weights.items() if key.startswith(f"{name}.")}
    )
    return attention(query, key, value)[0]


def expected_mlp(features, levels, weights, grid_size, downsample, options):
    return mlp(features, weights)


def expected_avg_pool(features, levels, weights, grid_size, downsample, options):
    means = mean_of_regions(features, grid_size, downsample)
    return mlp(means, weights, "pooled_mlp." if options["pooled_mlp"] and downsample > 1 else "")


def expected_pixel_shuffle(features, levels, weights, grid_size, downsample, options):
    tokens = []
    for patches in regions(grid_size, downsample):
        top, left = patches[0]
        token = features.new_zeros(len(features), downsample, downsample, VISION_SIZE)
        for row, column in patches:
            token[:, row - top, column - left] = features[:, row * grid_size + column]
        tokens.append(token.flatten(1))
    return mlp(layer_norm(torch.stack(tokens, dim=1), weights, "layer_norm"), weights)


def expected_ldpv2(features, levels, weights, grid_size, downsample, options):
    tokens = mean_of_regions(mlp(features, weights), grid_size, downsample)
    side = per_side(grid_size, downsample)
    encoding = depthwise_3x3(tokens, weights["position_conv.weight"], side) + weights["position_conv.bias"]
    return tokens + encoding


def expected_regnet_block(tokens, weights, side):
    def conv_norm(tokens, name):
        kernel = weights[f"{name}.conv.weight"]
        if kernel.shape[-1] == 3:
            out = depthwise_3x3(tokens, kernel, side)
        else:
            out = torch.einsum("nti,oi->nto", tokens, kernel[:, :, 0, 0])
        return layer_norm(out, weights, f"{name}.norm")

    def one_by_one(tokens, name):
        return torch.einsum("nti,oi->nto", tokens, weights[f"{name}.weight"][:, :, 0, 0]) + weights[f"{name}.bias"]

    hidden = F.silu(conv_norm(F.silu(conv_norm(tokens, "conv_1")), "conv_2"))
    gate = torch.sigmoid(one_by_one(F.silu(one_by_one(hidden.mean(1, keepdim=True), "squeeze")), "excite"))
    shortcut = conv_norm(tokens, "shortcut") if "shortcut.conv.weight" in weights else tokens
    return F.silu(conv_norm(hidden * gate, "conv_3") + shortcut)


def expected_c_abstractor(features, levels, weights, grid_size, downsample, options):
    def stage(tokens, name, side):
        for i in range(1, options["depth"] + 1):
            prefix = f"{name}.block_{i}."
            block = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
            tokens = expected_regnet_block(tokens, block, side)
        return tokens

    if options["pre_norm"]:
        features = layer_norm(features, weights, "pre_norm", eps=1e-6)
    if options["position_embedding"]:
        features = features + weights["position_embedding"]
    tokens = mean_of_regions(stage(features, "stage_1", grid_size), grid_size, downsample)
    tokens = stage(tokens, "stage_2", per_side(grid_size, downsample))
    for i in range(options["mlp_depth"]):
        tokens = linear(F.silu(tokens) if i else tokens, weights, f"readout.{2 * i}")
    return tokens


def expected_tokenpacker(features, levels, weights, grid_size, downsample, options):
    key = layer_norm(mlp(levels, weights, "key."), weights, "norm_key", eps=1e-6)
    value = layer_norm(mlp(levels, weights, "value."), weights, "norm_value", eps=1e-6)
    tokens = []
    keys, values = gather_regions(key, grid_size, downsample), gather_regions(value, grid_size, downsample)
    for patches in regions(grid_size, downsample):
        (top, left), (bottom, right) = patches[0], patches[-1]
        region = features.unflatten(1, (grid_size, grid_size))[:, top : bottom + 1, left : right + 1]
        centre = F.interpolate(region.permute(0, 3, 1, 2), size=(1, 1), mode="bilinear").flatten(1)
        query = layer_norm(linear(centre, weights, "query"), weights, "norm_query", eps=1e-6)
        tokens.append(multi_head_attention(query[:, None], next(keys), next(values), weights, "attention"))
    return mlp(torch.cat(tokens, dim=1), weights, "output.")


def expected_resampler(features, levels, weights, grid_size, downsample, options):
    tokens = weights["queries"].repeat(len(features), 1, 1)
    for i in range(options["depth"]):
        query = layer_norm(tokens, weights, f"layers.{i}.norm_query")
        key = torch.cat([layer_norm(features, weights, f"layers.{i}.norm_key"), query], dim=1)
        tokens = tokens + multi_head_attention(query, key, key, weights, f"layers.{i}.attention")
        tokens = tokens + mlp(layer_norm(tokens, weights, f"layers.{i}.norm_mlp"), weights, f"layers.{i}.mlp.")
    return linear(layer_norm(tokens, weights, "norm"), weights, "output")


@torch.no_grad()
def expected(name, projector, features, levels, grid_size, downsample, **options):
    weights = {key: weight.double() for key, weight in projector.state_dict().items()}
    levels = None if levels is None else levels.double()
    options = {**OPTIONS.get(name, {}), **options}
    return globals()[f"expected_{name}"](features.double(), levels, weights, grid_size, downsample, options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(("grid_size", "downsample"), GRIDS)
@pytest.mark.parametrize("scale", [1, 1e-3])  # at the small one, the epsilon of each norm counts
@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_equals_its_equations(name, scale, grid_size, downsample):
    downsample = 1 if name == "mlp" else downsample
    projector, (features, levels) = make_projector(name, grid_size, downsample), make_inputs(name, grid_size)
    features = features * scale
    tokens = projector(features, downsample, levels)
    assert tokens.shape == (TILES, per_side(grid_size, downsample) ** 2, TEXT_SIZE)
    assert_close(tokens, expected(name, projector, features, levels, grid_size, downsample))


@pytest.mark.parametrize("grid_size", [4, 5, 7])
@pytest.mark.parametrize("name", ANY_DOWNSAMPLE)
def test_one_projector_equals_its_equations_at_every_downsample(name, grid_size):
    projector, (features, levels) = make_projector(name, grid_size, 2), make_inputs(name, grid_size)
    for downsample in range(1, grid_size + 1):
        tokens = projector(features, downsample, levels)
        assert tokens.shape == (TILES, per_side(grid_size, downsample) ** 2, TEXT_SIZE)
        assert_close(tokens, expected(name, projector, features, levels, grid_size, downsample))


@pytest.mark.parametrize("name", ANY_DOWNSAMPLE)
def test_no_weight_depends_on_the_downsample(name):
    shapes = [{key: weight.shape for key, weight in make_projector(name, 7, s).state_dict().items()} for s in (1, 2, 4)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_avg_pool_at_1_is_the_mlp(dtype):
    averaged, mlp = make_projector("avg_pool", 5, 2).to(dtype), make_projector("mlp", 5, 1).to(dtype)
    mlp.load_state_dict(averaged.state_dict())
    features = make_inputs("mlp", 5)[0].to(dtype)
    assert torch.equal(averaged(features, 1), mlp(features, 1))


@pytest.mark.parametrize("downsample", [1, 2, 4])
def test_means_with_an_mlp_of_their_own(downsample):
    projector, features = make_projector("avg_pool", 5, 2, pooled_mlp=True), make_inputs("avg_pool", 5)[0]
    tokens = projector(features, downsample)
    assert_close(tokens, expected("avg_pool", projector, features, None, 5, downsample, pooled_mlp=True))


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 3, "mlp_depth": 1},
        {"depth": 1, "mlp_depth": 3, "pre_norm": True},
        {"depth": 1, "position_embedding": False},
        {"depth": 2, "hidden_size": 2 * VISION_SIZE},  # the first block then has a convolution on its shortcut
        {"depth": 0, "hidden_size": 2 * VISION_SIZE, "pre_norm": True},
    ],
    ids=str,
)
def test_c_abstractor_options(options):
    projector = make_projector("c_abstractor", 5, 2, **options)
    features = make_inputs("c_abstractor", 5)[0] * 1e-3
    tokens = projector(features, 2)
    for block in projector.modules():
        if hasattr(block, "squeeze"):  # a quarter of the block's input, as in RegNet
            assert block.squeeze.out_channels == block.conv_1.conv.in_channels // 4
    assert_close(tokens, expected("c_abstractor", projector, features, None, 5, 2, **options))


@pytest.mark.parametrize(("grid_size", "downsample"), [(4, 2), (6, 3), (8, 4)])
def test_tokenpacker_queries_are_the_whole_grid_down_sampled(grid_size, downsample):
    projector = make_projector("tokenpacker", grid_size, downsample)
    features, levels = make_inputs("tokenpacker", grid_size)
    queries = []
    projector.query.register_forward_hook(lambda module, inputs, output: queries.append(inputs[0]))
    projector(features, downsample, levels)
    grid = features.view(TILES, grid_size, grid_size, VISION_SIZE).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=per_side(grid_size, downsample), mode="bilinear")
    assert_close(queries[0], grid.permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize("layers", [-2, [1, 2, -1]], ids=str)
def test_mlp_is_the_projector_of_llava_next(layers):
    config = make_config("mlp", 4, 1)
    config.vision_feature_layer, config.multimodal_projector_bias = layers, True
    config.feature_size = VISION_SIZE * (1 if isinstance(layers, int) else len(layers))
    projector, reference = randomize(PROJECTORS["mlp"](config)), LlavaNextMultiModalProjector(config)
    reference.load_state_dict(projector.state_dict())
    features = torch.randn(TILES, 16, config.feature_size)
    assert torch.equal(projector(features, 1), reference(features))


@pytest.mark.parametrize("name", PROJECTORS)
def test_joined_layers_widen_what_every_projector_reads(tiny_config, name):
    downsample = 1 if name == "mlp" else 2
    config = tiny_config(projector_type=name, projector_downsample=downsample, vision_feature_layer=[1, -1])
    projector, levels = PROJECTORS[name](config), None
    if projector.uses_levels:
        levels = torch.randn(TILES, 16, 32 * len(config.projector_kwargs["feature_layers"]))
    tokens = projector(torch.randn(TILES, 16, 2 * 32), downsample, levels)
    assert tokens.shape == (TILES, (4 // downsample) ** 2, 32)


def test_pixel_shuffle_is_the_projector_of_internvl():
    config = make_config("pixel_shuffle", 6, 2)
    config.downsample_ratio = 0.5
    projector, reference = make_projector("pixel_shuffle", 6, 2), InternVLMultiModalProjector(config)
    reference.load_state_dict(projector.state_dict())
    features, _ = make_inputs("pixel_shuffle", 6)
    shuffled = InternVLModel.pixel_shuffle(None, features.view(TILES, 6, 6, VISION_SIZE), scale_factor=0.5)
    assert_close(projector(features, 2), reference(shuffled.flatten(1, 2)))


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(("grid_size", "downsample"), PADDED_GRIDS)
@pytest.mark.parametrize("name", ["avg_pool", "ldpv2", "tokenpacker", "resampler"])
def test_equal_features_give_equal_tokens_at_the_padded_edge(name, grid_size, downsample):
    projector, (features, levels) = make_projector(name, grid_size, downsample), make_inputs(name, grid_size)
    if name == "ldpv2":
        nn.init.zeros_(projector.position_conv.weight)  # it tells the border of the grid on purpose
    if name == "resampler":
        nn.init.ones_(projector.queries)
    levels = None if levels is None else levels[:, :1].expand_as(levels)
    tokens = projector(features[:, :1].expand_as(features), downsample, levels)
    assert_close(tokens, tokens[:, :1].expand_as(tokens))


@pytest.mark.parametrize("name", ["avg_pool", "ldpv2", "c_abstractor"])
def test_padding_enters_no_mean(name):
    options = {"depth": 0, "mlp_depth": 1, "position_embedding": False} if name == "c_abstractor" else {}
    projector, (features, _) = make_projector(name, 5, 2, **options), make_inputs(name, 5)
    if name == "c_abstractor":
        layers = projector.readout
    else:
        layers = nn.Sequential(projector.linear_1, nn.GELU(), projector.linear_2)
    if name == "ldpv2":
        nn.init.zeros_(projector.position_conv.weight)
        nn.init.zeros_(projector.position_conv.bias)
    corner = features[:, 24]  # the only patch of the last region
    assert_close(projector(features, 2)[:, 8], layers(corner))


def test_padding_of_pixel_shuffle_is_zeros():
    projector, (features, _) = make_projector("pixel_shuffle", 5, 2), make_inputs("pixel_shuffle", 5)
    corner = F.pad(features[:, 24], (0, 3 * VISION_SIZE))
    layers = nn.Sequential(projector.layer_norm, projector.linear_1, nn.GELU(), projector.linear_2)
    assert_close(projector(features, 2)[:, 8], layers(corner))


def test_padding_is_not_attended_to():
    """The corner's region holds one patch, so its attention has weight 1 there, whatever query and key are."""
    projector, (features, levels) = make_projector("tokenpacker", 5, 2), make_inputs("tokenpacker", 5)
    value = projector.norm_value(projector.value(levels[:, 24]))
    attention = projector.attention
    value = F.linear(value, attention.in_proj_weight[2 * VISION_SIZE :], attention.in_proj_bias[2 * VISION_SIZE :])
    assert_close(projector(features, 2, levels)[:, 8], projector.output(attention.out_proj(value)))


# ----------------------------------------------------------------------------------------------- locality and gradients


@pytest.mark.parametrize(("grid_size", "downsample"), GRIDS)
@pytest.mark.parametrize("name", ["avg_pool", "pixel_shuffle", "tokenpacker"])
def test_a_patch_changes_its_own_token_and_no_other(name, grid_size, downsample):
    projector, (features, levels) = make_projector(name, grid_size, downsample), make_inputs(name, grid_size)
    tokens, side = projector(features, downsample, levels), per_side(grid_size, downsample)
    source = features if levels is None else levels
    for patch in range(grid_size**2):
        row, column = divmod(patch, grid_size)
        changed = source.clone()
        changed[:, patch] += torch.randn_like(changed[:, patch])
        after = projector(*((changed, downsample) if levels is None else (features, downsample, changed)))
        differs = (after != tokens).any(-1).all(0)
        assert differs.nonzero().tolist() == [[row // downsample * side + column // downsample]]


@pytest.mark.parametrize(("grid_size", "downsample"), GRIDS)
def test_a_tokenpacker_query_comes_from_its_own_region(grid_size, downsample):
    projector = make_projector("tokenpacker", grid_size, downsample)
    features, levels = make_inputs("tokenpacker", grid_size)
    features.requires_grad_()
    tokens = projector(features, downsample, levels)
    for token, patches in enumerate(regions(grid_size, downsample)):
        (gradient,) = torch.autograd.grad(tokens[:, token].square().sum(), features, retain_graph=True)
        touched = set(gradient.abs().sum((0, 2)).nonzero().flatten().tolist())
        own = {row * grid_size + column for row, column in patches}
        assert touched <= own
        assert bool(touched) == (len(patches) > 1)  # a lone key has weight 1, whatever the query is


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_parameter_has_a_gradient(name):
    options = {"pre_norm": True, "hidden_size": 8} if name == "c_abstractor" else {}
    downsample = 1 if name == "mlp" else 2
    projector, (features, levels) = make_projector(name, 5, downsample, **options), make_inputs(name, 5)
    projector(features, downsample, levels).square().sum().backward()
    for parameter_name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", PROJECTORS)
def test_bfloat16_stays_close(name):
    downsample = 1 if name == "mlp" else 2
    projector, (features, levels) = make_projector(name, 5, downsample), make_inputs(name, 5)
    tokens = projector(features, downsample, levels)
    in_bfloat16 = projector.bfloat16()(features.bfloat16(), downsample, None if levels is None else levels.bfloat16())
    assert in_bfloat16.dtype == torch.bfloat16
    assert (in_bfloat16 - tokens).abs().max() < 0.05 * tokens.abs().max()


@pytest.mark.common
@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_is_one_graph(name):
    downsample = 1 if name == "mlp" else 2
    projector, (features, levels) = make_projector(name, 5, downsample), make_inputs(name, 5)
    compiled = torch.compile(projector, backend="eager", fullgraph=True, dynamic=True)
    assert_close(compiled(features, downsample, levels), projector(features, downsample, levels))
