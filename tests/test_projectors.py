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

from llava_vr.configuration_llava_vr import PROJECTOR_OPTIONS
from llava_vr.modeling_llava_vr import PROJECTORS, cut_windows


VISION_SIZE, TEXT_SIZE, NUM_HEADS, LAYERS, TILES = 16, 24, 4, 3, 2
GRIDS = [(4, 2), (5, 2), (6, 3), (7, 4), (8, 4), (3, 3)]  # (patches per side, stride)
FRACTIONS = [(4, 4 / 3), (5, 5 / 3), (7, 7 / 3), (6, 1.5), (16, 16 / 12), (24, 24 / 16), (24, 24 / 7)]
PADDED_GRIDS = [(5, 2), (7, 4), (5, 3)]
OPTIONS = {
    "c_abstractor": {
        "depth": 2,
        "mlp_depth": 2,
        "hidden_size": VISION_SIZE,
        "position_embedding": True,
        "pre_norm": False,
        "end_tokens": 0,
    },
    "tokenpacker": {"feature_layers": [0] * LAYERS, "num_heads": NUM_HEADS},
    "resampler": {"depth": 2, "num_heads": NUM_HEADS},
}


# ------------------------------------------------------------------------------------------------------------- builders


def make_config(name, grid_size, stride, **options):
    return SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=VISION_SIZE),
        text_config=SimpleNamespace(hidden_size=TEXT_SIZE),
        projector_hidden_act="gelu",
        projector_downsample=stride,
        projector_kwargs={**OPTIONS.get(name, {}), **options},
        feature_grid=grid_size,
    )


def randomize(module):
    """Matrices scaled by their fan-in, vectors between 0.5 and 1.5: no weight is zero, no scale is one."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module


def make_projector(name, grid_size, stride, **options):
    return randomize(PROJECTORS[name](make_config(name, grid_size, stride, **options)))


def per_side(grid_size, stride):
    """Tokens along one side."""
    return math.ceil(grid_size / stride)


def make_inputs(name, grid_size):
    features = torch.randn(TILES, grid_size**2, VISION_SIZE)
    levels = torch.randn(TILES, grid_size**2, VISION_SIZE * LAYERS) if PROJECTORS[name].uses_levels else None
    return features, levels


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_the_configuration_names_every_projector_and_option():
    assert PROJECTOR_OPTIONS.keys() == PROJECTORS.keys()
    for name, options in PROJECTOR_OPTIONS.items():
        assert options.keys() == OPTIONS.get(name, {}).keys()


# ---------------------------------------------------------------------------------------- the same numbers, another way


def regions(grid_size, stride):
    """The patches of each region, as lists of (row, column) that lie inside the grid."""
    starts = range(0, grid_size, stride)
    side = range(stride)
    for top in starts:
        for left in starts:
            patches = [(top + i, left + j) for i in side for j in side]
            yield [(row, column) for row, column in patches if row < grid_size and column < grid_size]


def gather_regions(features, grid_size, stride):
    """One tensor `(tiles, patches of the region, features)` for each region."""
    for patches in regions(grid_size, stride):
        yield torch.stack([features[:, row * grid_size + column] for row, column in patches], dim=1)


def mean_of_regions(features, grid_size, stride):
    if isinstance(stride, float):
        grid = features.transpose(1, 2).unflatten(2, (grid_size, grid_size))
        return nn.AdaptiveAvgPool2d(per_side(grid_size, stride))(grid).flatten(2).transpose(1, 2)
    return torch.stack([region.mean(1) for region in gather_regions(features, grid_size, stride)], dim=1)


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


def expected_mlp(features, levels, weights, grid_size, stride, options):
    return mlp(features, weights)


def expected_avg_pool(features, levels, weights, grid_size, stride, options):
    return mlp(mean_of_regions(features, grid_size, stride), weights)


def expected_pixel_shuffle(features, levels, weights, grid_size, stride, options):
    tokens = []
    for patches in regions(grid_size, stride):
        top, left = patches[0]
        token = features.new_zeros(len(features), stride, stride, VISION_SIZE)
        for row, column in patches:
            token[:, row - top, column - left] = features[:, row * grid_size + column]
        tokens.append(token.flatten(1))
    return mlp(layer_norm(torch.stack(tokens, dim=1), weights, "layer_norm"), weights)


def expected_ldpv2(features, levels, weights, grid_size, stride, options):
    tokens = mean_of_regions(mlp(features, weights), grid_size, stride)
    side = per_side(grid_size, stride)
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


def expected_c_abstractor(features, levels, weights, grid_size, stride, options):
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
    tokens = mean_of_regions(stage(features, "stage_1", grid_size), grid_size, stride)
    tokens = stage(tokens, "stage_2", per_side(grid_size, stride))
    for i in range(options["mlp_depth"]):
        tokens = linear(F.silu(tokens) if i else tokens, weights, f"readout.{2 * i}")
    if options["end_tokens"]:
        tokens = torch.cat([tokens, weights["end_tokens"].repeat(len(tokens), 1, 1)], dim=1)
    return tokens


def expected_tokenpacker(features, levels, weights, grid_size, stride, options):
    key = layer_norm(mlp(levels, weights, "key."), weights, "norm_key", eps=1e-6)
    value = layer_norm(mlp(levels, weights, "value."), weights, "norm_value", eps=1e-6)
    tokens = []
    keys, values = gather_regions(key, grid_size, stride), gather_regions(value, grid_size, stride)
    for patches in regions(grid_size, stride):
        (top, left), (bottom, right) = patches[0], patches[-1]
        region = features.unflatten(1, (grid_size, grid_size))[:, top : bottom + 1, left : right + 1]
        centre = F.interpolate(region.permute(0, 3, 1, 2), size=(1, 1), mode="bilinear").flatten(1)
        query = layer_norm(linear(centre, weights, "query"), weights, "norm_query", eps=1e-6)
        tokens.append(multi_head_attention(query[:, None], next(keys), next(values), weights, "attention"))
    return mlp(torch.cat(tokens, dim=1), weights, "output.")


def expected_resampler(features, levels, weights, grid_size, stride, options):
    tokens = weights["queries"].repeat(len(features), 1, 1)
    for i in range(options["depth"]):
        query = layer_norm(tokens, weights, f"layers.{i}.norm_query")
        key = torch.cat([layer_norm(features, weights, f"layers.{i}.norm_key"), query], dim=1)
        tokens = tokens + multi_head_attention(query, key, key, weights, f"layers.{i}.attention")
        tokens = tokens + mlp(layer_norm(tokens, weights, f"layers.{i}.norm_mlp"), weights, f"layers.{i}.mlp.")
    return linear(layer_norm(tokens, weights, "norm"), weights, "output")


@torch.no_grad()
def expected(name, projector, features, levels, grid_size, stride, **options):
    weights = {key: weight.double() for key, weight in projector.state_dict().items()}
    levels = None if levels is None else levels.double()
    options = {**OPTIONS.get(name, {}), **options}
    return globals()[f"expected_{name}"](features.double(), levels, weights, grid_size, stride, options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("grid_size", [1, 2, 3, 4, 5, 7, 8, 12])
def test_cut_windows_equals_loops(grid_size, stride):
    grid = torch.randn(TILES, grid_size, grid_size, 3)
    for window in range(stride, stride + 5):
        offset = (window - stride) // 2
        expected = []
        for top in range(-offset, grid_size - offset, stride):
            for left in range(-offset, grid_size - offset, stride):
                for row in range(top, top + window):
                    for column in range(left, left + window):
                        inside = 0 <= row < grid_size and 0 <= column < grid_size
                        expected.append(grid[:, row, column] if inside else torch.zeros(TILES, 3))
        expected = torch.stack(expected, dim=1).view(TILES, per_side(grid_size, stride) ** 2, window**2, 3)
        assert torch.equal(cut_windows(grid, stride, window), expected)


@pytest.mark.parametrize(("grid_size", "stride"), FRACTIONS)
def test_windows_of_a_fraction_are_those_of_adaptive_pooling(grid_size, stride):
    """Which patches a region has is read from the pooling of grids that are one in a single row."""
    rows = torch.eye(grid_size).view(grid_size, 1, grid_size, 1).expand(-1, -1, -1, grid_size)
    pooled = nn.AdaptiveAvgPool2d((per_side(grid_size, stride), 1))(rows)[:, 0, :, 0]  # (rows, tokens)
    regions = [column.nonzero().flatten().tolist() for column in pooled.T]
    assert any(last[-1] >= first[0] for last, first in zip(regions, regions[1:]))  # they overlap
    grid, largest = torch.randn(TILES, grid_size, grid_size, 3), max(map(len, regions))
    for window in range(largest, largest + 4):
        sides = []
        for region in regions:
            start = region[0] - (window - len(region)) // 2
            sides.append(range(start, start + window))
        expected = []
        for top in sides:
            for left in sides:
                for row in top:
                    for column in left:
                        inside = 0 <= row < grid_size and 0 <= column < grid_size
                        expected.append(grid[:, row, column] if inside else torch.zeros(TILES, 3))
        expected = torch.stack(expected, dim=1).view(TILES, len(regions) ** 2, window**2, 3)
        assert torch.equal(cut_windows(grid, stride, window), expected)


def test_cut_windows_of_a_rectangle():
    grid = torch.arange(2 * 5, dtype=torch.float).view(1, 2, 5, 1)
    windows = cut_windows(grid, stride=2, window=2)
    assert windows[0, :, :, 0].tolist() == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 0, 9, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_windows_gives_each_feature_the_gradient_of_every_window_that_holds_it(dtype):
    grid = torch.randn(1, 5, 5, 2, dtype=dtype, requires_grad=True)
    windows = cut_windows(grid, stride=2, window=4)
    assert windows.dtype == dtype
    windows.sum().backward()
    along = torch.tensor([1, 2, 2, 2, 2])  # windows that hold a patch, along one side: they start at -1, 1 and 3
    assert torch.equal(grid.grad[0, :, :, 0], torch.outer(along, along).to(dtype))


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(("grid_size", "stride"), GRIDS)
@pytest.mark.parametrize("scale", [1, 1e-3])  # at the small one, the epsilon of each norm counts
@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_equals_its_equations(name, scale, grid_size, stride):
    stride = 1 if name == "mlp" else stride
    projector, (features, levels) = make_projector(name, grid_size, stride), make_inputs(name, grid_size)
    features = features * scale
    tokens = projector(features, levels)
    assert tokens.shape == (TILES, per_side(grid_size, stride) ** 2, TEXT_SIZE)
    assert_close(tokens, expected(name, projector, features, levels, grid_size, stride))


@pytest.mark.parametrize(("grid_size", "stride"), FRACTIONS)
def test_c_abstractor_of_a_fraction_equals_its_equations(grid_size, stride):
    projector = make_projector("c_abstractor", grid_size, stride)
    features, _ = make_inputs("c_abstractor", grid_size)
    tokens = projector(features)
    assert tokens.shape == (TILES, per_side(grid_size, stride) ** 2, TEXT_SIZE)
    assert_close(tokens, expected("c_abstractor", projector, features, None, grid_size, stride))
    compiled = torch.compile(projector, backend="eager", fullgraph=True, dynamic=True)
    assert_close(compiled(features), tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 3, "mlp_depth": 1},
        {"depth": 1, "mlp_depth": 3, "pre_norm": True},
        {"depth": 1, "position_embedding": False, "end_tokens": 3},
        {"depth": 2, "hidden_size": 2 * VISION_SIZE},  # the first block then has a convolution on its shortcut
        {"depth": 0, "hidden_size": 2 * VISION_SIZE, "pre_norm": True, "end_tokens": 1},
    ],
    ids=str,
)
def test_c_abstractor_options(options):
    projector = make_projector("c_abstractor", 5, 2, **options)
    features = make_inputs("c_abstractor", 5)[0] * 1e-3
    tokens = projector(features)
    assert tokens.shape[1] == 9 + options.get("end_tokens", 0)
    for block in projector.modules():
        if hasattr(block, "squeeze"):  # a quarter of the block's input, as in RegNet
            assert block.squeeze.out_channels == block.conv_1.conv.in_channels // 4
    assert_close(tokens, expected("c_abstractor", projector, features, None, 5, 2, **options))


@pytest.mark.parametrize(("grid_size", "stride"), [(4, 2), (6, 3), (8, 4)])
def test_tokenpacker_queries_are_the_whole_grid_down_sampled(grid_size, stride):
    projector = make_projector("tokenpacker", grid_size, stride)
    features, levels = make_inputs("tokenpacker", grid_size)
    queries = []
    projector.query.register_forward_hook(lambda module, inputs, output: queries.append(inputs[0]))
    projector(features, levels)
    grid = features.view(TILES, grid_size, grid_size, VISION_SIZE).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=per_side(grid_size, stride), mode="bilinear")
    assert_close(queries[0], grid.flatten(2).transpose(1, 2))


def test_mlp_is_the_projector_of_llava_next():
    config = make_config("mlp", 4, 1)
    config.vision_feature_layer, config.multimodal_projector_bias = -2, True
    projector, reference = make_projector("mlp", 4, 1), LlavaNextMultiModalProjector(config)
    reference.load_state_dict(projector.state_dict())
    features, _ = make_inputs("mlp", 4)
    assert torch.equal(projector(features), reference(features))


def test_pixel_shuffle_is_the_projector_of_internvl():
    config = make_config("pixel_shuffle", 6, 2)
    config.downsample_ratio = 0.5
    projector, reference = make_projector("pixel_shuffle", 6, 2), InternVLMultiModalProjector(config)
    reference.load_state_dict(projector.state_dict())
    features, _ = make_inputs("pixel_shuffle", 6)
    shuffled = InternVLModel.pixel_shuffle(None, features.view(TILES, 6, 6, VISION_SIZE), scale_factor=0.5)
    assert_close(projector(features), reference(shuffled.flatten(1, 2)))


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(("grid_size", "stride"), PADDED_GRIDS)
@pytest.mark.parametrize("name", ["avg_pool", "ldpv2", "tokenpacker", "resampler"])
def test_equal_features_give_equal_tokens_at_the_padded_edge(name, grid_size, stride):
    projector, (features, levels) = make_projector(name, grid_size, stride), make_inputs(name, grid_size)
    if name == "ldpv2":
        nn.init.zeros_(projector.position_conv.weight)  # it tells the border of the grid on purpose
    if name == "resampler":
        nn.init.ones_(projector.queries)
    levels = None if levels is None else levels[:, :1].expand_as(levels)
    tokens = projector(features[:, :1].expand_as(features), levels)
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
    assert_close(projector(features)[:, 8], layers(corner))


def test_padding_of_pixel_shuffle_is_zeros():
    projector, (features, _) = make_projector("pixel_shuffle", 5, 2), make_inputs("pixel_shuffle", 5)
    corner = F.pad(features[:, 24], (0, 3 * VISION_SIZE))
    layers = nn.Sequential(projector.layer_norm, projector.linear_1, nn.GELU(), projector.linear_2)
    assert_close(projector(features)[:, 8], layers(corner))


def test_padding_is_not_attended_to():
    """The corner's region holds one patch, so its attention has weight 1 there, whatever query and key are."""
    projector, (features, levels) = make_projector("tokenpacker", 5, 2), make_inputs("tokenpacker", 5)
    value = projector.norm_value(projector.value(levels[:, 24]))
    attention = projector.attention
    value = F.linear(value, attention.in_proj_weight[2 * VISION_SIZE :], attention.in_proj_bias[2 * VISION_SIZE :])
    assert_close(projector(features, levels)[:, 8], projector.output(attention.out_proj(value)))


# ----------------------------------------------------------------------------------------------- locality and gradients


@pytest.mark.parametrize(("grid_size", "stride"), GRIDS)
@pytest.mark.parametrize("name", ["avg_pool", "pixel_shuffle", "tokenpacker"])
def test_a_patch_changes_its_own_token_and_no_other(name, grid_size, stride):
    projector, (features, levels) = make_projector(name, grid_size, stride), make_inputs(name, grid_size)
    tokens, side = projector(features, levels), per_side(grid_size, stride)
    source = features if levels is None else levels
    for patch in range(grid_size**2):
        row, column = divmod(patch, grid_size)
        changed = source.clone()
        changed[:, patch] += torch.randn_like(changed[:, patch])
        after = projector(changed) if levels is None else projector(features, changed)
        differs = (after != tokens).any(-1).all(0)
        assert differs.nonzero().tolist() == [[row // stride * side + column // stride]]


@pytest.mark.parametrize(("grid_size", "stride"), GRIDS)
def test_a_tokenpacker_query_comes_from_its_own_region(grid_size, stride):
    projector = make_projector("tokenpacker", grid_size, stride)
    features, levels = make_inputs("tokenpacker", grid_size)
    features.requires_grad_()
    tokens = projector(features, levels)
    for token, patches in enumerate(regions(grid_size, stride)):
        (gradient,) = torch.autograd.grad(tokens[:, token].square().sum(), features, retain_graph=True)
        touched = set(gradient.abs().sum((0, 2)).nonzero().flatten().tolist())
        own = {row * grid_size + column for row, column in patches}
        assert touched <= own
        assert bool(touched) == (len(patches) > 1)  # a lone key has weight 1, whatever the query is


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_parameter_has_a_gradient(name):
    options = {"pre_norm": True, "end_tokens": 2, "hidden_size": 8} if name == "c_abstractor" else {}
    projector = make_projector(name, 5, 1 if name == "mlp" else 2, **options)
    projector(*make_inputs(name, 5)).square().sum().backward()
    for parameter_name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", PROJECTORS)
def test_bfloat16_stays_close(name):
    stride = 1 if name == "mlp" else 2
    projector, (features, levels) = make_projector(name, 5, stride), make_inputs(name, 5)
    tokens = projector(features, levels)
    in_bfloat16 = projector.bfloat16()(features.bfloat16(), None if levels is None else levels.bfloat16())
    assert in_bfloat16.dtype == torch.bfloat16
    assert (in_bfloat16 - tokens).abs().max() < 0.05 * tokens.abs().max()


@pytest.mark.parametrize("name", PROJECTORS)
def test_no_tiles_give_no_tokens(name):
    projector, (features, levels) = make_projector(name, 5, 1 if name == "mlp" else 2), make_inputs(name, 5)
    tokens = projector(features[:0], None if levels is None else levels[:0])
    assert tokens.shape[0] == 0 and tokens.shape[2] == TEXT_SIZE


@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_is_one_graph(name):
    projector, (features, levels) = make_projector(name, 5, 1 if name == "mlp" else 2), make_inputs(name, 5)
    compiled = torch.compile(projector, backend="eager", fullgraph=True, dynamic=True)
    assert_close(compiled(features, levels), projector(features, levels))
