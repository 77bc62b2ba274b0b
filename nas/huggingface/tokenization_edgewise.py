"""The tokenizer of a folder as its tokenizer.json has it.

transformers 5 takes a family's own tokenizer where a folder names none that has code, whatever tokenizer.json says; this
one names itself, and is what is loaded without it too.
"""

from transformers import PreTrainedTokenizerFast


class EdgewiseTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE from tokenizer.json, without rules of a family."""
