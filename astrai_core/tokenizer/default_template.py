"""How a conversation is written for a model of ours, where its folder does not say otherwise."""

DEFAULT_TEMPLATE = """\
{%- macro check(message) -%}
{%- if message.role not in ["system", "user", "assistant", "tool"] -%}
{{ raise_exception("unknown role " ~ message.role ~ ": use system, user, assistant or tool") }}
{%- endif -%}
{%- if message.content is not string and not message.tool_calls -%}
{{ raise_exception("the content of a message must be a string") }}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- "<|im_start|>system\\n" -}}
{%- if messages[0].role == "system" -%}
{{- check(messages[0]) ~ messages[0].content ~ "\\n\\n" -}}
{%- endif -%}
{{- "# Tools\\n\\nFunctions that can be called:\\n<tools>\\n" -}}
{%- for tool in tools -%}
{{- (tool.function or tool) | tojson ~ "\\n" -}}
{%- endfor -%}
{{- "</tools>\\n\\nA call is written as:\\n<tool_call>\\n" -}}
{{- '{"name": NAME, "arguments": OBJECT}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message.role == "system") -%}
{{- check(message) ~ "<|im_start|>" ~ message.role ~ "\\n" -}}
{%- if message.role == "assistant" -%}
{%- generation -%}
{%- if message.reasoning_content -%}
{{- "<think>\\n" ~ message.reasoning_content ~ "\\n</think>\\n\\n" -}}
{%- elif enable_thinking is defined and not enable_thinking -%}
{{- "<think>\\n\\n</think>\\n\\n" -}}
{%- endif -%}
{{- message.content or "" -}}
{%- for call in message.tool_calls or [] -%}
{%- set arguments = call.function.arguments -%}
{{- "\\n" if message.content or not loop.first -}}
{{- '<tool_call>\\n{"name": ' ~ call.function.name | tojson ~ ', "arguments": ' -}}
{{- (arguments if arguments is string else arguments | tojson) ~ "}\\n</tool_call>" -}}
{%- endfor -%}
{{- "<|im_end|>" -}}
{%- endgeneration -%}
{%- else -%}
{{- message.content ~ "<|im_end|>" -}}
{%- endif -%}
{{- "\\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" -}}
{%- if enable_thinking is defined -%}
{{- "<think>\\n" if enable_thinking else "<think>\\n\\n</think>\\n\\n" -}}
{%- endif -%}
{%- endif -%}
"""
"""Turns of `<|im_start|>role ... <|im_end|>`, calls of tools as Hermes models write them.

Thoughts are written where a message has them, in every turn, so that no later message changes what
an earlier one looks like. `enable_thinking` opens the thoughts of the answer, or closes them.
"""
