"""Generation without a server for programs on an event loop; their calls share the engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import torch

from astrai_core.generation import Completion, SamplingParams
from astrai_core.model import Transformer
from astrai_core.model.quantization import Scheme
from astrai_core.tokenizer import AutoTokenizer
from astrai_serve.engine.config import EngineConfig
from astrai_serve.engine.engine import InferenceEngine
from astrai_serve.engine.llm import default_params, fitted, load
from astrai_serve.engine.task import RefusedError, TaskEvent


class AsyncLLM:
    """A model to await; `async with` closes it.

    Args:
        model: a model folder or a LoRA checkpoint, or a model whose weights are read in place.
        tokenizer: the tokenizer of a model given as such; None makes one of token ids only. A
            folder brings its own.
        config: sizes and limits.
        dtype: type of the weights of a folder; None keeps the folder's.
        weights: quantise the weights of a folder by this scheme; None keeps them as they are.
    """

    def __init__(
        self,
        model: str | Path | Transformer,
        tokenizer: AutoTokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        weights: Scheme | None = None,
    ):
        self.default_params = default_params(model)
        """For calls without any: what the folder's `generation_config.json` wants."""
        model, self.tokenizer = load(model, tokenizer, dtype, weights)
        self.engine = InferenceEngine(model, self.tokenizer, config)

    async def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete each prompt, texts or token ids, under one set of parameters or one each.

        Without any, `default_params` are taken.

        Raises:
            RefusedError: a prompt can never run; the others are cancelled.
            GenerationFailedError: an error ended one of the tasks.
        """
        if isinstance(prompts, str):
            raise RefusedError("prompts is a list, not one text; pass [text]")
        ids = [self._encode(p) if isinstance(p, str) else p for p in prompts]
        if params is None:
            params = fitted(self.default_params, ids, self.engine.max_context)
        return await self.engine.generate_async(ids, params)

    async def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        *,
        continue_final_message: bool = False,
        **template_variables: object,
    ) -> Completion:
        """Answer a conversation; the arguments are those of `LLM.chat`."""
        if self.tokenizer is None:
            raise RefusedError("chat needs a tokenizer; pass one beside the model")
        prompt = self.tokenizer.apply_chat_template(
            messages,
            True,
            tools,
            continue_final_message=continue_final_message,
            **template_variables,
        )
        return (await self.generate([prompt], params))[0]

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[TaskEvent]:
        """Yield the news of one completion as it comes; leaving the loop ends the task."""
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        if params is None:
            (params,) = fitted(self.default_params, [ids], self.engine.max_context)
        if params.structure is not None:  # it may take seconds
            await asyncio.to_thread(self.engine.prepare, params)
        async with self.engine.submit(ids, params) as events:
            async for event in events:
                yield event

    def close(self) -> None:
        """End what runs and free the KV cache; the model itself is the caller's."""
        self.engine.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RefusedError("a text prompt needs a tokenizer; pass one, or token ids")
        return self.tokenizer.encode(text)
