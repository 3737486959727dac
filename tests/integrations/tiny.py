"""A language model small enough for a test: a random Qwen2, a character tokenizer, sentences."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Trainer

from tests.integrations.harness import Run, parameters_of

SENTENCES = (
    "the norm is one number for all gradients",
    "below the threshold nothing is written",
    "clipping keeps the direction of a step",
    "a bad batch makes a gradient explode",
    "the rate is warmed up and then decays",
    "one read tells the norm of every tensor",
    "half types overflow long before floats",
    "the median norm is half the threshold",
)
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:!?<>|_\n0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen2(*, layers: int = 2, width: int = 32, seed: int = 0) -> Qwen2ForCausalLM:
    """A random Qwen2 of about 30,000 parameters, the same one for the same seed."""
    config = Qwen2Config(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = _CHAT
    return made


def save(folder: Path, **sizes: int) -> Path:
    """The model and its tokenizer as a folder that ``from_pretrained`` reads."""
    qwen2(**sizes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def token_rows(sentences: Sequence[str] = SENTENCES) -> list[dict[str, list[int]]]:
    """What a causal language model is trained on: a row of ids for each sentence, padded."""
    encoded = tokenizer()(list(sentences), padding=True)
    return [
        {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)],
        }
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]


def reported_norms(trainer: Trainer) -> list[float]:
    """The ``grad_norm`` that a Trainer logged, step by step."""
    return [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]


def trained(trainer: Trainer) -> Run:
    """Train, and what that leaves."""
    trainer.train()
    return Run(reported_norms(trainer), parameters_of(trainer.model))
