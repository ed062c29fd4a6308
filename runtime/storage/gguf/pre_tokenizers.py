"""`tokenizer.ggml.pre`: how a byte-level vocabulary inside a GGUF file cuts text before it merges.

GGUF keeps vocabulary and merges, but of the rest of a tokenizer only this name. What it stands for
is a list of expressions: each cuts what the one before it left, and what matches and what lies
between are pieces alike. The names and their meanings are llama.cpp's (src/llama-vocab.cpp); where
llama.cpp approximates a letter class that its own regex engine lacks (tekken, gpt-4o), the
expression of the model's tokenizer.json stands here.
"""

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
BEFORE = r"[^\r\n\p{L}\p{N}]?"  # what a word may take with it
SPACES = r"\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + SPACES


def _words(digits: str, short: str = SHORT + "|", spaces: str = SPACES) -> str:
    """Llama 3's rule and its kin, which differ in how many digits stay together."""
    signs = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    return rf"{short}{BEFORE}\p{{L}}+|{digits}{signs}{spaces}"


def _cased(digits: str, short: str) -> str:
    """Words end where lower case meets upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = f"{BEFORE}{upper}*{lower}+{short}|{BEFORE}{upper}+{lower}*{short}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|" + SPACES


LLAMA3, QWEN2 = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
GPT4O = _cased(r"\p{N}{1,3}", SHORT + "?")
MARKS = r"[\p{P}\$\+<=>\^~\|"
THREE_DIGITS = "[0-9][0-9][0-9]"
# Digits in threes from the right: 1 234 567.
THOUSANDS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
ASCII_MARK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
MARKED_WORD = ASCII_MARK + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
DEEPSEEK_WORDS = MARKED_WORD + r"[\r\n]*|\s*[\r\n]+|" + SPACES
SPARK_WORDS = MARKED_WORD + r"|[\r\n]|" + SPACES
# Letters with case, of the alphabets that DeepSeek LLM lists (no Georgian, no mathematical ones).
CASED_LETTERS = "[\\p{Lu}\\p{Ll}\\p{Lt}&&[^\u10d0-\u10ff\U0001d400-\U0001d7ff]]"
DEEPSEEK_MARKS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]"
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
    "\u1100-\u11ff]+"
)
YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c"
    "\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
JAIS2_SPACES = "|".join(rf"\s{{{2**k}}}(?!\S)" for k in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}"
NOT_HAN = r"&&[^\p{Han}]]"
KIMI = (
    rf"[\p{{Han}}]+|{BEFORE}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{NOT_HAN}*"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{NOT_HAN}+{SHORT}?|"
    rf"{BEFORE}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{NOT_HAN}+"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{NOT_HAN}*{SHORT}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + SPACES
)


@dataclass(frozen=True, slots=True)
class Rule:
    """What one or more names stand for."""

    cuts: tuple[str, ...]
    whole_words: bool = False
    """A piece that is in the vocabulary is taken as it is, whether merges lead to it or not."""
    begin: bool = False
    """A text begins with BOS, unless the file says `add_bos_token`."""


RULES: dict[str, Rule] = {
    "default": Rule((MARKS + "]+", GPT2, r"\p{N}+", THREE_DIGITS)),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Rule(
        (LLAMA3,), whole_words=True, begin=True
    ),
    "dbrx smaug-bpe": Rule((LLAMA3,)),
    "glm4 chatglm-bpe": Rule((LLAMA3,), whole_words=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2": Rule(
        (QWEN2,)
    ),
    "qwen35": Rule(
        (
            rf"{SHORT}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
            r"\s*[\r\n]+|" + SPACES,
        )
    ),
    "tekken": Rule((_cased(r"\p{N}", ""),), whole_words=True, begin=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Rule((GPT4O,)),
    "tiny_aya cohere2moe": Rule((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": Rule(
        (GPT2,)
    ),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Rule((r"\p{N}", GPT2)),
    "falcon": Rule((MARKS + "`]+", GPT2, THREE_DIGITS)),
    # DeepSeek LLM cuts numbers into digits too (arXiv 2401.02954, 2.1); llama.cpp leaves that to
    # the merges, of which none has a digit.
    "deepseek-llm": Rule(
        (r"[\r\n]", rf"\s?{CASED_LETTERS}+", rf"\s?{DEEPSEEK_MARKS}+", r"\s+$", CJK, r"\p{N}")
    ),
    "deepseek-coder": Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": Rule((r"\p{N}{1,3}", KANA, DEEPSEEK_WORDS)),
    "spark2_5": Rule((r"\p{N}{1,3}", KANA, SPARK_WORDS, r"\p{N}")),
    "youtu": Rule((YOUTU_SCRIPTS, _cased(r"\p{N}", SHORT + "?")), whole_words=True),
    "poro-chat bloom gpt3-finnish": Rule((BLOOM,)),
    "viking": Rule((BLOOM, r"\p{N}")),
    "jais-2": Rule((_words(r"\p{N}{1,3}", spaces=JAIS2_SPACES),)),
    "chameleon": Rule(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        begin=True,
    ),
    "superbpe": Rule((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "bailingmoe bailingmoe2 llada-moe": Rule(
        (
            rf"'(?i:[sdmt]|ll|ve|re)|{BEFORE}+\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|"
            r"\s*[\r\n]|" + SPACES,
        )
    ),
    "seed-coder": Rule(
        (rf"{SHORT}|{BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|" + SPACES,)
    ),
    "ufakzeka": Rule((_words(r"\p{N}", short=""),)),
    "exaone-moe": Rule(
        (
            rf"{SHORT}|{BEFORE}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|" + SPACES,
        )
    ),
    "kimi-k2": Rule((KIMI,)),
    "afmoe": Rule((THOUSANDS, AFMOE_SCRIPTS, DEEPSEEK_WORDS)),
    "laguna": Rule((r"[^\n]+|[\n]+", QWEN2)),
    "minicpm5": Rule((r"\p{N}{1,3}", _words(r"\p{N}+")), whole_words=True),
}
BY_NAME = {name: rule for names, rule in RULES.items() for name in names.split()}


def pre_tokenizer(rule: Rule) -> PreTokenizer:
    """The rule as a step of a `tokenizers` tokenizer; pieces come out in the byte alphabet."""
    cuts: list[PreTokenizer] = [Split(Regex(cut), "isolated") for cut in rule.cuts]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
