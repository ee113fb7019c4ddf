"""Forty strings that tokenizers disagree about."""
import random


def awkward_strings():
    rng = random.Random(7)
    anywhere = lambda n: "".join(chr(c) for c in (rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x1F300, 0x1FAFF)])
                                                  for _ in range(n)) if not 0xD800 <= c <= 0xDFFF)
    return [
        "", " ", "  ", "   leading and trailing   ", "a", "\n", "\r\n", "\n\n\n", "\t\tindented\n    four",
        "Hello, world!", "hello world HELLO World hElLo", "don't we'll I'M they'RE it's'", "1", "12", "123", "1234567890",
        "3.14159 and 1,000,000", "0x1F 1e-10 ٣٤٥ ½ Ⅷ", "snake_case camelCase kebab-case HTTPServer2Go",
        "!!!???...---***", "a+b=c; x->y; p::q; //comment", "def f(x):\n    return x**2  # square\n",
        "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<|im_start|", "text<|im_end|>text", " <|im_start|> ",
        "naïve café Zürich Ångström", "e\u0301 vs \u00e9, A\u030a vs \u00c5", "日本語のテキスト", "Привет, мир", "مرحبا بالعالم", "한국어 텍스트",
        "🙂👩‍👩‍👧‍👦🇩🇪👍🏽", "\u200b\u200d\ufeff zero width", "\u00a0no\u00a0break\u3000wide", "\x00\x01\x7f\x80control",
        anywhere(40), anywhere(80), "ab" * 300,
    ]
