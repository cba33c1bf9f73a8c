"""A variational autoencoder of grey images (https://arxiv.org/abs/1312.6114), as a task of distlenet."""

import base64
import io
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from distlenet import Config, Datasets, ImageClassification, SampleKeys, Task


class IndexedImages:
    """Images without labels, uint8 (n, H, W), with the index of each: an evaluation draws its noise by the index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.dataset.get_batch(indices)[0], indices


class Autoencoder(nn.Module):
    """Encode an image to the mean and the logarithm of the variance of its code, and decode codes to logits."""

    def __init__(self, height: int, width: int, code: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(height * width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.mean, self.log_variance = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.decoder = nn.Sequential(
            nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, height * width)
        )
        self.decoder.append(nn.Unflatten(1, (height, width)))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(images)
        mean, log_variance = self.mean(hidden).float(), self.log_variance(hidden).float()
        code = mean + (log_variance / 2).exp() * noise
        return self.decoder(code).float(), mean, log_variance


class Vae(Task):
    """Train the autoencoder on the images of ``data.name``."""

    def __init__(self, config: Config, code: int = 20, hidden: int = 400) -> None:
        super().__init__(config)
        self.code, self.hidden = code, hidden
        self.size: tuple[int, int] | None = None

    def datasets(self) -> Datasets:
        images = ImageClassification(self.config).datasets()
        self.size = tuple(images.train[0][0].shape)
        validation = images.validation and IndexedImages(images.validation)
        return Datasets(
            IndexedImages(images.train), IndexedImages(images.test), source=images.source, validation=validation
        )

    def model(self) -> nn.Module:
        if self.size is None:
            self.datasets()
        return Autoencoder(*self.size, self.code, self.hidden)

    def transform(self, data: tuple[Tensor, Tensor], keys: SampleKeys | None) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] and the noise of their codes: in an evaluation, always the same for an image."""
        images, indices = data
        if keys is None:
            keys = SampleKeys(seed=0, epoch=0, indices=indices).split("evaluation")
        return images / 255, keys.normal("code", (self.code,))

    def loss(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative evidence lower bound (ELBO) of each image, in nats."""
        images, noise = data
        logits, mean, log_variance = model(images, noise)
        reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2))
        kl = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
        outputs = {"reconstruction": reconstruction, "kl": kl}
        if not model.training:
            outputs["drawn"] = model.decoder(noise).float().sigmoid()  # the noise is a random code
        return reconstruction + kl, outputs

    def metrics(self, outputs: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {name: outputs[name] for name in ("reconstruction", "kl")}

    def error_analysis(self, device: torch.device) -> "Drawings":
        return Drawings()

    def state_dict(self) -> dict[str, Any]:
        return {"size": list(self.size)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = tuple(state["size"])


class Drawings:
    """Images of random codes, for the report: those drawn with the noise of the first images of the test set.

    Rank 0, whose report is written, evaluates these.
    """

    COUNT = 24

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def update(self, outputs: dict[str, Tensor], data: tuple[Tensor, Tensor], indices: Tensor) -> None:
        self.images += outputs["drawn"][indices < self.COUNT]

    def report(self) -> dict[str, Any]:
        return {"images": [{"caption": "random code", "png": encode_png(image)} for image in self.images]}


def encode_png(image: Tensor) -> str:
    """Encode an image (H, W) in [0, 1] as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray((255 * image).byte().cpu().numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def draw_images(model: Autoencoder, count: int, seed: int = 0) -> Tensor:
    """Return images of random codes, float32 (count, H, W) in [0, 1]."""
    code = SampleKeys(seed, 0, torch.arange(count)).normal("picture", (model.mean.out_features,))
    with torch.no_grad():
        return model.decoder(code).sigmoid()
