"""Vision tokens and their memory in an engine that cuts prompts as it likes: packed as one row, and split again."""

from collections.abc import Iterable, Sequence

import torch

from llava_vr.modeling_llava_vr import LlavaVrImageFeatures, LlavaVrModel


def pack_rows(features: LlavaVrImageFeatures) -> list[torch.Tensor]:
    """One tensor `(tokens, hidden_size + width)` an image: each vision token and, after it, its memory row.

    An engine stores, caches and slices such rows without a thought of their width.
    """
    if features.deepstack_features is None:
        return list(features.pooler_output)
    return [torch.cat(image, dim=-1) for image in zip(features.pooler_output, features.deepstack_features[0])]


class StepMemory:
    """The memory of one step's vision tokens, and whether every module has asked for it.

    A step holds any tokens of any prompts. The engine calls `begin`, then its decoder, whose hooks come to
    `look_again`, then `end`.

    Args:
        keys: of the modules that this process runs.
    """

    def __init__(self, model: LlavaVrModel, keys: Iterable[str]):
        self.model, self.keys = model, frozenset(keys)
        self._modules_look_again = model.vision_remember.look_again
        self._clear()

    def begin(self, packed: Sequence[torch.Tensor], is_image: torch.Tensor | None) -> list[torch.Tensor]:
        """The vision tokens of `packed`; their memory is kept for the step.

        Args:
            packed: pieces `(tokens, hidden_size + width)` of what `pack_rows` made; widths may differ.
            is_image: bool `(tokens of the step,)`, where they go.

        Raises:
            RuntimeError: the step before has not ended: its modules did not run.
        """
        if self.memory is not None:
            self._fail(self.keys)
        width = self.model.config.text_config.hidden_size
        tokens, rows = [piece[:, :width] for piece in packed], [piece[:, width:] for piece in packed]
        if rows and self.keys:
            memory = self.model.join_memory(rows, rows[0])
            if memory.shape[1]:  # else each patch is a token, and there is nothing to look at again
                self.memory, self.index = memory, is_image.nonzero().squeeze(1).to(memory.device)
        return tokens

    def look_again(self, key: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states `(1, tokens of the step, hidden_size)` after the module of this key."""
        self.asked.add(key)
        if self.memory is None:
            return hidden_states
        return self._modules_look_again(key, hidden_states, vision_memory=self.memory, vision_index=self.index)

    def end(self):
        """
        Raises:
            RuntimeError: a module did not run in this step.
        """
        missing = self.keys - self.asked
        if missing:
            self._fail(missing)
        self._clear()

    def _clear(self):
        self.memory, self.index, self.asked = None, None, set()

    def _fail(self, keys: Iterable[str]):
        tokens = 0 if self.memory is None else len(self.memory)
        self._clear()
        raise RuntimeError(
            f"The Vision Remember modules after decoder layers {sorted(map(int, keys))} did not run in a step with "
            f"{tokens} vision tokens, so its answers would be wrong. Full CUDA graphs do that: use PIECEWISE."
        )
