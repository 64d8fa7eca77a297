"""From a request to what the model takes: the processor's own pixels and counts, and refusals with a reason."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import aiohttp
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageSize, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.renderers.hf import HfRenderer
from vllm.transformers_utils.processor import cached_get_processor


DOWNSAMPLE = "projector_downsample"
UNREADABLE = (OSError, RuntimeError, aiohttp.ClientError, Image.DecompressionBombError)


class LlavaVrProcessingInfo(BaseProcessingInfo):
    def get_hf_processor(self, **kwargs: object):
        """The folder's own, as it is: what a request asks for are arguments of its calls and no fields."""
        config = self.ctx.model_config
        return cached_get_processor(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        return {"image": self.count_tokens(self.largest_image_size)}

    @property
    def smallest_downsample(self) -> int:
        return min(self.get_hf_config().downsamples)

    @cached_property
    def largest_image_size(self) -> ImageSize:
        """The size of an image with the most tokens: it fills a tiling or, where much is resampled, a part of one."""
        layout = self.get_hf_processor().image_layout
        sizes = {ImageSize(width, height) for height, width in layout.pinpoints or [(layout.tile_size,) * 2]}
        if layout.max_tiles:
            step = layout.tile_size // layout.grid_size * self.smallest_downsample  # pixels of a token
            for width, height in list(sizes):
                sizes |= {ImageSize(part, height) for part in range(step, width, step)}
                sizes |= {ImageSize(width, part) for part in range(step, height, step)}
        return max(sorted(sizes), key=self.count_tokens)

    def count_tokens(self, size: ImageSize) -> int:
        """Tokens of an image of this size, at the smallest s of the model's choices."""
        counts = self.get_hf_processor()._get_num_multimodal_tokens(
            image_sizes=[(size.height, size.width)], projector_downsample=self.smallest_downsample
        )
        return counts.num_image_tokens[0]


class LlavaVrDummyInputs(BaseDummyInputsBuilder[LlavaVrProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict:
        width, height = self.info.largest_image_size
        images = self._get_dummy_images(
            width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
        )
        return {"image": images}


class LlavaVrMultiModalProcessor(BaseMultiModalProcessor[LlavaVrProcessingInfo]):
    def get_dummy_inputs(self, *args, **kwargs):
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {DOWNSAMPLE: self.info.smallest_downsample}
        return inputs

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        try:
            return super()._call_hf_processor(hf_data, hf_kwargs)
        except ValueError as error:  # vLLM's text is of the call, the processor's of what is wrong
            raise VLLMValidationError(str(error.__cause__ or error)) from error

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        """Cuts each image to its own tiles: its neighbours in this call are not those of its next use from a cache."""
        pixels = processed_data.get("pixel_values")
        if pixels is not None and pixels.ndim == 5:
            layout, sizes = self.info.get_hf_processor().image_layout, processed_data["image_sizes"].tolist()
            processed_data["pixel_values"] = [
                image[: layout.num_tiles(size)].contiguous() for image, size in zip(pixels, sizes)
            ]
        return processed_data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "image_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_downsamples": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor()

        def placeholders(index: int) -> list[int]:
            image = out_mm_kwargs["image"][index].get_data()
            downsample = int(image.get("image_downsamples", processor.projector_downsample))
            count = processor.image_layout.num_tokens(image["image_sizes"].tolist(), downsample)
            return [processor.image_token_id] * count

        return [PromptReplacement("image", target=[processor.image_token_id], replacement=placeholders)]


class LlavaVrRenderer(HfRenderer):
    """vLLM's own, with two rules of the processor: one placeholder for each image, and what begins a text."""

    def render_messages(self, *args, **kwargs):
        conversation, prompt = super().render_messages(*args, **kwargs)
        return conversation, self._begin(prompt)

    async def render_messages_async(self, *args, **kwargs):
        try:
            conversation, prompt = await super().render_messages_async(*args, **kwargs)
        except UNREADABLE as error:  # vLLM takes it for a fault of its own
            raise VLLMValidationError(f"An image cannot be read: {error or type(error).__name__}") from error
        return conversation, self._begin(prompt)

    def _begin(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Writes the token that the tokenizer puts before a text, where the chat template does not."""
        tokenizer = self.get_tokenizer()
        bos, text = tokenizer.bos_token, prompt.get("prompt")
        if bos and text is not None and not text.startswith(bos):
            if tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
                prompt["prompt"] = bos + text
        return prompt

    def tokenize_prompt(self, *args, **kwargs):
        return self._check_placeholders(super().tokenize_prompt(*args, **kwargs))

    async def tokenize_prompt_async(self, *args, **kwargs):
        return self._check_placeholders(await super().tokenize_prompt_async(*args, **kwargs))

    def _process_multimodal(self, prompt, mm_data, mm_uuids, mm_processor_kwargs, *args, **kwargs):
        self._check_images(prompt, mm_data, mm_processor_kwargs or {})
        return super()._process_multimodal(prompt, mm_data, mm_uuids, mm_processor_kwargs, *args, **kwargs)

    def _check_placeholders(self, prompt: dict[str, Any]) -> dict[str, Any]:
        data, token_id = prompt.get("multi_modal_data"), self.model_config.hf_config.image_token_id
        items = self.get_mm_processor().info.parse_mm_data(data, validate=False) if data else {}
        images, found = len(items.get("image", ())), list(prompt.get("prompt_token_ids", ())).count(token_id)
        if found != images:
            token = self.get_tokenizer().convert_ids_to_tokens(token_id)
            raise VLLMValidationError(
                f"The prompt has {found} {token} but {images} images: one for each is needed. Send an image as a part "
                f"of its message, where the chat template writes its {token}, and do not write {token} in a text."
            )
        return prompt

    def _check_images(self, prompt: list[int], mm_data: dict[str, Any], options: dict[str, Any]):
        """What vLLM would refuse only after it has cached the images, some of which its engine would then miss."""
        info = self.get_mm_processor().info
        images, options = info.parse_mm_data(mm_data)["image"], info.ctx.get_merged_mm_kwargs(options)
        unknown, downsample = sorted(set(options) - {DOWNSAMPLE}), options.get(DOWNSAMPLE)
        if unknown:
            raise VLLMValidationError(f"mm_processor_kwargs has {unknown}; LLaVA-VR takes {DOWNSAMPLE} alone.")
        if isinstance(downsample, list):  # images are cached one by one
            raise VLLMValidationError(f"{DOWNSAMPLE} must be one number for all images, found {downsample}.")
        if any(image is None for image in images):  # the caller names one that is cached
            return
        sizes = [images.get_image_size(i)[::-1] for i in range(len(images))]
        try:
            counts = info.get_hf_processor()._get_num_multimodal_tokens(sizes, downsample).num_image_tokens
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        length, limit = len(prompt) - len(images) + sum(counts), self.model_config.max_model_len
        if length >= limit:
            raise VLLMValidationError(
                f"The prompt has {length} tokens, {sum(counts)} of them of its {len(images)} images, but with the "
                f"answer at most {limit} are possible (max_model_len): shorten it, or send fewer or smaller images."
            )
