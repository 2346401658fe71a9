"""Tokenizers and text encoders of the demos, trained on the captions of their grammar."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import T5TokenizerFast

from recipes.training import run_stage

TEXT_LENGTH = 16  # L, tokens per caption; the longest caption of the grammars has 12 words
WIDTH = 96  # D, width of the text encoders
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"


def caption_lines(captions: list[str]) -> list[str]:
    """Return the training text of a tokenizer: the captions, and the letters, so that it covers any English prompt."""
    return captions + [" ".join(LETTERS), LETTERS] * 10


def train_sentencepiece(folder: Path, captions: list[str], pieces: int = 160) -> T5TokenizerFast:
    """Train a sentencepiece unigram model on captions, unless the folder has one.

    Args:
        folder: Of the model's files.
        captions: Of the grammar.
        pieces: Size of the vocabulary, at most.

    Returns:
        The model as a T5 tokenizer.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    lines = caption_lines(captions)
    if not (folder / "spiece.model").exists():
        # The trainer considers only pieces that recur in different words, so whole words are given as seeds.
        words = Counter(f"\u2581{word}" for line in lines for word in line.split())
        (folder / "seeds.tsv").write_text("".join(f"{w}\t{n}\n" for w, n in sorted(words.items())), "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(folder / "spiece"),
            vocab_size=pieces,
            seed_sentencepieces_file=str(folder / "seeds.tsv"),
            character_coverage=1.0,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=TEXT_LENGTH)


def t5_options(tokenizer) -> dict:
    """Return the config of a demo's T5 or UMT5 encoder."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": WIDTH,
        "d_kv": WIDTH // 4,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def token_ids(tokenizer, captions) -> torch.Tensor:
    """Return the token ids of captions, padded, [B, L]."""
    options = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids


def train_text(work, encoders, sizes, sample, steps, device):
    """Train text encoders to represent captions, in place of the real encoders' pretraining.

    A linear head on each encoder's vector answers questions about the caption, each by a distribution over its
    possible answers.

    Args:
        work: Folder of the checkpoints.
        encoders: (module, function from captions to vectors [B, WIDTH]) by name.
        sizes: Number of possible answers to each question.
        sample: sample(rng, count) returns captions and their answers: probabilities [B, sum of sizes].
        steps: Training steps.
        device: Of the encoders.
    """
    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, sum(sizes)) for _ in encoders).to(device)
    modules = {name: module for name, (module, _) in encoders.items()} | {"heads": heads}
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)

    def loss_of(step):
        captions, answers = sample(np.random.default_rng([1, step]), 128)
        targets = answers.to(device).split(list(sizes), dim=1)
        loss = 0.0
        for head, (_, vectors_of) in zip(heads, encoders.values(), strict=True):
            logits = head(vectors_of(captions)).split(list(sizes), dim=1)
            loss = loss + sum(F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True))
        return loss

    run_stage("text", work, steps, modules, optimizer, loss_of, learning_rate=2e-3)


def attribute_answers(scenes, attributes) -> torch.Tensor:
    """Return the answers to "which value?" for each attribute of scenes, one of them "left open".

    Args:
        scenes: B scenes; an open attribute is None.
        attributes: The values of each attribute, by name.

    Returns:
        Probabilities of 0 and 1, [B, sum over attributes of values + 1].
    """
    columns = []
    for name, options in attributes.items():
        values = [getattr(scene, name) for scene in scenes]
        indices = [len(options) if value is None else options.index(value) for value in values]
        columns.append(F.one_hot(torch.tensor(indices), len(options) + 1).float())
    return torch.cat(columns, dim=1)
