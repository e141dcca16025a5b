"""What rounding a model's weights costs: bits per byte of held-out text, and greedy agreement.

    python benchmarks/quantization.py --model DIR --text runs/demo/corpora/val.jsonl

Two numbers against the folder's own weights in float32. Bits per byte: how well the text is
predicted, whatever the tokenizer. Agreement: the share of positions, along the continuations that
the float32 model writes greedily, where the rounded model too would choose the same token.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from astrai_core.model import AutoModel, Transformer
from astrai_core.model.quantization import SCHEMES, choose
from astrai_core.tokenizer import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with float weights")
    parser.add_argument("--text", type=Path, required=True, help='JSONL with "text" or "messages"')
    parser.add_argument("--texts", type=int, default=100, help="so many lines, evenly spread")
    parser.add_argument("--prompts", type=int, default=24, help="texts to continue")
    parser.add_argument("--new_tokens", type=int, default=48, help="length of a continuation")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = read_texts(options.text, options.texts)
    exact = AutoModel.from_pretrained(options.model, torch.float32)
    prompts = [tokenizer.encode(text)[:24] for text in texts[: options.prompts]]
    paths = [continue_greedily(exact, prompt, options.new_tokens) for prompt in prompts]
    chosen = [
        choices(exact, path, len(prompt)) for path, prompt in zip(paths, prompts, strict=True)
    ]
    reference = bits_per_byte(exact, tokenizer, texts)
    print(f"{options.model}, {len(texts)} texts of {options.text}, kernels: {choose().reason}")
    print(f"{'weights':<8}{'bits/byte':>11}{'change':>10}{'agreement':>11}")
    print(f"{'float32':<8}{reference:>11.4f}{'':>10}{'':>11}")
    for scheme in SCHEMES:
        model = AutoModel.from_pretrained(options.model, torch.float32, scheme)
        bits = bits_per_byte(model, tokenizer, texts)
        same = [
            (choices(model, path, len(prompt)) == wanted).float()
            for path, prompt, wanted in zip(paths, prompts, chosen, strict=True)
        ]
        agreement = torch.cat(same).mean().item()
        print(
            f"{scheme:<8}{bits:>11.4f}{bits / reference - 1:>+10.2%}{agreement:>11.2%}", flush=True
        )


def read_texts(file: Path, count: int) -> list[str]:
    lines = file.read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines[:: max(1, len(lines) // count)]]
    return [
        record["text"] if "text" in record else record["messages"][-1]["content"]
        for record in records[:count]
    ]


@torch.inference_mode()
def bits_per_byte(model: Transformer, tokenizer: AutoTokenizer, texts: list[str]) -> float:
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)[: model.config.max_len]])
        if ids.shape[1] < 2:
            continue
        logprobs = model(ids)["logits"][0, :-1].float().log_softmax(-1)
        nats -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
        num_bytes += len(tokenizer.decode(ids[0, 1:].tolist()).encode())
    return nats / math.log(2) / num_bytes


@torch.inference_mode()
def continue_greedily(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))["logits"][0, -1].argmax()))
    return ids


@torch.inference_mode()
def choices(model: Transformer, ids: list[int], start: int) -> torch.Tensor:
    """The most likely token at each position of the continuation."""
    return model(torch.tensor([ids]))["logits"][0, start - 1 : -1].argmax(-1)


if __name__ == "__main__":
    main()
