"""Checks of `generate()` on the tiny LlavaVr (the sdist does not ship transformers' GenerationTesterMixin)."""

import copy
import unittest

import torch
from llava_vr_tester import LlavaVrTester
from transformers import set_seed


NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class LlavaVrGenerationTest(unittest.TestCase):
    def setUp(self):
        tester = LlavaVrTester(self)
        config, self.inputs = tester.prepare_config_and_inputs_for_common()
        set_seed(0)
        self.model = tester.conditional_generation_class(config).eval()
        self.tester = tester

    def generate(self, inputs=None, **kwargs):
        torch.manual_seed(0)
        # a random model may write a placeholder, for which there is no image
        options = {**NEW, "suppress_tokens": [self.tester.image_token_id], **kwargs}
        return self.model.generate(**copy.deepcopy(inputs or self.inputs), **options)

    def new_tokens(self, output, inputs=None):
        return output[:, (inputs or self.inputs)["input_ids"].shape[1] :]

    def test_cache_changes_nothing(self):
        with_cache, without = self.generate(use_cache=True), self.generate(use_cache=False)
        self.assertEqual(with_cache.tolist(), without.tolist())

    def test_cached_logits_are_the_full_forwards(self):
        out = self.generate(output_logits=True, return_dict_in_generate=True)
        full = {**self.inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        with torch.no_grad():
            logits = self.model(**full).logits
        start = self.inputs["input_ids"].shape[1] - 1
        torch.testing.assert_close(
            torch.stack(out.logits, 1), logits[:, start : start + len(out.logits)].float(), atol=1e-4, rtol=1e-4
        )

    def test_a_row_alone_gives_what_it_gives_in_a_batch(self):
        batch = self.new_tokens(self.generate())
        for row in range(len(batch)):
            alone = {key: value[row : row + 1] for key, value in self.inputs.items()}
            self.assertEqual(self.new_tokens(self.generate(alone), alone)[0].tolist(), batch[row].tolist())

    def test_left_padding_changes_nothing(self):
        padded = copy.deepcopy(self.inputs)
        rows = len(padded["input_ids"])
        padded["input_ids"] = torch.cat([torch.zeros(rows, 5, dtype=torch.long), padded["input_ids"]], 1)
        padded["attention_mask"] = torch.cat([torch.zeros(rows, 5, dtype=torch.long), padded["attention_mask"]], 1)
        self.assertEqual(
            self.new_tokens(self.generate(padded), padded).tolist(), self.new_tokens(self.generate()).tolist()
        )

    def test_beam_search(self):
        one = self.generate(num_beams=1)
        beams = self.generate(num_beams=3, num_return_sequences=2)
        self.assertEqual(beams.shape, (2 * one.shape[0], one.shape[1]))

    def test_sampling(self):
        out = self.generate(do_sample=True, num_return_sequences=2)
        self.assertEqual(out.shape[0], 2 * self.tester.batch_size)

    def test_static_cache(self):
        self.assertEqual(self.generate(cache_implementation="static").tolist(), self.generate().tolist())

    def test_text_only(self):
        text = {"input_ids": self.inputs["input_ids"].clone().clamp(max=20)}
        text["input_ids"][text["input_ids"] == self.tester.image_token_id] = 1
        text["attention_mask"] = torch.ones_like(text["input_ids"])
        self.assertEqual(self.generate(text).tolist(), self.generate(text, use_cache=False).tolist())

    def test_image_matters(self):
        other = copy.deepcopy(self.inputs)
        other["pixel_values"] = torch.flip(other["pixel_values"], dims=(-1,)) + 1.0
        with torch.no_grad():
            a, b = self.model(**self.inputs).logits, self.model(**other).logits
        self.assertFalse(torch.allclose(a[:, -1], b[:, -1]))

    def test_images_of_different_sizes_in_a_batch(self):
        """Rows with different grids: as many placeholders as each image has features, padded on the left."""
        config = self.model.config
        sizes = [tuple(size) for size in config.image_grid_pinpoints[:3]]
        tile = config.vision_config.image_size
        pixel_values = torch.zeros(len(sizes), 1 + max(h * w // tile**2 for h, w in sizes), 3, tile, tile)
        set_seed(1)
        for row, (h, w) in enumerate(sizes):
            pixel_values[row, : 1 + h * w // tile**2] = torch.rand(1 + h * w // tile**2, 3, tile, tile)
        image_sizes = torch.tensor(sizes)
        with torch.no_grad():
            features = self.model.get_image_features(
                pixel_values=pixel_values, image_sizes=image_sizes, return_dict=True
            ).pooler_output
        rows = [[1] + [self.tester.image_token_id] * len(f) + [5, 6, 7] for f in features]
        width = max(map(len, rows))
        batch = {
            "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
        }
        together = self.new_tokens(self.generate(batch), batch)
        for row in range(len(sizes)):
            alone = {
                "input_ids": torch.tensor([rows[row]]),
                "attention_mask": torch.ones(1, len(rows[row]), dtype=torch.long),
                "pixel_values": pixel_values[row : row + 1],
                "image_sizes": image_sizes[row : row + 1],
            }
            self.assertEqual(self.new_tokens(self.generate(alone), alone)[0].tolist(), together[row].tolist())
