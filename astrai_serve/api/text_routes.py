"""Text and tokens without an answer: tokenizing, rendering, counting.

`/tokenize`, `/detokenize` and `/tokenizer_info` speak as vLLM's do, which evaluation harnesses
know. What is tokenized here is what a request would be tokenized to, by the same code.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.api.anthropic import count_tokens
from astrai_serve.api.anthropic_requests import CountTokensRequest
from astrai_serve.api.backend import Engine
from astrai_serve.api.errors import InvalidRequestError, from_validation
from astrai_serve.api.openai_requests import ChatCompletionRequest, check_model, parse_chat
from astrai_serve.api.openapi import answers, body_of
from astrai_serve.api.protocol import JsonResponse, parse_object
from astrai_serve.api.response_models import Rendered, Text, TokenCount, TokenizerInfo, Tokens
from astrai_serve.api.settings import ServerSettings

BodyT = TypeVar("BodyT", bound=BaseModel)


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: a text, or with `messages` a chat's body."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, object]] | None = None
    add_special_tokens: bool | None = None
    """Put the folder's own start (and end) tokens around a text; true if left out."""
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


BODIES = (TokenizeRequest, DetokenizeRequest, CountTokensRequest)


class TextRoutes:
    """Answers all of them.

    Args:
        engine: tells the context.
        tokenizer: the engine's.
        settings: names and defaults.
        limiter: how many bodies are worked on at once beside the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: AutoTokenizer,
        settings: ServerSettings,
        limiter: anyio.CapacityLimiter,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.limiter = limiter

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        for path, work, body, answer in (
            ("/tokenize", self.tokenize, TokenizeRequest, Tokens),
            ("/detokenize", self.detokenize, DetokenizeRequest, Text),
            ("/render", self.render, ChatCompletionRequest, Rendered),
            ("/v1/messages/count_tokens", self.count_tokens, CountTokensRequest, TokenCount),
        ):
            app.add_api_route(
                path,
                self._route(work),
                methods=["POST"],
                name=path[1:],
                description=work.__doc__,
                response_class=JsonResponse,
                openapi_extra=body_of(body),
                responses=answers(path, answer, 404, is_posted=True),
            )
        app.add_api_route(
            "/tokenizer_info", self.tokenizer_info, methods=["GET"], response_class=JsonResponse,
            responses=answers("/tokenizer_info", TokenizerInfo),
        )  # fmt: skip

    def _route(
        self, work: Callable[[dict[str, Any]], Mapping[str, object]]
    ) -> Callable[[Request], Any]:
        async def route(request: Request) -> Response:
            body = await request.body()
            # a long text takes a while, and the event loop has other clients
            answer = await anyio.to_thread.run_sync(
                lambda: work(parse_object(body)), limiter=self.limiter
            )
            return JsonResponse(answer)

        return route

    def tokenize(self, data: dict[str, Any]) -> Mapping[str, object]:
        """Tokens of a text, or of what the template makes of messages."""
        body = self._read(TokenizeRequest, data)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError(
                "prompt or messages, one of them, is required", param="prompt"
            )
        if body.prompt is None:
            ids = self._chat_ids(data)
        else:
            ids = self._encode(body.prompt, body.add_special_tokens is not False)
        return {
            "count": len(ids),
            "max_model_len": self.engine.max_context,
            "tokens": ids,
            "token_strs": [self._name(i) for i in ids] if body.return_token_strs else None,
        }

    def detokenize(self, data: dict[str, Any]) -> Mapping[str, object]:
        """The text of tokens, control tokens by their names."""
        body = self._read(DetokenizeRequest, data)
        return {"prompt": self._decode(body.tokens)}

    def render(self, data: dict[str, Any]) -> Mapping[str, object]:
        """What the template makes of a chat's body: text and tokens, as the model would read it."""
        ids = self._chat_ids(data)
        return {"prompt": self._decode(ids), "count": len(ids), "tokens": ids}

    def count_tokens(self, data: dict[str, Any]) -> Mapping[str, object]:
        """Tokens of the prompt that Anthropic's messages make."""
        engine = self.engine
        return count_tokens(data, self.tokenizer, self.settings.model_name, engine.max_context)

    async def tokenizer_info(self) -> Response:
        """Special tokens and the chat template."""
        tokenizer = self.tokenizer
        roles = ("bos_token", "eos_token", "pad_token", "unk_token")
        template = tokenizer.chat_template
        return JsonResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": tokenizer.vocab_size,
                "max_model_len": self.engine.max_context,
                **{role: tokenizer.special_tokens.get(role) for role in roles},
                "stop_token_ids": sorted(tokenizer.stop_ids),
                "chat_template": None if template is None else template.source,
            }
        )

    def _read(self, kind: type[BodyT], data: dict[str, Any]) -> BodyT:
        try:
            body = kind.model_validate(data)
        except ValidationError as error:
            raise from_validation(error, data) from None
        check_model(data.get("model"), self.settings.model_name)
        return body

    def _chat_ids(self, data: dict[str, Any]) -> list[int]:
        body = parse_chat(data)
        check_model(body.model, self.settings.model_name)
        request = body.to_generation(self.engine, self.tokenizer, self.settings.defaults, "")
        return list(request.prompts[0])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise InvalidRequestError(f"prompt: {error}", param="prompt") from None

    def _decode(self, ids: list[int]) -> str:
        wrong = next((i for i in ids if i >= self.tokenizer.vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"tokens has {wrong}, but the vocabulary ends at {self.tokenizer.vocab_size - 1}",
                param="tokens",
            )
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _name(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)
