"""``rank_program.py`` with a model that draws random numbers."""

import torch.nn.functional as F
from rank_program import main

from distlenet.models.lenet import Net
from distlenet.tasks.image_classification import ImageClassification


class DropoutNet(Net):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.3, self.training))


class DropoutTask(ImageClassification):
    def model(self):
        return DropoutNet()


if __name__ == "__main__":
    main(DropoutTask)
