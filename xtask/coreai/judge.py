"""Apple's runtime as a judge of an .aimodel: one request, one answer. The loader aborts its process on bad files, so the
caller runs this in a child.

    judge.py ASSET OUT_FOLDER --prompt 1,2,3 --tokens 40 [--twin] [--force 4,5,6]

Loads the asset, saves it again (which verifies it), runs the prompt in two calls and then one token a call, greedily or as
forced. --twin runs the same graph and stored weights in f32 arithmetic. Prints {"tokens": [...], "resaved": bytes}; logits
[positions, vocabulary] go to OUT_FOLDER/logits.f32, little-endian, row-major.
"""
import argparse
import asyncio
import json
import os
import pathlib
import re
import shutil

import numpy as np
from coreai._compiler.ir import Module
from coreai.authoring import AIModelAsset, AIProgram
from coreai.authoring.context import Context
from coreai.runtime import NDArray


def saved_again(asset, out):
    """The asset as Apple's own writer stores it."""
    shutil.rmtree(out, ignore_errors=True)
    AIModelAsset.load(asset).program.save_asset(out)
    return (out / "main.mlirb").stat().st_size


def widened(digits, has_header):
    raw = bytes.fromhex(digits)
    head, data = (raw[:4], raw[4:]) if has_header else (b"", raw)
    return "0x" + (head + np.frombuffer(data, np.float16).astype(np.float32).tobytes()).hex().upper()


def twin(asset, out):
    """Half floats become f32 in every type and every stored value, through the text form."""
    text = AIModelAsset.load(asset).program._module._mlir_module.operation.get_asm()
    body, cut, tail = text.partition("\n{-#")
    halves = set(re.findall(r"dense_resource<([\w.$-]+)> : tensor<(?:[0-9]+x)*f16>", body))
    inline = r'dense<"0x([0-9A-F]+)"> : (tensor<(?:[0-9]+x)*f16>)'
    body = re.sub(inline, lambda m: f'dense<"{widened(m[1], False)}"> : {m[2]}', body)
    body = re.sub(r"(?<![a-zA-Z0-9])f16(?=[>,}\s])|(?<=x)f16(?=>)", "f32", body)
    blob = r'(\s)([\w.$-]+): "0x([0-9A-F]+)"'
    tail = re.sub(blob, lambda m: f'{m[1]}{m[2]}: "{widened(m[3], True)}"' if m[2] in halves else m[0], tail)
    context = Context()
    with context._mlir_context:
        module = Module.parse(body + cut + tail)
    shutil.rmtree(out, ignore_errors=True)
    AIProgram._from_mlir_module(module).save_asset(out)
    return out


async def decode(asset, prompt, count, forced):
    async with AIModelAsset.load(asset).executable() as model:
        function = model.load_function("main")
        described = function.desc
        context = len(prompt) + count
        states = {}
        for name in described.state_names:
            state = described.state_descriptor(name)
            shape = [d if d is not None and d >= 0 else context for d in state.shape]
            states[name] = NDArray(np.zeros(shape, {"float16": np.float16, "float32": np.float32}[state.dtype]))
        seen, rows = 0, []

        async def call(ids):
            nonlocal seen
            seen += len(ids)
            inputs = {
                "input_ids": NDArray(np.array([ids], np.int32)),
                "position_ids": NDArray(np.arange(seen, dtype=np.int32)[None]),
            }
            found = (await function(inputs, state=states))["logits"].numpy()
            rows.append(np.array(found, np.float32)[0])

        half = (len(prompt) + 1) // 2
        await call(prompt[:half])
        if prompt[half:]:
            await call(prompt[half:])
        tokens = []
        while True:
            tokens.append(forced[len(tokens)] if forced else int(rows[-1][-1].argmax()))
            if len(tokens) == count:
                return tokens, np.concatenate(rows)
            await call([tokens[-1]])


def main():
    numbers = lambda text: [int(n) for n in text.split(",")]
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("asset", type=pathlib.Path)
    arguments.add_argument("out", type=pathlib.Path)
    arguments.add_argument("--prompt", type=numbers, required=True)
    arguments.add_argument("--force", type=numbers)
    arguments.add_argument("--tokens", type=int, default=40)
    arguments.add_argument("--twin", action="store_true")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    resaved = saved_again(given.asset, given.out / "resaved.aimodel")
    asset = twin(given.asset, given.out / "twin.aimodel") if given.twin else given.asset
    tokens, logits = asyncio.run(decode(asset, given.prompt, given.tokens, given.force))
    logits.astype("<f4").tofile(given.out / "logits.f32")
    print(json.dumps({"tokens": tokens, "resaved": resaved}), flush=True)
    os._exit(0)  # now and then the runtime aborts while Python takes itself apart, after everything is done


main()
