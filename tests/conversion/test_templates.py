"""Chat templates of each conversation style."""

import copy

import pytest

from llava_vr.conversion import templates


STYLES = {
    "vicuna_v1": "SYSTEM USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "llava_llama_2": "[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
    "mistral_instruct": "[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s>[INST] Sure? [/INST]",
    "chatml_direct": "<|im_start|>system\nSYSTEM<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
    "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
    "qwen": "<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    "llama_3": "<|start_header_id|>system<|end_header_id|>\n\nSYSTEM<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "honeybee": "SYSTEM\nHuman: <image>\nHuman: What?\nAI: A cat.</s>\nHuman: Sure?\nAI: ",
    "plain": "<image>What?A cat.\nSure?",
}
ANSWERS = {"vicuna_v1": " A cat.</s>", "llava_llama_2": " A cat. </s>", "mistral_instruct": " A cat. </s>"}
ANSWERS |= {"chatml_direct": "A cat.<|im_end|>", "qwen": "A cat.<|im_end|>", "llama_3": "A cat.<|eot_id|>"}
ANSWERS |= {"honeybee": "A cat.</s>", "plain": "A cat.\n"}


@pytest.mark.parametrize("style", STYLES)
def test_chat_template_of_each_style(style, tokenizer):
    assert set(STYLES) == set(templates.STYLES)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    template = templates.STYLES[style]
    asked = [{"role": "system", "content": "SYSTEM"}, *turns]
    prompt = tokenizer.apply_chat_template(asked, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert prompt == STYLES[style]
    unasked = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert len(unasked) > len(prompt) or style in ("mistral_instruct", "plain", "qwen")
    encoded = tokenizer.apply_chat_template(
        asked, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = [i for i, own in zip(encoded["input_ids"], encoded["assistant_masks"]) if own]
    assert tokenizer.decode(answer) == ANSWERS[style]


def test_style_follows_the_source(tokenizer):
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(["<|im_start|>"])
    llama_3 = copy.deepcopy(tokenizer)
    llama_3.add_tokens(["<|start_header_id|>"])
    choose = templates.choose_style
    assert choose("llama", "llava-v1.5-7b", tokenizer) == "vicuna_v1"
    assert choose("llama", "llava-llama-2-13b-chat", tokenizer) == "llava_llama_2"
    assert choose("llama", "llava-v1.6-34b", extended) == "chatml_direct"
    assert choose("llama", "llama3-llava-next-8b", llama_3) == "llama_3"
    assert choose("mistral", "llava-v1.6-mistral-7b", tokenizer) == "mistral_instruct"
    assert choose("qwen2", "llava-onevision-qwen2-0.5b-ov", extended) == "qwen"
