"""Chat templates against transformers, and what a template or a request may not do."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest

from ridgeline.core.errors import CheckpointError, InvalidArgument
from ridgeline.text.chat import ChatTemplate
from ridgeline.text.tokenizer import Tokenizer

# Small templates of the shapes in use, written for these tests.
CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
{% endif %}
<|im_start|>{{ message['role'] }}
{% if message.role == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}
{%- else %}{{ message['content'] }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if pad_token is defined %}{{ pad_token }}{% endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content | trim %}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none and tools %}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}
{%- endif %}
{{- ns.system }}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant!') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}{% endfor %}"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&amp; {{ 7 * 7 }}</b> 你好"}],
    [
        {"role": "user", "content": "  one "},
        {"role": "assistant", "content": "two\n"},
        {"role": "user", "content": "three"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é> 'quoted'", "parameters": {}}}]


@pytest.fixture(scope="module")
def theirs(byte_level_directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(byte_level_directory)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompted", [True, False])
def test_equals_transformers(theirs: Any, source: str, conversation: list[dict[str, Any]], prompted: bool) -> None:
    template = ChatTemplate(source, "<|begin|>", "<|end|>")
    for tools in (None, TOOLS):
        options: dict[str, Any] = {
            "add_generation_prompt": prompted,
            "tools": tools,
            "enable_thinking": False,
        }
        refused = ""
        try:
            expected = theirs.apply_chat_template(conversation, chat_template=source, tokenize=False, **options)
        except jinja2.TemplateError as error:
            refused = str(error)
        if refused:
            with pytest.raises(InvalidArgument, match=f"messages.*{refused}"):
                template.render(conversation, **options)
        else:
            assert template.render(conversation, **options) == expected


def test_the_template_of_a_tokenizer(byte_level: Tokenizer) -> None:
    assert ChatTemplate.of(byte_level) is None
    with_template = Tokenizer(byte_level._codec, "{{ bos_token }}|{{ messages[0].content }}|{{ eos_token }}")
    template = ChatTemplate.of(with_template)
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]) == "<|begin|>|x|<|end|>"


def test_content_parts_are_joined() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "a\nb"


def test_content_may_be_missing_beside_tool_calls() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].name }}{{ messages[0].content is none }}")
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert template.render([message]) == "fTrue"


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [],
        None,
        ["hello"],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": "half \ud800"}],
    ],
)
def test_messages_of_another_form(messages: Any) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ChatTemplate("{{ messages[0].content }}").render(messages)
    assert refusal.value.parameter == "messages"


def test_tools_and_variables_are_checked() -> None:
    template = ChatTemplate("{{ bos_token }}{{ level }}", "<s>")
    chat = [{"role": "user", "content": "x"}]
    assert template.render(chat, level=3, unused=[1]) == "<s>3"
    with pytest.raises(InvalidArgument, match="tools"):
        template.render(chat, tools=["f"])  # type: ignore[list-item]
    for name in ("bos_token", "messages", "self", "raise_exception"):
        with pytest.raises(InvalidArgument, match="chat_template_kwargs"):
            template.render(chat, **{name: "x"})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__.os }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
        "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
        "{% for x in range(10000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ undefined_thing + 'x' }}",
        "{% include 'other' %}",
    ],
)
def test_what_a_template_may_not_do(source: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(InvalidArgument) as refusal:
        template.render([{"role": "user", "content": "x"}])
    assert refusal.value.parameter == "messages"


def test_messages_are_data_and_never_template_code() -> None:
    chat = [{"role": "user", "content": "{{ ''.__class__ }}{% raw %}"}]
    assert ChatTemplate("{{ messages[0].content }}").render(chat) == chat[0]["content"]


def test_the_size_of_the_text_is_limited() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", max_characters=100)
    assert len(template.render([{"role": "user", "content": "x" * 100}])) == 100
    with pytest.raises(InvalidArgument, match="100 characters"):
        template.render([{"role": "user", "content": "x" * 50}] * 3)


def test_a_broken_template_is_the_checkpoints_fault() -> None:
    for source in ("{% if %}", "{{ messages | nosuchfilter }}", "{% nosuchtag %}"):
        with pytest.raises(CheckpointError, match="line 1"):
            ChatTemplate(source)


def test_the_date_comes_from_the_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2025, 3, 4))
    assert template.render([{"role": "user", "content": "x"}]) == "04 Mar 2025"
