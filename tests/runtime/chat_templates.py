"""Small chat templates that behave like those of well-known families, and a tokenizer of bytes for them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (  # SmolLM2's and Qwen2's: a default system message where there is none
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_2 = (  # no system turn, turns alternate, contents are trimmed
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('There is no system turn') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
QWEN_3 = (  # reasoning that can be switched off, tools, and the reasoning of earlier turns left out
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% set last = namespace(question=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > last.question %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
CALLS_TOOLS = (  # DeepSeek's way: a message that only calls tools is one without content
    "{% for m in messages %}{{ '<|im_start|>' + (m.name if m.name else m.role) + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ c.id + ' ' + c.function.name }}{% for key, value in c.function.arguments.items() %}"
    "{{ ' ' + key + '=' + value }}{% endfor %}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% if m.tool_call_id %}{{ ' for ' + m.tool_call_id }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
LLAMA_3 = (  # contents are trimmed, and text of the template's own stands in the system turn
    "{{ bos_token }}{% set has_system = messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n\nToday: 1 May\n\n' + (messages[0].content | trim if has_system else '') + '<|im_end|>' }}"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
R1 = (  # reasoning is left out of responses, and begun for the next one
    "{{ bos_token }}{% for m in messages %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + ('<|im_end|>' if m.role == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
TWICE = "{% for m in messages %}{{ m.role + ': ' + m.content + ' (' + m.content + ')\n' }}{% endfor %}"
SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte and each of SPECIAL; its BOS token is the first of these."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0])
    made.chat_template = template
    return made
