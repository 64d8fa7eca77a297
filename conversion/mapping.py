"""Names: from those of a source to ours, as lists of (pattern, replacement); the first pattern that fits wins.

A replacement that is a `Drop` says why the tensor is left out.
"""

import re
from collections.abc import Iterable, Sequence

from .readers import ConversionError


class Drop(str):
    """Why a tensor of the source has no place in the result."""


STALE = Drop("a buffer that the model computes itself")
HEAD = Drop("the vision tower's pooling head, which no token comes from")
TEXT_SIDE = Drop("the text side of a model of images and text")
TIED = Drop("tied to the embeddings")
LAST_LAYER = Drop("the source deletes the tower's last layer")
UNREAD = Drop("a layer of the vision tower after the last that is read")
OTHER_TOWER = Drop("the source loads the named tower instead of its own")
REPLACED = Drop("the artefact brings its own")
NEW_PROJECTOR = Drop("replaced by --projector")
NO_MODULE = Drop("its layer is not among --remember-layers")
ZERO_BIAS = Drop("a bias of the window that is zero, so without effect")

Rules = Sequence[tuple[str, str]]

BUFFERS: Rules = [
    (r"(?:.*\.)?rotary_emb\.inv_freq", STALE),
    (r"(?:.*\.)?position_ids", STALE),
    (r"(?:.*\.)?masked_bias", STALE),
]
# Below the name of the tower itself; older versions of transformers have an inner `vision_model.`
TOWER: Rules = [
    (r"head\.(.+)", HEAD),
    (r"((?:embeddings|encoder|pre_layrnorm|post_layernorm|layernorm)\b.*)", r"model.vision_tower.\1"),
]
TEXT: Rules = [
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    (r"lm_head\.weight", "lm_head.weight"),
]
PROJECTORS: dict[str, Rules] = {
    "mlp": [(r"0\.(weight|bias)", r"linear_1.\1"), (r"2\.(weight|bias)", r"linear_2.\1")],
    "ldpv2": [
        (r"mlp\.mlp\.0\.(weight|bias)", r"linear_1.\1"),
        (r"mlp\.mlp\.2\.(weight|bias)", r"linear_2.\1"),
        (r"peg\.peg\.0\.(weight|bias)", r"position_conv.\1"),
    ],
    "tokenpacker": [
        (r"q_proj_1\.weight", "query.weight"),
        (r"k_proj_1\.0\.(weight|bias)", r"key.linear_1.\1"),
        (r"k_proj_1\.2\.(weight|bias)", r"key.linear_2.\1"),
        (r"v_proj_1\.0\.(weight|bias)", r"value.linear_1.\1"),
        (r"v_proj_1\.2\.(weight|bias)", r"value.linear_2.\1"),
        (r"ln_q_1\.(weight|bias)", r"norm_query.\1"),
        (r"ln_k_1\.(weight|bias)", r"norm_key.\1"),
        (r"ln_v_1\.(weight|bias)", r"norm_value.\1"),
        (r"clip_attn\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)", r"attention.\1"),
        (r"mlp\.0\.(weight|bias)", r"output.linear_1.\1"),
        (r"mlp\.2\.(weight|bias)", r"output.linear_2.\1"),
    ],
    "c_abstractor": [
        (r"pos_emb", "position_embedding"),
        (r"prenorm\.(weight|bias)", r"pre_norm.\1"),
        (r"readout\.(\d+)\.(weight|bias)", r"readout.\1.\2"),
        *(
            (rf"net\.{place}\.b(\d+)\.{theirs}\.(weight|bias)", rf"stage_{stage}.block_\1.{ours}.\2")
            for place, stage in ((0, 1), (2, 2))
            for theirs, ours in (
                *((f"conv{i}.conv", f"conv_{i}.conv") for i in (1, 2, 3)),
                *((f"conv{i}.bn", f"conv_{i}.norm") for i in (1, 2, 3)),
                ("se.fc1", "squeeze"),
                ("se.fc2", "excite"),
                ("downsample.conv", "shortcut.conv"),
                ("downsample.bn", "shortcut.norm"),
            )
        ),
    ],
}


def below(prefix: str, rules: Rules, target: str = "") -> Rules:
    """The rules of a part, for the names that begin with `prefix` (a pattern) and for ours that begin with `target`."""
    return [(prefix + pattern, new if isinstance(new, Drop) else target + new) for pattern, new in rules]


REMEMBER: Rules = [
    (r"model\.vision_remember\.\d+\.window_bias", ZERO_BIAS),
    (r"(model\.vision_remember\..+)", r"\1"),
]
OURS: Rules = [
    *BUFFERS,
    *REMEMBER,
    *below(r"model\.vision_tower\.(?:vision_model\.)?", TOWER),
    (r"(model\.(?:vision_tower|multi_modal_projector|language_model)\..+)", r"\1"),
    (r"(model\.image_newline|lm_head\.weight)", r"\1"),
]
TRANSFORMERS: Rules = [
    *BUFFERS,
    *below(r"(?:model\.)?vision_tower\.(?:vision_model\.)?", TOWER),
    (r"(?:model\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))", r"model.multi_modal_projector.\1"),
    (r"(?:model\.)?image_newline", "model.image_newline"),
    (r"(?:language_model\.)?lm_head\.weight", "lm_head.weight"),
    (r"(?:model\.)?language_model\.(?:model\.)?((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
]
TOWER_ALONE: Rules = [
    *BUFFERS,
    *below(r"(?:vision_model\.)?", TOWER),
    (r"text_model\..+|(?:text|visual)_projection\..+|logit_scale|logit_bias", TEXT_SIDE),
]
LANGUAGE_MODEL: Rules = [*BUFFERS, *TEXT]


def research_rules(projector: str) -> Rules:
    """LLaVA's research code and its descendants, with this layout of the projector, and LLaVA-VR's own names."""
    return [
        *BUFFERS,
        *below(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
        *below(r"model\.mm_projector\.", PROJECTORS.get(projector, ()), "model.multi_modal_projector."),
        (r"(model\.multi_modal_projector\..+|model\.image_newline)", r"\1"),
        *REMEMBER,
        *TEXT,
    ]


def honeybee_rules() -> Rules:
    """Honeybee: a tower, an abstractor and a language model side by side."""
    return [
        *BUFFERS,
        *below(r"vision_model\.(?:vision_model\.)?", TOWER),
        *below(r"abstractor\.", PROJECTORS["c_abstractor"], "model.multi_modal_projector."),
        *below(r"language_model\.", TEXT),
    ]


def parse_maps(maps: Iterable[str]) -> list[tuple[re.Pattern, str]]:
    """`REGEX=REPLACEMENT` texts of the command line.

    Raises:
        ConversionError: no "=", or no regular expression before it.
    """
    parsed = []
    for text in maps:
        pattern, separator, replacement = text.partition("=")
        if not separator or not pattern:
            raise ConversionError(f"--map {text!r}: write it as 'REGEX=REPLACEMENT'.")
        try:
            parsed.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ConversionError(f"--map {text!r}: no regular expression: {error}.") from None
    return parsed


def apply_maps(name: str, maps: list[tuple[re.Pattern, str]]) -> str:
    """A source's name after the maps of the command line, in their order."""
    for pattern, replacement in maps:
        try:
            name = pattern.sub(replacement, name)
        except (re.error, IndexError) as error:
            raise ConversionError(f"--map '{pattern.pattern}={replacement}': {error}.") from None
    return name


def target_of(name: str, rules: Rules) -> str | None:
    """Our name for a source's, or a `Drop`, or None where no rule fits."""
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return replacement if isinstance(replacement, Drop) else match.expand(replacement)
    return None
