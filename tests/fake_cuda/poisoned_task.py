"""A task with one sample whose loss is NaN."""

import math

from distlenet.tasks.image_classification import ImageClassification

POISONED = 77


class Poisoned(ImageClassification):
    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        if keys is not None:
            inputs = inputs.masked_fill((keys.indices == POISONED).view(-1, 1, 1, 1), math.nan)
        return inputs, labels
