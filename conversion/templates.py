"""Chat templates: the prompts that the research models were trained on, as Jinja with generation markers."""

from transformers import PreTrainedTokenizerBase


PRELUDE = """{%- macro render(content, image='IMAGE') -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}{{- image if part.type == 'image' else part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = 'SYSTEM' -%}
{%- if messages[0].role == 'system' -%}
{%- set system = render(messages[0].content) -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
"""
TURNS = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
ASSISTANT
{%- else -%}
USER
{%- endif -%}
{%- endfor -%}
"""
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human\\'s questions."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
HONEYBEE = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user\\'s questions."
)
INSTRUCTION = """{{- 'BOS[INST] ' if not loop.first else '[INST] ' -}}
{%- if loop.first and system -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
{{- render(message.content) + ' [/INST]' -}}"""
ANSWER = "{{- PREFIX -}}{%- generation -%}{{- OPEN + render(message.content) + END -}}{%- endgeneration -%}"


def _template(image: str, system: str, before: str, user: str, prefix: str, answer: tuple[str, str], after="") -> str:
    """One style. Jinja texts: `before` the first turn, `user`; what precedes an answer (which also asks for one), the
    answer's own beginning and end, and what follows it."""
    assistant = ANSWER.replace("PREFIX", prefix).replace("OPEN", answer[0]).replace("END", answer[1])
    turns = TURNS.replace("ASSISTANT", assistant + (f"\n{{{{- {after} -}}}}" if after else "")).replace("USER", user)
    ask = f"{{%- if add_generation_prompt -%}}{{{{- {prefix} -}}}}{{%- endif -%}}\n"
    return PRELUDE.replace("IMAGE", image).replace("SYSTEM", system) + before + turns + ask


def _chatml(system: str, gap: str) -> str:
    end = f"'<|im_end|>{gap}'"
    return _template(
        "<image>\\n",
        system,
        f"{{{{- '<|im_start|>system\\n' + system + {end} -}}}}\n",
        f"{{{{- '<|im_start|>user\\n' + render(message.content) + {end} -}}}}",
        "'<|im_start|>assistant\\n'",
        ("''", "'<|im_end|>'"),
        f"'{gap}'" if gap else "",
    )


def _llama_2(system: str, bos: str) -> str:
    user = INSTRUCTION.replace("'BOS[INST] '", "bos_token + '[INST] '" if bos else "'[INST] '")
    return _template("<image>\\n", system, "", user, "''", ("' '", "' ' + eos_token"))


STYLES = {
    "vicuna_v1": _template(
        "<image>\\n",
        VICUNA,
        "{{- system + ' ' -}}\n",
        "{{- 'USER: ' + render(message.content) + ' ' -}}",
        "'ASSISTANT:'",
        ("' '", "eos_token"),
    ),
    "llava_llama_2": _llama_2(VISION, "<s>"),
    "mistral_instruct": _llama_2("", ""),
    "chatml_direct": _chatml("Answer the questions.", ""),
    "qwen": _chatml("You are a helpful assistant.", "\\n"),
    "llama_3": _template(
        "<image>\\n",
        VISION,
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' -}}\n",
        "{{- '<|start_header_id|>user<|end_header_id|>\\n\\n' + render(message.content) + '<|eot_id|>' -}}",
        "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
        ("''", "'<|eot_id|>'"),
    ),
    "honeybee": _template(
        "Human: <image>\\n",
        HONEYBEE,
        "{{- system + '\\n' -}}\n",
        "{%- if message.content is string -%}{{- 'Human: ' + message.content + '\\n' -}}\n"
        "{%- else -%}{%- for part in message.content -%}\n"
        "{{- 'Human: ' + ('<image>' if part.type == 'image' else part.text) + '\\n' -}}\n"
        "{%- endfor -%}{%- endif -%}",
        "'AI: '",
        ("''", "eos_token"),
        "'\\n'",
    ),
    "plain": _template("<image>", "", "", "{{- render(message.content) -}}", "''", ("''", "'\\n'")),
}


def choose_style(model_type: str, hint: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation style of a research model, by its decoder, the words of its names and its special tokens."""
    vocabulary = tokenizer.get_vocab()
    if model_type == "mistral":
        return "mistral_instruct"
    if "<|start_header_id|>" in vocabulary:
        return "llama_3"
    if "<|im_start|>" in vocabulary:
        return "qwen" if model_type != "llama" else "chatml_direct"
    return "llava_llama_2" if "llama-2" in hint.lower().replace("_", "-") else "vicuna_v1"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the tokenizer's chat template ends an answer; None where it ends with none."""
    answer = "An answer."
    for content in ([{"type": "text", "text": answer}], answer):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # a template may refuse either kind of content, by an error of its own
            continue
        if answer in text:
            ids = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
            return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)
    return None
