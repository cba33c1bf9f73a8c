"""Spam or not: a text classifier with a vocabulary, on mails of very different lengths."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlenet import Config, Datasets, Task, UserError

LABELS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
PADDING, UNKNOWN = 0, 1
BUCKETS = (32, 64, 128, 256, 512)
"""A mail is padded to the first of these lengths that holds it; longer mails are cut."""

Mail = tuple[list[str], int]
"""The first words of a mail, and 1 if it is spam."""


class Spam(Task):
    """Classify the mails of the SpamAssassin corpus in ``data.root``."""

    def __init__(self, config: Config, max_words: int = 20_000) -> None:
        super().__init__(config)
        self.root, self.max_words = Path(config.data.root), max_words
        self.vocabulary: dict[str, int] = {}

    def datasets(self) -> Datasets:
        """Split the mails by a hash of their text, and number the words of the training set."""
        splits = read_mails(self.root)
        if not self.vocabulary:
            counts = Counter(word for words, _ in splits["train"] for word in words)
            frequent = sorted(counts, key=lambda word: (-counts[word], word))[: self.max_words - 2]
            self.load_state_dict({"words": frequent})
        return Datasets(
            splits["train"],
            splits["test"],
            source=str(self.root),
            validation=splits["validation"],
            classes=("ham", "spam"),
            fingerprint={name: hashlib.sha256(repr(mails).encode()).hexdigest() for name, mails in splits.items()},
        )

    def model(self) -> nn.Module:
        """Return a network with an embedding of ``max_words`` words."""
        return TextNet(self.max_words)

    def collate(self, samples: Sequence[Mail]) -> tuple[list[Tensor], Tensor]:
        """Return the numbers of each mail's words, a list because the lengths differ, and the labels."""
        texts = [[self.vocabulary.get(word, UNKNOWN) for word in words] for words, _ in samples]
        return [torch.tensor(text, dtype=torch.int64) for text in texts], torch.tensor([label for _, label in samples])

    def loss(self, model: nn.Module, data: tuple[list[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the binary cross-entropy of each mail, in nats, and its logit."""
        texts, labels = data
        logits = model(texts).float()
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none"), logits

    def metrics(self, outputs: Tensor, data: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return whether each mail is classified correctly."""
        return {"accuracy": (outputs > 0) == data[1]}

    def prediction(self, outputs: Tensor, data: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return what the area under the ROC curve needs."""
        return {"score": outputs, "positive": data[1] == 1}

    def summary_metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Return the area under the ROC curve: the share of the pairs of two classes that are in the right order."""
        score, positive = predictions["score"].double(), predictions["positive"].bool()
        differences = score[positive].unsqueeze(1) - score[~positive]
        return {"auc": float((differences > 0).double().mean() + (differences == 0).double().mean() / 2)}

    def predict(self, model: nn.Module, data: Sequence[bytes] | Tensor) -> Tensor:
        """Return the logits, (n,), of mails, or of the numbers of their words, padded (n, length)."""
        if isinstance(data, Tensor):
            return model.classify(data).float()
        inputs, _ = self.collate([(words_of(text), 0) for text in data])
        return model(inputs).float()

    def export_inputs(self, data: tuple[list[Tensor], Tensor]) -> Tensor:
        """Return the numbers of the words, int64 (n, length), padded to the length of the longest mail's bucket."""
        length = bucket_of(max(map(len, data[0])))
        return torch.stack([pad(text, length) for text in data[0]])

    def postprocess(self, outputs: Tensor) -> Tensor:
        """Return the probability that each mail is spam, (n,)."""
        return outputs.sigmoid()

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary: without it, the weights cannot be used."""
        return {"words": list(self.vocabulary)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the vocabulary of a checkpoint."""
        self.vocabulary = {word: number for number, word in enumerate(state["words"], start=UNKNOWN + 1)}


class TextNet(nn.Module):
    """A linear model of the words' vectors and of the maximum of a convolution over three words."""

    def __init__(self, words: int, width: int = 64, channels: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=PADDING)
        nn.init.normal_(self.embedding.weight.data[PADDING + 1 :], std=0.1)
        self.convolution = nn.Conv1d(width, channels, kernel_size=3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(width + channels, 1)

    def forward(self, texts: list[Tensor]) -> Tensor:
        """Return one logit per text, (n,). The texts of a bucket are padded and computed together."""
        lengths = [bucket_of(len(text)) for text in texts]
        order, logits = [], []
        for length in sorted(set(lengths)):
            members = [index for index, its_length in enumerate(lengths) if its_length == length]
            logits.append(self.classify(torch.stack([pad(texts[index], length) for index in members])))
            order += members
        return torch.cat(logits)[torch.tensor(order, device=logits[0].device).argsort()]

    def classify(self, words: Tensor) -> Tensor:
        """Return the logits (n,) of padded texts (n, length). Padding has no influence on them."""
        vectors, is_word = self.embedding(words), words != PADDING
        features = self.convolution(vectors.transpose(1, 2)).relu()
        maxima = (features * is_word.unsqueeze(1)).amax(2)  # no feature is below 0
        sums = vectors.sum(1) / is_word.sum(1, keepdim=True).clamp(min=1).sqrt()  # the vector of padding is 0
        return self.output(self.dropout(torch.cat([sums, maxima], 1))).squeeze(1)


def bucket_of(words: int) -> int:
    """Return the length to which a mail of ``words`` words is padded."""
    return next(length for length in BUCKETS if words <= length)


def pad(text: Tensor, length: int) -> Tensor:
    """Return the numbers of words with padding up to ``length``."""
    return F.pad(text, (0, length - len(text)), value=PADDING)


def read_mails(root: Path) -> dict[str, list[Mail]]:
    """Return the mails of each split: 80 % train, 10 % validation, 10 % test. Repeated mails are dropped.

    The split is a function of the text, so that it depends on neither file names nor the order of the files.
    """
    splits: dict[str, list[Mail]] = {"train": [], "validation": [], "test": []}
    seen = set()
    for group, label in LABELS.items():
        for path in sorted((root / group).glob("*.txt")):
            words = words_of(path.read_bytes())
            digest = hashlib.sha256(" ".join(words).encode()).digest()
            if words and digest not in seen:
                seen.add(digest)
                tenth = int.from_bytes(digest[:4], "big") % 10
                splits[("validation", "test")[tenth] if tenth < 2 else "train"].append((words, label))
    if not splits["train"] or not splits["test"]:
        raise UserError(f"data.root={root}: has no mails; give the directory that contains {', '.join(LABELS)}")
    return splits


def words_of(mail: bytes) -> list[str]:
    """Return the words of subject and body, without the other headers, attachments and HTML tags."""
    message = message_from_bytes(mail)
    texts = [str(message.get("Subject", ""))]
    for part in message.walk():
        payload = part.get_payload(decode=True)
        if part.get_content_maintype() == "text" and isinstance(payload, bytes):
            texts.append(payload.decode("latin-1"))
    text = re.sub(r"<[^>]*>|&\w+;", " ", " ".join(texts)).lower()
    return re.findall(r"[a-z']+|\d+|[!$%]", text)[: BUCKETS[-1]]
