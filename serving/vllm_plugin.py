"""LLaVA-VR in vLLM: its transformers backend, with the memory of the vision tokens carried beside them.

The tower, the projector, the modules and the decoder's code are the package's own; vLLM replaces the decoder's layers.
An image's encoder output has rows `[vision token | memory row]`, so whatever vLLM does to it (cache it, cut it at any
token, batch it) it does to both. `embed_input_ids` splits the rows of a step. After each layer of `remember_layers` the
hook calls an operator that no compiler looks into, which hands the module the memory of this step.
"""
# ruff: noqa: E402

import re
from functools import partial

import torch
import vllm

from . import check_vllm_version


check_vllm_version(vllm.__version__)  # before the imports that another version may not have

from torch.nn.utils.rnn import pad_sequence
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import direct_register_custom_op

from llava_vr.modeling_llava_vr import scale_logits

from .rows import StepMemory, pack_rows
from .vllm_inputs import LlavaVrDummyInputs, LlavaVrMultiModalProcessor, LlavaVrProcessingInfo


OPERATOR = "llava_vr_look_again"
WHOLE = ("vision_tower", "multi_modal_projector", "vision_remember")  # the package's own modules on every rank
# vLLM knows an adapter's targets by their last names and would drop a tower's q_proj: this renames it, to be refused
REFUSED_ADAPTER = {re.compile(rf"^(.*\b(?:{'|'.join(WHOLE)})\..+)(\.lora_[AB]\.weight)$"): r"\1 (not in the decoder)\2"}


@eager_break_during_capture
def _look_again(hidden_states: torch.Tensor, name: str) -> None:
    """Changes the hidden states `(1, tokens, hidden_size)` at the step's vision tokens."""
    get_forward_context().no_compile_layers[name](hidden_states)


def _look_again_fake(hidden_states: torch.Tensor, name: str) -> None:
    return


direct_register_custom_op(
    OPERATOR,
    _look_again,
    mutates_args=["hidden_states"],
    fake_impl=_look_again_fake,
    tags=(torch.Tag.cudagraph_unsafe,),
)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaVrMultiModalProcessor, info=LlavaVrProcessingInfo, dummy_inputs=LlavaVrDummyInputs
)
class LlavaVrForVllm(TransformersMultiModalForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_regex=REFUSED_ADAPTER)
        self.logits_processor = LogitsProcessor(self.text_config.vocab_size)  # `compute_logits` scales them
        self.step = StepMemory(self.model, self.model.vision_remember if self.pp_group.is_first_rank else ())
        self._insert_modules()

    def _get_tie_word_embeddings(self) -> bool:
        """As transformers decides it; the base also believes the decoder's own configuration."""
        return self.config.tie_word_embeddings

    def recursive_replace(self):
        """Gives the decoder vLLM's layers: sharded, quantized, open to LoRA. All else stays whole on every rank."""
        apart = {name: self.model._modules.pop(name) for name in WHOLE}
        super().recursive_replace()
        self.model._modules.update(apart)

    def _insert_modules(self):
        """Lets the hooks call the operator.

        Raises:
            RuntimeError: a layer has lost its hook.
        """
        modules, compilation = self.model.vision_remember, self.compilation_config
        for key in self.step.keys:
            hooks = self.model.language_model.layers[int(key)]._forward_hooks.values()
            if not any(getattr(hook, "modules", None) is modules for hook in hooks):
                raise RuntimeError(f"Decoder layer {key} has lost its Vision Remember module: vLLM has replaced it.")
            compilation.static_forward_context[f"vision_remember.{key}"] = partial(self._look_again, key)
        modules.look_again = self._call_operator
        if compilation.splitting_ops:
            compilation.splitting_ops.append(f"vllm::{OPERATOR}")

    @staticmethod
    def _call_operator(key: str, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """In place of `RememberModules.look_again`."""
        torch.ops.vllm.llava_vr_look_again(hidden_states, f"vision_remember.{key}")
        return hidden_states

    def _look_again(self, key: str, hidden_states: torch.Tensor):
        changed = self.step.look_again(key, hidden_states)
        if changed is not hidden_states:
            hidden_states.copy_(changed)

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | None = None,
        image_downsamples: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        if pixel_values is None:
            return []
        if not isinstance(pixel_values, torch.Tensor):  # images with different numbers of tiles
            pixel_values = pad_sequence(pixel_values, batch_first=True)
        return pack_rows(self.model.get_image_features(pixel_values, image_sizes, image_downsamples, return_dict=True))

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: list[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens = self.step.begin(multimodal_embeddings or [], is_multimodal)
        return super().embed_input_ids(input_ids, tokens, is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        # the base's drops arguments; this one says that no placeholder is to be looked for
        outputs = Base.forward(
            self, input_ids, positions, intermediate_tensors, inputs_embeds, mm_encoder_outputs={"image": None}
        )
        self.step.end()
        return outputs

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)
        if logits is None:
            return None
        logits = scale_logits(logits, self.text_config)
        logits[..., self.config.image_token_id] = float("-inf")  # as in `generate`: no image could follow it
        return logits
