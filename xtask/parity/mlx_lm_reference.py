"""What mlx-lm computes with a model folder, in f32 on the CPU, for `cargo xtask parity`.

    python mlx_lm_reference.py MODEL OUT [--prompts FILE] [--data FILE] [--max-tokens 64]

MODEL is a Hugging Face folder. With a tokenizer.json in it, prompts are the lines of FILE; without, seeded random tokens.
Writes OUT/reference.safetensors: `logits.<i>` f32 [T, v] for each prompt; and OUT/reference.json:
{"mlx", "mlx_lm", "prompts": [{"text", "tokens", "greedy", "gaps", "prefixes"}], "data": {"loss", "perplexity", "tokens"}}.
`greedy` is the continuation without the end token, `gaps` the distance of the two largest logits before each of its
tokens (and before the end token), `prefixes[k]` the text of its first k tokens. `data` scores the `text` rows of a JSONL
file, each with the end token appended.
"""
import argparse
import json
import math
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

RANDOM_PROMPTS, RANDOM_LENGTH = 5, 40


def end_tokens(folder, config):
    """The tokens that end a text, from the model's and the generation configuration."""
    found = set()
    generation = folder / "generation_config.json"
    for source in (config, json.loads(generation.read_text()) if generation.exists() else {}):
        ids = source.get("eos_token_id")
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return found


def prompts_of(tokenizer, lines, vocab_size):
    if tokenizer:
        return [(line, tokenizer.encode(line).ids) for line in lines]
    source = random.Random(0)
    return [(None, [source.randrange(vocab_size) for _ in range(RANDOM_LENGTH)]) for _ in range(RANDOM_PROMPTS)]


def greedy(model, tokens, ends, max_tokens):
    """The likeliest continuation, with cache, and the gap between the two likeliest tokens at each step."""
    found, gaps = [], []
    for token, logprobs in generate_step(mx.array(tokens), model, max_tokens=max_tokens):
        second, first = mx.sort(logprobs.astype(mx.float32))[-2:].tolist()
        gaps.append(first - second)
        if int(token) in ends:
            break
        found.append(int(token))
    return found, gaps


def score(model, tokenizer, end, path):
    """Token-weighted loss over the rows of a JSONL file."""
    total, count = 0.0, 0
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        tokens = tokenizer.encode(json.loads(line)["text"]).ids
        if tokens[-1] != end:
            tokens.append(end)
        logits = model(mx.array(tokens[:-1])[None])[0].astype(mx.float32)
        total += nn.losses.cross_entropy(logits, mx.array(tokens[1:]), reduction="sum").item()
        count += len(tokens) - 1
    return dict(loss=total / count, perplexity=math.exp(total / count), tokens=count)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    mx.set_default_device(mx.cpu)
    model, config = load_model(args.model, strict=True)
    if "quantization" not in config:
        model.set_dtype(mx.float32)
    has_tokenizer = (args.model / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json")) if has_tokenizer else None
    lines = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else []
    ends = end_tokens(args.model, config) if tokenizer else set()

    logits, prompts = {}, []
    for index, (text, tokens) in enumerate(prompts_of(tokenizer, lines, config["vocab_size"])):
        logits[f"logits.{index}"] = model(mx.array(tokens)[None])[0].astype(mx.float32)
        continuation, gaps = greedy(model, tokens, ends, args.max_tokens)
        decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else None
        prefixes = [decode(continuation[:count]) for count in range(len(continuation) + 1)] if tokenizer else None
        prompts.append(dict(text=text, tokens=tokens, greedy=continuation, gaps=gaps, prefixes=prefixes))
    result = dict(mlx=mx.__version__, mlx_lm=mlx_lm.__version__, prompts=prompts)
    if args.data and tokenizer:
        result["data"] = score(model, tokenizer, config["eos_token_id"], args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(args.out / "reference.safetensors"), logits)
    (args.out / "reference.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
