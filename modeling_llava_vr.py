"""LLaVA-VR: a vision-language model that compresses its vision tokens and lets them look again.

Read in this order: `VisionRemember`, the paper's module; `RememberHook`, which calls it between decoder layers;
`LlavaVrModel.get_image_features`, which makes the vision tokens and, row by row beside them, their memory.
Paper: Vision Remember, arXiv 2506.03928.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from packaging import version
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .card_llava_vr import CardMixin
from .configuration_llava_vr import LlavaVrConfig
from .layout_llava_vr import ImageLayout, cut_windows, to_grid
from .projectors_llava_vr import PROJECTORS, CAbstractorProjector, ResamplerProjector


logger = logging.get_logger(__name__)


class VisionRemember(nn.Module):
    """Saliency-enhancing local attention: a vision token's hidden state attends to its own window of the memory.

        k, v = key(m), value(m)                                     once per patch, before windows are cut
        h <- h + out(softmax(query(norm(h)) k^T / sqrt(d)) v)       over the entries of the window that are there

    The idea is the paper's (arXiv 2506.03928); norms, widths and the zero-initialised `out`, by which a new module
    changes nothing, are ours. Both steps are calls of the module, as FSDP gathers weights and PEFT replaces the module
    at its calls.
    """

    def __init__(self, config: LlavaVrConfig):
        super().__init__()
        hidden_size, width = config.text_config.hidden_size, config.remember_hidden_size
        self.num_heads, self.num_key_value_heads = config.remember_num_heads, config.remember_num_key_value_heads
        self.entry_size = 2 * config.key_value_size  # of what `project` returns
        self.query_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.query = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(config.memory_size, config.key_value_size, bias=False)
        self.value = nn.Linear(config.memory_size, config.key_value_size, bias=False)
        self.out = nn.Linear(width, hidden_size)
        self.out.starts_at_zero = True

    def forward(self, states: torch.Tensor, rows: torch.Tensor | None = None, present: torch.Tensor | None = None):
        """`project(states)` of a memory, or, with rows, `attend(states, rows, present)`."""
        return self.project(states) if rows is None else self.attend(states, rows, present)

    def project(self, memory: torch.Tensor) -> torch.Tensor:
        """The keys and values `(..., 2 * K)` of a normalised memory `(..., M)`."""
        return torch.cat([self.key(memory), self.value(memory)], dim=-1)

    def attend(
        self, hidden_states: torch.Tensor, rows: torch.Tensor, present: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(tokens, hidden_size)`, of the vision tokens.
            rows: `(tokens, window * window, 2 * K)`, the keys and values of each token's window.
            present: bool `(tokens, window * window)`, where a window holds a patch and not padding.

        Returns:
            The update of the hidden states `(tokens, hidden_size)`, zero for a token with no entry present, and the
            attention weights `(tokens, heads, window * window)`.
        """
        groups = (self.num_key_value_heads, -1)  # g heads share a head k of keys and values
        query = self.query(self.query_norm(hidden_states)).unflatten(-1, (self.num_heads, -1)).unflatten(1, groups)
        key, value = (part.unflatten(-1, groups).unbind(2) for part in rows.chunk(2, dim=-1))  # views, not to be copied
        scores = torch.cat([q @ k.mT for q, k in zip(query.unbind(1), key)], dim=1).float()  # (tokens, heads, window)
        scores = scores / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~present[:, None], torch.finfo(torch.float32).min)
        weights = scores.softmax(-1).masked_fill(~present[:, None], 0).to(rows.dtype)
        read = torch.cat([w @ v for w, v in zip(weights.chunk(len(value), dim=1), value)], dim=1)
        return self.out(read.flatten(1)).masked_fill(~present.any(-1, keepdim=True), 0), weights


class RememberModules(nn.ModuleDict):
    """The `VisionRemember` modules, each under the index of the decoder layer that it follows."""

    def look_again(
        self,
        key: str,
        hidden_states: torch.Tensor,
        vision_memory: torch.Tensor | None = None,
        vision_index: torch.Tensor | None = None,
        vision_trace: SimpleNamespace | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The hidden states `(batch, sequence, hidden_size)` after one module, for `RememberHook`.

        An engine that keeps the memory elsewhere overrides this method. The arguments are those of a decoder layer:

        Args:
            vision_memory: `(tokens, window * window, 2 * K * L + 1)`, keys and values of all L modules, and presence.
            vision_index: `(tokens,)`, positions of the vision tokens in the flat batch.
            vision_trace: takes the attention weights, by decoder layer, in its `weights`.
        """
        if vision_memory is None:
            return hidden_states
        index, memory = vision_index.to(hidden_states.device), vision_memory.to(hidden_states.device)
        rows = memory[..., :-1].chunk(len(self), dim=-1)[list(self).index(key)]
        flat = hidden_states.flatten(0, 1)
        update, weights = self[key](flat.index_select(0, index), rows, memory[..., -1] > 0.5)
        if vision_trace is not None:
            vision_trace.weights[int(key)] = weights
        return flat.index_add(0, index, update.to(flat)).view_as(hidden_states)


class RememberHook:
    """Forward hook of a decoder layer: lets its vision tokens look again.

    It holds the modules and a key, not the module: PEFT's `modules_to_save` replaces the module by a trainable copy.
    """

    def __init__(self, modules: RememberModules, key: str):
        self.modules, self.key = modules, key

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.modules.look_again(self.key, output[0], **kwargs), *output[1:])
        return self.modules.look_again(self.key, output, **kwargs)


@dataclass
class LlavaVrImageFeatures(BaseModelOutputWithPooling):
    """What the decoder needs of the images.

    Args:
        pooler_output: the vision tokens, one tensor `(tokens, hidden_size)` an image.
        deepstack_features: the memory rows, `[[(tokens, window * window * (2 * K * L + 1)), ...]]`, one tensor an
            image: the keys and values of each token's window for all L modules, and where a patch is present. None
            without Vision Remember modules.
    """

    pooler_output: list[torch.Tensor] | None = None
    deepstack_features: list[list[torch.Tensor]] | None = None


@dataclass
class LlavaVrModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        image_hidden_states: the vision tokens, `(tokens of all images, hidden_size)`.
        remember_attentions: for each of `remember_layers`, `(tokens of all images, heads, window * window)`.
    """

    image_hidden_states: torch.Tensor | None = None
    remember_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class LlavaVrCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As `LlavaVrModelOutputWithPast`, with `loss` and `logits` `(batch, sequence, vocabulary)`."""

    image_hidden_states: torch.Tensor | None = None
    remember_attentions: tuple[torch.Tensor, ...] | None = None


class LlavaVrPreTrainedModel(CardMixin, PreTrainedModel):
    config_class = LlavaVrConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionRemember"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _old_names = {r"^language_model\.model\.": "model.language_model.", r"^language_model\.lm_head": "lm_head"}

    def post_init(self):
        super().post_init()
        # accelerate's FSDP2 wants each class to exist
        self._no_split_modules = {type(m).__name__ for m in self.modules()}.intersection(self._no_split_modules)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (CAbstractorProjector, ResamplerProjector)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=getattr(self.config.text_config, "initializer_range", 0.02))
        elif isinstance(module, LlavaVrModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=1 / math.sqrt(self.config.text_config.hidden_size))

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        if enable and reentrant and version.parse(transformers.__version__) < version.parse("5.23"):
            raise ValueError(
                'gradient_checkpointing_kwargs={"use_reentrant": True} loses the memory\'s gradients below '
                'transformers 5.23: pass {"use_reentrant": False}, the default.'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, dict):
            kwargs["quantization_config"] = quantization = AutoQuantizationConfig.from_dict(dict(quantization))
        if getattr(quantization, "llm_int8_skip_modules", ()) is None:  # bitsandbytes, and no names are given
            kwargs["quantization_config"] = quantization = copy.deepcopy(quantization)
            parts = ("vision_tower", "multi_modal_projector", "vision_remember", "lm_head")
            quantization.llm_int8_skip_modules = [f"{prefix}{part}" for prefix in ("", "model.") for part in parts]
        kwargs["key_mapping"] = cls._old_names | (kwargs.get("key_mapping") or {})
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if found := getattr(model, "_weight_conversions", None):  # undone at saving: our names stay
            model._weight_conversions = [c for c in found if c.source_patterns[0] not in cls._old_names]
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # its 4-bit weights, once packed, are saved wrong
                module.support_avx512bf16_for_cpu = False
        missing = [name.split("vision_remember.")[1] for name in info["missing_keys"] if "vision_remember." in name]
        if missing:
            layers = sorted({int(name.split(".")[0]) for name in missing})
            logger.warning(
                f"The checkpoint lacks weights of the Vision Remember modules after decoder layers {layers}. Those are "
                "new: a new module adds nothing until it is trained. Set remember_layers=[] to leave them out."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        current = type(self)  # under FSDP2 a class of torch's, whose code would be saved instead of this file
        self.__class__ = next(cls for cls in current.__mro__ if not cls.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = current


class LlavaVrModel(LlavaVrPreTrainedModel):
    """Vision tower, projector, decoder, and the Vision Remember modules between the decoder's layers; no head."""

    def __init__(self, config: LlavaVrConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector_type](config)
        self.image_newline = None
        if config.image_merge_type == "spatial_unpad":
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.language_model = AutoModel.from_config(config.text_config)
        self.vision_remember = RememberModules({str(i): VisionRemember(config) for i in config.remember_layers})
        layers = getattr(self.language_model, "layers", None)
        if len(self.vision_remember) and not isinstance(layers, nn.ModuleList):
            self._refuse_decoder("has no list `layers` to insert it in")
        for key in self.vision_remember:
            layers[int(key)].register_forward_hook(RememberHook(self.vision_remember, key), with_kwargs=True)
        self._hooks_verified = False
        self.post_init()

    def _refuse_decoder(self, reason: str):
        raise ValueError(
            f"text_config.model_type {self.config.text_config.model_type!r}: this decoder {reason}. Vision Remember "
            "works with llama, qwen2, qwen3, mistral, gemma3_text, smollm3, phi3 and their like; or set "
            "remember_layers=[]."
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        image_downsamples: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> LlavaVrImageFeatures:
        """Vision tokens of the images and, row by row beside them, their memory.

        Args:
            pixel_values: `(images, tiles, 3, height, width)`, base tile first, or `(images, 3, height, width)`.
            image_sizes: `(images, 2)`, (height, width) in pixels before processing; needed with tiles.
            image_downsamples: `(images,)`, each image's s, one of the configuration's choices; its
                `projector_downsample` if not given.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.vision_config.output_hidden_states
        if not len(pixel_values):
            return self._no_images()
        layout, sizes, downsamples = self._check_images(pixel_values, image_sizes, image_downsamples)
        num_tiles = [layout.num_tiles(size) for size in sizes]
        if pixel_values.ndim == 5:
            pixel_values = torch.cat([image[:n] for image, n in zip(pixel_values, num_tiles)])  # (all tiles, 3, H, W)
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True, **kwargs
        )
        states, ends = outputs.hidden_states, [0, *accumulate(num_tiles)]
        features, levels = self._select_features(states, self.config.feature_layers), None
        if self.multi_modal_projector.uses_levels:
            levels = self._select_features(states, self.config.projector_kwargs["feature_layers"])
        memory = self._project_memory(states) if len(self.vision_remember) else None
        packed = [None] * len(sizes)
        for downsample in dict.fromkeys(downsamples):
            chosen = [i for i, s in enumerate(downsamples) if s == downsample]
            tiles = [tile for i in chosen for tile in range(ends[i], ends[i + 1])] if len(chosen) < len(sizes) else ...
            tokens = self.multi_modal_projector(features[tiles], downsample, None if levels is None else levels[tiles])
            if memory is not None:
                rows = cut_windows(memory[tiles], downsample, self.config.window_size(downsample)).flatten(2)
                tokens = torch.cat([tokens, rows.to(tokens.device)], dim=-1)
            separators = self._separators(tokens)
            for i, image in zip(chosen, tokens.split([num_tiles[i] for i in chosen])):
                packed[i] = layout.pack(image, sizes[i], separators)
        width = self.config.text_config.hidden_size
        return LlavaVrImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=[image[:, :width] for image in packed],
            hidden_states=states if output_hidden_states else None,
            attentions=outputs.attentions,
            deepstack_features=None if memory is None else [[image[:, width:] for image in packed]],
        )

    def _project_memory(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Keys and values of all modules at each patch, and a last channel of ones: `(tiles, g, g, 2 * K * L + 1)`.

        Each level of the memory is normalised by itself, without weights: those would be one with those of `key`.
        """
        features = self._select_features(hidden_states, self.config.remember_feature_layers)  # (tiles, g * g, M)
        size = self.config.vision_config.hidden_size
        memory = F.layer_norm(features.unflatten(-1, (-1, size)), (size,), eps=1e-6).flatten(-2)
        projected = [module(memory).to(memory.device) for module in self.vision_remember.values()]
        return to_grid(torch.cat([*projected, torch.ones_like(memory[..., :1])], dim=-1))

    def _separators(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """What the layout puts between tokens, with a memory row that has no entry present: `(1 or 2, width)`."""
        if self.config.image_separator_ids is not None:
            ids = torch.tensor(self.config.image_separator_ids, device=tokens.device)
            separators = self.get_input_embeddings()(ids)
        elif self.image_newline is not None:
            separators = self.image_newline[None]
        else:
            return None
        return F.pad(separators.to(tokens), (0, tokens.shape[-1] - separators.shape[-1]))

    def _check_images(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None, image_downsamples: torch.Tensor | None
    ) -> tuple[ImageLayout, list[list[int] | None], list[int]]:
        """The layout of the images, their sizes, and the s of each. Without an axis of tiles, each image is one."""
        layout, images, choices = self.config.image_layout, len(pixel_values), self.config.downsamples
        side, shape, sizes = layout.tile_size, tuple(pixel_values.shape), [None] * images
        if len(shape) not in (4, 4 + bool(layout.pinpoints)) or shape[-3:] != (3, side, side):
            raise ValueError(
                f"pixel_values must be (images, tiles, 3, {side}, {side}) or (images, 3, {side}, {side}), by "
                f"vision_config.image_size; found {shape}."
            )
        default = [self.config.projector_downsample] * images
        downsamples = default if image_downsamples is None else image_downsamples.tolist()
        if len(downsamples) != images or not set(downsamples) <= set(choices):
            raise ValueError(
                f"image_downsamples must have one of {choices} (projector_downsample_choices) for each of the "
                f"{images} images, found {downsamples}."
            )
        if len(shape) == 4:
            return ImageLayout(side, layout.grid_size), sizes, downsamples
        if image_sizes is None or len(image_sizes) != images:
            raise ValueError(f"image_sizes must have a row for each of the {images} images, found {image_sizes}.")
        sizes = image_sizes.tolist()
        if (asked := max(map(layout.num_tiles, sizes))) > shape[1]:
            raise ValueError(
                f"pixel_values has {shape[1]} tiles an image, but image_sizes asks for {asked}: the processor's "
                "image_grid_pinpoints must be the configuration's."
            )
        return layout, sizes, downsamples

    def _select_features(self, hidden_states: Sequence[torch.Tensor], layers: Sequence[int]) -> torch.Tensor:
        """The features of these layers, joined: `(tiles, grid * grid, len(layers) * vision hidden_size)`."""
        features, patches = torch.cat([hidden_states[i] for i in layers], dim=-1), self.config.feature_grid**2
        if self.config.vision_feature_select_strategy == "default" and features.shape[1] == patches + 1:
            features = features[:, 1:]
        if features.shape[1] != patches:
            raise ValueError(
                f"vision_feature_select_strategy {self.config.vision_feature_select_strategy!r} leaves "
                f"{features.shape[1]} features a tile where the grid has {patches} patches: use 'default' for a tower "
                "with a CLS token."
            )
        return features

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where the image placeholders are: bool `(batch, sequence)`, from the ids or else from the embeddings."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if len(self.vision_remember) and self.config.text_config._attn_implementation == "vllm":
            raise ValueError('vLLM leaves the Vision Remember modules out: pip install ".[vllm]" in its repository.')
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        image_downsamples: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, LlavaVrImageFeatures] | None = None,
        output_remember_attentions: bool = False,
        **kwargs,
    ) -> LlavaVrModelOutputWithPast:
        """
        Args:
            input_ids: `(batch, sequence)`, with `image_token_id` wherever a vision token goes.
            pixel_values, image_sizes, image_downsamples: see `get_image_features`; images in the order of their
                placeholders, row by row.
            inputs_embeds: `(batch, sequence, hidden_size)`, instead of `input_ids`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`; `{"image": None}` says
                that there is no placeholder to look for, as in decoding.
            output_remember_attentions: whether to return the attention weights of the Vision Remember modules.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        images = (mm_encoder_outputs or {}).get("image")
        decoding = images is None and "image" in (mm_encoder_outputs or ())
        if pixel_values is not None:
            if images is not None:
                raise ValueError("Pass pixel_values or mm_encoder_outputs, not both.")
            images = self.get_image_features(pixel_values, image_sizes, image_downsamples, return_dict=True)
        elif images is None and not decoding and self._always_runs_vision():
            images = self._no_images()
        trace, tokens, remember_attentions = None, None, None
        mask = None if decoding and images is None else self.get_placeholder_mask(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if images is not None:
            tokens = torch.cat(list(images.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        if mask is not None:
            index = self._placeholder_index(mask, 0 if tokens is None else len(tokens))
        if tokens is not None:
            inputs_embeds = inputs_embeds.flatten(0, 1).index_copy(0, index, tokens).view_as(inputs_embeds)
            if len(self.vision_remember):
                memory = self.join_memory(images.deepstack_features[0], inputs_embeds)
                if memory.shape[1] or output_remember_attentions or self._always_runs_vision():
                    wanted = output_remember_attentions or not (self._hooks_verified or torch.compiler.is_compiling())
                    trace = SimpleNamespace(weights={}) if wanted else None  # a dict would be copied on the way
                    kwargs |= {"vision_memory": memory, "vision_index": index, "vision_trace": trace}
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if trace is not None:
            self._verify_hooks(trace)
            remember_attentions = tuple(trace.weights[i] for i in self.config.remember_layers)
        return LlavaVrModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=tokens,
            remember_attentions=remember_attentions if output_remember_attentions else None,
        )

    def join_memory(self, rows: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The memory `(tokens, window * window, 2 * K * L + 1)` of several images' rows, of the type of `like`."""
        entry_size = sum(module.entry_size for module in self.vision_remember.values()) + 1
        memory = join_rows(rows).to(like.device, like.dtype).unflatten(1, (-1, entry_size))
        resampled = self.config.image_layout.max_tiles  # together with entries that are absent
        return memory / memory[..., -1:].clamp(min=1e-6) if resampled else memory

    def _always_runs_vision(self) -> bool:
        """Whether the vision side runs even without an image: in training, so that every process at every step has the
        same gradients; under FSDP and ZeRO-3 always, as processes wait for each other to gather its weights."""
        return self.training or is_fsdp_managed_module(self) or is_deepspeed_zero3_enabled()

    def _no_images(self) -> LlavaVrImageFeatures:
        """The features of a blank image, without their rows."""
        layout, size = self.config.image_layout, [self.config.vision_config.image_size] * 2
        tiles = [layout.num_tiles(size)] if layout.pinpoints else []
        pixels = torch.zeros(1, *tiles, 3, *size, device=self.get_input_embeddings().weight.device)
        images = self.get_image_features(pixels, torch.tensor([size]), return_dict=True)
        for features in (images.pooler_output, *(images.deepstack_features or ())):
            features[:] = [rows[:0] for rows in features]
        return images

    def _placeholder_index(self, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Flat positions of the placeholders, `(num_tokens,)`."""
        torch_compilable_check(
            mask.sum() == num_tokens,
            lambda: (
                f"Found {int(mask.sum())} image placeholders (image_token_id {self.config.image_token_id}) but "
                f"{num_tokens} vision tokens of the images: pass each image once, in the order of its placeholders, "
                "and write them with the processor."
            ),
        )
        if torch.compiler.is_compiling():
            return torch.nonzero_static(mask.flatten(), size=num_tokens).squeeze(-1)
        return mask.flatten().nonzero().squeeze(-1)

    def _verify_hooks(self, trace: SimpleNamespace):
        """Refuses a decoder that does not hand its keyword arguments to every layer: its modules would never run."""
        if set(trace.weights) != set(self.config.remember_layers):
            self._refuse_decoder("does not hand its keyword arguments to its layers, so no module would run")
        self._hooks_verified = True


def join_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows `(tokens, width)` of several images as one tensor; smaller windows are filled up with absent entries."""
    width = max(image.shape[1] for image in rows)
    return torch.cat([F.pad(image, (0, width - image.shape[1])) for image in rows])


def scale_logits(logits: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """What some decoders do after their head: Granite divides its logits, Cohere multiplies them, Gemma caps them."""
    if scaling := getattr(text_config, "logits_scaling", None):
        logits = logits * scaling if text_config.model_type == "hyperclovax" else logits / scaling
    if factor := getattr(text_config, "logit_scale", None):
        logits = logits * factor
    if cap := getattr(text_config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


class LlavaVrForConditionalGeneration(LlavaVrPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaVrConfig):
        super().__init__(config)
        self.model = LlavaVrModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.generation_config.suppress_tokens = [config.image_token_id]  # no image could follow it
        self.post_init()

    def get_image_features(self, *args, **kwargs) -> LlavaVrImageFeatures:
        """See `LlavaVrModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        image_downsamples: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, LlavaVrImageFeatures] | None = None,
        output_remember_attentions: bool = False,
        **kwargs,
    ) -> LlavaVrCausalLMOutputWithPast:
        """
        Args:
            labels: `(batch, sequence)`, token ids, -100 where no loss is taken.
            logits_to_keep: how many of the last positions to compute logits for (0 for all), or their indices.
            Others as `LlavaVrModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_downsamples=image_downsamples,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            output_remember_attentions=output_remember_attentions,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.text_config)
        vocabulary = self.config.text_config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, vocabulary, **kwargs)
        return LlavaVrCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            remember_attentions=outputs.remember_attentions,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: torch.Tensor | None = None, **model_kwargs
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Keeps the vision tokens that the cache lacks, by row of the batch, and repeats each row's for its beams."""
        images = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if images is not None:
            cache, attended = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
            cached, embeds = 0 if cache is None else cache.get_seq_length(), model_kwargs.get("inputs_embeds")
            mask = self.model.get_placeholder_mask(input_ids if embeds is None else None, embeds)
            new, tokens = mask.clone(), sum(map(len, images.pooler_output))
            if mask.shape[1] > cached and (attended is None or attended.shape[1] == mask.shape[1]):
                new[:, :cached] = False
            if tokens in (mask.sum(), new.sum()):  # else the model refuses them
                kept, counts = new[mask] if tokens == mask.sum() else new[new], new.sum(1).tolist()
                levels = [images.pooler_output, *(images.deepstack_features or [])]
                rows = [join_rows(level)[kept.to(level[0].device)].split(counts) for level in levels]
                rows = [[row for row in level for _ in range(expand_size)] for level in rows]
                images = LlavaVrImageFeatures(pooler_output=rows[0], deepstack_features=rows[1:] or None)
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **model_kwargs)
        return ids, kwargs if images is None else {**kwargs, "mm_encoder_outputs": {"image": images}}

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        chunked = generation_config.prefill_chunk_size is not None and "mm_encoder_outputs" in model_kwargs
        if chunked and version.parse(transformers.__version__) < version.parse("5.23"):
            raise ValueError("prefill_chunk_size with images needs transformers 5.23 or newer.")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, *args, inputs_embeds: torch.Tensor | None = None, is_first_iteration: bool = False, **kwargs
    ) -> dict[str, Any]:  # `inputs_embeds` is named, as it tells `generate` that embeddings are taken
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["mm_encoder_outputs"] = {"image": None}
        return inputs


__all__ = ["LlavaVrForConditionalGeneration", "LlavaVrModel", "LlavaVrPreTrainedModel"]
