"""Tiny language models that encode prompts for the models of 2025 and 2026, and their tokenizers."""

import string
from typing import Any

from toys.families import T5, made

_LAYERS: dict[str, Any] = {
    "hidden_size": T5, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def qwen_tokenizer() -> Any:
    """Reads bytes, and writes messages as chats do."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    known = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(known)}, merges=[])
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}<|im_start|>assistant\n"
    return tokenizer


def qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {**_LAYERS, "vocab_size": 300, "num_hidden_layers": 3, "rope_scaling": rope}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": T5}
    return made(Qwen2_5_VLForConditionalGeneration, 3, config=Qwen2_5_VLConfig(text_config=text, vision_config=eye))


def qwen3(causal: bool = False) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(**_LAYERS, vocab_size=300, num_hidden_layers=28 if causal else 2, head_dim=8)
    return made(Qwen3ForCausalLM if causal else Qwen3Model, 4, config=config)


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    known = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.printable[:94]]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(known)}, merges=[])


def gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(**_LAYERS, vocab_size=128, num_hidden_layers=2, head_dim=8)
    return made(Gemma2Model, 5, config=config)


def umt5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=8, d_model=T5, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return made(UMT5EncoderModel, 2, config=config)
