"""What answers look like, for readers of the OpenAPI document; tests hold answers against it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

_Count = Annotated[int, Field(ge=0)]


class OpenAIErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The envelope of errors at all addresses but Anthropic's."""

    error: OpenAIErrorFields


class AnthropicErrorFields(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """The envelope of errors under /v1/messages."""

    type: Literal["error"]
    error: AnthropicErrorFields
    request_id: str | None


class TokenDetails(BaseModel):
    """Tokens that were found in the prefix cache."""

    cached_tokens: _Count


class CompletionTokenDetails(BaseModel):
    """Tokens of thoughts."""

    reasoning_tokens: _Count


class OpenAIUsage(BaseModel):
    """Tokens in and out."""

    prompt_tokens: _Count
    completion_tokens: _Count
    total_tokens: _Count
    prompt_tokens_details: TokenDetails
    completion_tokens_details: CompletionTokenDetails


class CalledFunction(BaseModel):
    """What is called, and with what."""

    name: str
    arguments: str


class ChatToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCall] | None = None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: _Count
    message: ChatAnswer
    logprobs: dict[str, object] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """An answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: OpenAIUsage
    timings: dict[str, float]


class CompletionChoice(BaseModel):
    """One of n answers."""

    index: _Count
    text: str
    logprobs: dict[str, object] | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """An answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: OpenAIUsage
    timings: dict[str, float]


class ResponseInputDetails(BaseModel):
    """Tokens that were found in the prefix cache."""

    cached_tokens: _Count


class ResponseUsage(BaseModel):
    """Tokens in and out."""

    input_tokens: _Count
    input_tokens_details: ResponseInputDetails
    output_tokens: _Count
    output_tokens_details: CompletionTokenDetails
    total_tokens: _Count


class ResponseAnswer(BaseModel):
    """An answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    error: None
    incomplete_details: dict[str, str] | None
    parallel_tool_calls: bool
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    usage: ResponseUsage
    timings: dict[str, float]


class Model(BaseModel):
    """The model, in the words of both protocols."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class Models(BaseModel):
    """All models: one."""

    object: Literal["list"]
    data: list[Model]
    has_more: bool
    first_id: str
    last_id: str


class Status(BaseModel):
    """How the server is."""

    status: str


class Version(BaseModel):
    """What the server is."""

    version: str


class TextBlock(BaseModel):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(BaseModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


class AnthropicUsage(BaseModel):
    """Tokens in and out; those found in the cache are not in `input_tokens`."""

    input_tokens: _Count
    output_tokens: _Count
    cache_creation_input_tokens: _Count
    cache_read_input_tokens: _Count


class Message(BaseModel):
    """An answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(BaseModel):
    """An answer of /v1/messages/count_tokens."""

    input_tokens: _Count


class Tokens(BaseModel):
    """An answer of /tokenize."""

    count: _Count
    max_model_len: _Count
    tokens: list[_Count]
    token_strs: list[str] | None


class Text(BaseModel):
    """An answer of /detokenize."""

    prompt: str


class Rendered(BaseModel):
    """An answer of /render."""

    prompt: str
    count: _Count
    tokens: list[_Count]


class TokenizerInfo(BaseModel):
    """An answer of /tokenizer_info."""

    tokenizer_class: str
    vocab_size: _Count
    max_model_len: _Count
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    stop_token_ids: list[_Count]
    chat_template: str | None
