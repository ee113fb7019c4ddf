"""Writes the seeds of the fuzz targets that no other script makes: `python3 fuzz/seeds.py` beside the corpus.

Configurations, tokenizers and model configurations are written out; Metal libraries and macOS images are built from
the few fields that their readers look at; logs are those of metal-check's fixtures.
"""
import json
import struct
from pathlib import Path

FUZZ = Path(__file__).parent
CRATES = FUZZ.parent / "crates"


def save(target, name, content):
    folder = FUZZ / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def run_configurations():
    save("run_toml", "every_section", """[model]
path = "model"
[data]
path = "data"
format = "chat"
packing = true
overlong = "split"
train_roles = ["assistant", "tool"]
[lora]
method = "dora"
rank = 16
alpha = 32.5
dropout = 0.1
targets = ["self_attn.*", "mlp.up_proj"]
layers = -1
[train]
steps = 100
batch_size = 4
accumulation = 2
max_seq_length = 512
seed = 7
eval_every = 10
checkpointing = true
[optimizer]
name = "adamw"
learning_rate = 1e-4
weight_decay = 0.01
betas = [0.9, 0.95]
eps = 1e-8
clip_norm = 1.0
[schedule]
name = "cosine"
warmup_steps = 10
min_learning_rate = 1e-6
[loss]
name = "cross_entropy"
[checkpoint]
every = 50
keep_last = 3
[backend]
device = "cpu"
memory_limit = "8 GB"
[logging]
report_every = 5
tensorboard = true
""")
    save("run_toml", "dotted", 'lora.rank = 8\ntrain = { steps = 3, seed = 1 }\nmodel."path" = \'a\\b\'\n')
    save("run_toml", "two_scales", "[lora]\nalpha = 16\nscale = 2\n")
    save("run_toml", "unknown_key", "[lora]\nrnak = 8\n")
    save("run_toml", "wrong_type", "[train]\nsteps = \"many\"\nbatch_size = -1\n")
    save("run_toml", "numbers", "[optimizer]\nlearning_rate = inf\neps = nan\nclip_norm = 1_000e-3\nweight_decay = 0x10\n")
    save("run_toml", "set", "lora.rank=16\ntrain.steps=10\ndata.train_roles=assistant,user\nbackend.memory_limit=1.5GB\n=\na=b\n")
    save("run_toml", "odd_text", "[model]\npath = \"\\u0000\\\"\\n é🙂\"\n[data]\npath = '''\nx'''\n")
    save("run_toml", "array_of_tables", "[[lora]]\nrank = 1\n[train.steps]\nx = 1979-05-27\n")


def model_configurations():
    base = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=256, rms_norm_eps=1e-5, max_position_embeddings=512)
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=256)
    cases = dict(
        llama=base,
        llama3=base | dict(rope_theta=5e5, rope_scaling=rope, eos_token_id=[1, 2], bos_token_id=0, head_dim=16),
        linear=base | dict(rope_scaling=dict(type="linear", factor=2), attention_bias=True, mlp_bias=True),
        qwen2=base | dict(model_type="qwen2", use_sliding_window=False, sliding_window=128, max_window_layers=2),
        qwen3=base | dict(model_type="qwen3", head_dim=32, tie_word_embeddings=True, layer_types=["full_attention"] * 2),
        mistral=base | dict(model_type="mistral", sliding_window=64),
        quantized=base | dict(quantization={"group_size": 64, "bits": 4, "model.embed_tokens": False,
                                            "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8}}),
        mxfp4=base | dict(quantization=dict(group_size=32, bits=4, mode="mxfp4")),
        zero=base | dict(hidden_size=0),
        huge=base | dict(num_hidden_layers=2**63, hidden_size=2**62),
        negative=base | dict(vocab_size=-1, rms_norm_eps="small"),
        nested=dict(model_type="x", text_config=base),
        rope_parameters=base | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    )
    for name, config in cases.items():
        save("model_config", name, json.dumps(config))


def tokenizers():
    added = [dict(id=i, content=c, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for i, c in enumerate(["<s>", "</s>"])]
    bytelevel = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    symbols = ["<s>", "</s>", "a", "b", "Ġ", "Ċ", "1", "2", "Ã", "©", "ab", "Ġa"]
    bpe = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
               fuse_unk=False, byte_fallback=False, ignore_merges=False,
               vocab={s: i for i, s in enumerate(symbols)}, merges=["a b", "Ġ a"])

    def whole(model, **parts):
        return dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                    pre_tokenizer=None, post_processor=None, decoder=None, model=model) | parts

    template = dict(type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<s>", type_id=0)),
                    dict(Sequence=dict(id="A", type_id=0))], pair=[dict(Sequence=dict(id="A", type_id=0))],
                    special_tokens={"<s>": dict(id="<s>", ids=[0], tokens=["<s>"])})
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["▁a", -1.5], ["b", -2.0], ["▁", -3.0], ["<0x0A>", -9.0]]
    cases = dict(
        byte_level=whole(bpe, pre_tokenizer=bytelevel, post_processor=bytelevel, decoder=bytelevel),
        sequence=whole(bpe, pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Digits", individual_digits=True),
            dict(type="Split", pattern=dict(Regex="\\s+"), behavior="Isolated", invert=False), bytelevel]),
            post_processor=dict(type="Sequence", processors=[bytelevel, template]), decoder=bytelevel),
        normalizers=whole(bpe, normalizer=dict(type="Sequence", normalizers=[
            dict(type="NFC"), dict(type="Prepend", prepend="▁"),
            dict(type="Replace", pattern=dict(String=" "), content="▁"), dict(type="Lowercase"),
            dict(type="Strip", strip_left=True, strip_right=True), dict(type="StripAccents")])),
        unigram=whole(dict(type="Unigram", unk_id=0, vocab=pieces, byte_fallback=True),
                      pre_tokenizer=dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=True),
                      decoder=dict(type="Sequence", decoders=[
                          dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"),
                          dict(type="Fuse"), dict(type="Strip", content=" ", start=1, stop=0)])),
        word_piece=whole(dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##",
                              max_input_chars_per_word=100, vocab={"[UNK]": 0, "a": 1, "##b": 2}),
                         normalizer=dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True,
                                         strip_accents=None, lowercase=True),
                         pre_tokenizer=dict(type="BertPreTokenizer"),
                         decoder=dict(type="WordPiece", prefix="##", cleanup=True)),
        word_level=whole(dict(type="WordLevel", vocab={"a": 0, "<unk>": 1}, unk_token="<unk>"),
                         pre_tokenizer=dict(type="WhitespaceSplit"),
                         truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0),
                         padding=dict(strategy=dict(Fixed=8), direction="Left", pad_to_multiple_of=None, pad_id=0,
                                      pad_type_id=0, pad_token="<s>")),
        unknown_model=whole(dict(type="Magic")),
        no_vocabulary=whole(dict(type="BPE", vocab={}, merges=[])),
        merge_of_strangers=whole(bpe | dict(merges=["x y", "a"])),
        strip_more_than_there_is=whole(bpe, decoder=dict(type="Strip", content="a", start=1, stop=3)),
        precompiled_nothing=whole(bpe, normalizer=dict(type="Precompiled", precompiled_charsmap="AAAA")),
        prefix_longer_than_token=whole(bpe | dict(continuing_subword_prefix="###", merges=["a b"])),
        huge_id=whole(bpe | dict(vocab={"a": 4294967295})),
    )
    for name, tokenizer in cases.items():
        save("tokenizer", name, json.dumps(tokenizer, ensure_ascii=False))
    config = dict(bos_token="<s>", eos_token=dict(content="</s>"), add_bos_token=True, eos_token_id=[1, 99],
                  additional_special_tokens=["a", 3], vocab_size=5)
    both = json.dumps(cases["byte_level"], ensure_ascii=False) + "\0" + json.dumps(config)
    save("tokenizer", "with_configuration", both)


def metal_libraries():
    def function(name, language):
        fields = b"NAME" + struct.pack("<H", len(name) + 1) + name + b"\0"
        fields += b"VERS" + struct.pack("<HHHHH", 8, 2, 6, *language) + b"ENDT"
        return struct.pack("<I", len(fields) + 4) + fields

    functions = function(b"vadd", (3, 1)) + function(b"gemm_float32", (4, 0))
    listing = struct.pack("<I", 2) + functions
    bitcode = b"BC\xc0\xde" + bytes(12)
    head = bytes.fromhex("4d544c4201800200080000810f000000")
    sections, at, body = b"", 88, b""
    for part in (listing, bytes(8), bytes(8), bitcode):
        sections += struct.pack("<QQ", at + len(body), len(part))
        body += part
    save("metallib", "library", head + struct.pack("<Q", 88 + len(body)) + sections + body)
    save("metallib", "listing", listing)
    save("metallib", "cut", (head + struct.pack("<Q", 88 + len(body)) + sections)[:70])


def images():
    def command(number, words, text=b""):
        body = struct.pack(f"<{len(words)}I", *words) + (text + b"\0" if text else b"")
        body += bytes(-len(body) % 8)
        return struct.pack("<II", number, len(body) + 8) + body

    commands = [command(0x32, [1, 0x1a0200, 0x1a0500, 0]), command(0x0D, [24, 0, 0, 0], b"@rpath/libmlx.dylib"),
                command(0x0C, [24, 0, 0, 0], b"/usr/lib/libc++.1.dylib"), command(0x8000001C, [12], b"lib/mlx"),
                command(0x80000018, [24, 0, 0, 0], b"/System/Library/Frameworks/Metal.framework/Metal")]
    body = b"".join(commands)
    for name, kind in (("library", 6), ("program", 2)):
        save("macho", name, struct.pack("<8I", 0xFEEDFACF, 0x100000C, 0, kind, len(commands), len(body), 0, 0) + body)
    save("macho", "fat", struct.pack(">IIIIIII", 0xCAFEBABE, 1, 0x100000C, 0, 28, len(body), 0) + body)
    save("macho", "other", b"\x7fELF\x02\x01\x01")


def logs():
    for log in sorted((CRATES / "metal-check/fixtures/logs").glob("*.txt")):
        # Small ones, and none with a path of somebody's machine in it.
        if log.stat().st_size < 1000 and b"/Users/" not in log.read_bytes():
            save("classify", log.stem, log.read_bytes())


run_configurations()
model_configurations()
tokenizers()
metal_libraries()
images()
logs()
