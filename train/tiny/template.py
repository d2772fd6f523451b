"""iv3-tiny's chat template: Qwen's, but a tool is a line and not its JSON schema, which would be most of a prompt."""

from __future__ import annotations

from ivcore.chat_template import QWEN_TEMPLATE

_LINE = '{{ "\\n" ~ tool | tojson }}'
_SHORT = '{{ "\\n" ~ tool.function.name ~ "(" ~ tool.function.parameters.properties | join(", ") ~ ")" }}'


def terse_template() -> str:
    """The template with terse tools."""
    assert QWEN_TEMPLATE.count(_LINE) == 1, "the Qwen form prints a tool in another way now"
    return QWEN_TEMPLATE.replace(_LINE, _SHORT)
