"""Small chat templates, written for the tests, that behave like those of the families they are named after.

Covered traits: position of the system prompt, end-of-turn marker, handling of thinking, and text of the generation
prompt.
"""

from __future__ import annotations

_ROLES = "{%- for m in messages -%}"
_END = "{%- endfor -%}"


def _prompted(body: str, prompt: str) -> str:
    return f"{body}{{%- if add_generation_prompt -%}}{{{{ '{prompt}' }}}}{{%- endif -%}}"


CHATML = _prompted(
    _ROLES + "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}" + _END, "<|im_start|>assistant\n"
)
QWEN_2 = (
    "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nYou are a kind helper.<|im_end|>\n' }}{%- endif -%}"
    + CHATML
)
QWEN_3 = _prompted(
    "{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}"
    "{%- set thought = m.reasoning_content or '' -%}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' }}{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{ '<think>\n' ~ thought ~ '\n</think>\n\n' }}{%- endif -%}{{ m.content ~ '<|im_end|>\n' }}{%- endfor -%}",
    "<|im_start|>assistant\n",
)
R1 = _prompted(
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}{{ m.content }}"
    "{%- elif m.role == 'user' -%}{{ '<|User|>' ~ m.content }}"
    "{%- else -%}{{ '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ eos_token }}{%- endif -%}{%- endfor -%}",
    "<|Assistant|><think>\n",
)
LLAMA_3 = _prompted(
    "{{ bos_token }}{%- for m in messages -%}{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' "
    "~ (m.content | trim) ~ '<|eot_id|>' }}{%- endfor -%}",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
DATED = "{{ 'Today: ' ~ strftime_now('%d %b %Y') ~ '\n' }}" + LLAMA_3
MISTRAL = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content ~ '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if m.role == 'user' -%}{{ '[INST] ' }}"
    "{{ (system if loop.index0 >= rest | length - 2 else '') ~ m.content ~ ' [/INST]' }}"
    "{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}{%- endfor -%}"
)
PHI_3 = (
    _ROLES
    + "{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}"
    + _END
    + "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"
)
GLM_4 = _prompted(_ROLES + "{{ '<|' ~ m.role ~ '|>' ~ m.content }}" + _END, "<|assistant|>")
GPT_OSS = _prompted(
    "{%- for m in messages -%}{{ '<|start|>' ~ m.role }}{%- if m.role == 'assistant' -%}"
    "{%- if m.thinking and loop.last -%}{{ '<|channel|>analysis<|message|>' ~ m.thinking }}"
    "{{ '<|end|><|start|>assistant' }}{%- endif -%}"
    "{{ '<|channel|>final' }}{%- endif -%}{{ '<|message|>' ~ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
    "{%- endfor -%}",
    "<|start|>assistant",
)
COMMAND_A = _prompted(
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- set who = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} -%}"
    "{{ '<|START_OF_TURN_TOKEN|><|' ~ who[m.role] ~ '_TOKEN|>' }}{%- if m.role == 'assistant' -%}"
    "{{ '<|START_RESPONSE|>' ~ m.content ~ '<|END_RESPONSE|>' }}{%- else -%}{{ m.content }}{%- endif -%}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{%- endfor -%}",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)
GEMMA_2 = _prompted(
    "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (m.content | trim) "
    "~ '<end_of_turn>\n' }}{%- endfor -%}",
    "<start_of_turn>model\n",
)
VISION = _prompted(
    "{%- for m in messages -%}{{ m.role ~ ': ' }}{%- for part in m.content -%}{%- if part.type == 'text' -%}"
    "{{ part.text }}{%- endif -%}{%- endfor -%}{{ '<end_of_utterance>\n' }}{%- endfor -%}",
    "assistant: ",
)
MARKED = (
    "{%- for m in messages -%}{{ '<|im_start|>' ~ m.role ~ '\n' }}{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{ m.content ~ '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}"
    "{%- else -%}{{ m.content ~ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
)
UNPROMPTED = "{%- for m in messages -%}{{ m.role | upper ~ ': ' ~ m.content ~ eos_token }}{%- endfor -%}"

FAMILIES = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen 2": (QWEN_2, "<|im_end|>"),
    "qwen 3": (QWEN_3, "<|im_end|>"),
    "r1": (R1, "</s>"),
    "llama 3": (LLAMA_3, "<|eot_id|>"),
    "dated": (DATED, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "phi 3": (PHI_3, "<|end|>"),
    "command a": (COMMAND_A, "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma 2": (GEMMA_2, "<end_of_turn>"),
    "vision": (VISION, "<end_of_utterance>"),
    "marked": (MARKED, "<|im_end|>"),
    "unprompted": (UNPROMPTED, "</s>"),
}
"""Templates with the marker that ends an assistant's turn."""

SPECIAL = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|User|>", "<|Assistant|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
    "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>",
)  # fmt: skip
