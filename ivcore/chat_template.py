"""Chat templates: jinja2 in its immutable sandbox, its work bounded; and the Qwen form for checkpoints without one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ivcore.errors import PromptError

# A template is code from a stranger. Turns of its loops and the length of any text it makes are bounded, which stops
# loops in loops and strings that double; single calls of filters are not watched.
MAX_LOOP_TURNS = 1_000_000
MAX_TEXT = 32_000_000

# What Qwen3-VL was trained on, to the character: ChatML turns, placeholders where media stand in a message, and the
# Hermes form of tools.
QWEN_TEMPLATE = r"""
{%- macro parts(content) -%}
    {%- if content is string -%}
        {{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == "image" -%}
                {{ "<|vision_start|><|image_pad|><|vision_end|>" }}
            {%- elif part.type == "video" -%}
                {{ "<|vision_start|><|video_pad|><|vision_end|>" }}
            {%- else -%}
                {{ part.text }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro call_line(call) -%}
    {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
    {{ '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' ~ arguments ~ '}\n</tool_call>' }}
{%- endmacro -%}

{%- set has_system = messages[0].role == "system" -%}
{%- if tools or has_system -%}
    {{ "<|im_start|>system\n" }}
    {%- if has_system -%}
        {{ parts(messages[0].content) ~ ("\n\n" if tools else "") }}
    {%- endif -%}
    {%- if tools -%}
        {{ "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
        {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
        {%- for tool in tools -%}
            {{ "\n" ~ tool | tojson }}
        {%- endfor -%}
        {{ "\n</tools>\n\nFor each function call, return a json object with function name and arguments " }}
        {{- "within <tool_call></tool_call> XML tags:\n" }}
        {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
    {%- endif -%}
    {{ "<|im_end|>\n" }}
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role == "tool" -%}
        {{ "<|im_start|>user" if loop.previtem is undefined or loop.previtem.role != "tool" }}
        {{- "\n<tool_response>\n" ~ parts(message.content) ~ "\n</tool_response>" }}
        {{- "<|im_end|>\n" if loop.nextitem is undefined or loop.nextitem.role != "tool" }}
    {%- elif message.role != "system" -%}
        {{ "<|im_start|>" ~ message.role ~ "\n" ~ parts(message.content) }}
        {%- for call in message.tool_calls or [] -%}
            {{ "\n" if message.content or not loop.first }}
            {{- call_line(call.function or call) }}
        {%- endfor -%}
        {{ "<|im_end|>\n" }}
    {%- endif -%}
{%- endfor -%}
{{ "<|im_start|>assistant\n" if add_generation_prompt }}
"""


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """The prompt that a chat template makes of messages; with Hugging Face's settings, helpers and variables.

    Raises PromptError when the template is not valid jinja, refuses the messages, reaches for what the sandbox forbids
    or does not end within its bounds.
    """
    try:
        sandbox = _Sandbox()
        compiled = sandbox.template_class.from_code(sandbox, _compiled(template), sandbox.make_globals(None))
        return compiled.render(
            **(special_tokens or {}), messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
        )
    except SecurityError as error:
        raise PromptError(
            f"The chat template was stopped: {error}; use a checkpoint whose template you trust."
        ) from None
    # Whatever Python raises while it evaluates an expression of the template is the template's fault.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PromptError(f"The chat template cannot render these messages: {reason}.") from None


@lru_cache(maxsize=16)
def _compiled(template: str) -> CodeType:
    """A template's code, which any sandbox can run: compiling takes longer than rendering."""
    return _Sandbox().compile(template)


class _Sandbox(ImmutableSandboxedEnvironment):
    """One rendering's sandbox: it counts the template's loop turns, so it is not shared."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_bounded
        )
        self._turns = 0
        self.filters["tojson"] = _tojson
        self.filters[_METERED] = self._metered
        self.filters[_BOUNDED] = _bounded
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # jinja2 would print nothing for it and go on.
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and any(isinstance(each, str | list | tuple) for each in (left, right)):
            size, count = (left, right) if isinstance(right, int) else (right, left)
            if len(size) * count > MAX_TEXT:
                raise SecurityError("it repeats a text too often")
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses {operator!r}, which is not needed to build a prompt")
        return _bounded(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        # jinja2 documents this hook; every loop and every `~` is sent through a filter that counts.
        for loop in source.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, _METERED)
        for concat in list(source.find_all(nodes.Concat)):
            concat.nodes = [_filtered(each, _BOUNDED) for each in concat.nodes]
        return super()._generate(source, *args, **kwargs)

    def _metered(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._turns += 1
            if self._turns > MAX_LOOP_TURNS:
                raise SecurityError(f"its loops take more than {MAX_LOOP_TURNS:,} turns")
            yield item


_METERED, _BOUNDED = "metered by the sandbox", "bounded by the sandbox"  # no template can write these names


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT:
        raise SecurityError(f"it makes a text longer than {MAX_TEXT:,} characters")
    return value


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
