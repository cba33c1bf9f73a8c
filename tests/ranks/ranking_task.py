"""A task with metrics over all predictions, for ``task.name=ranking_task:Ranking`` in this directory."""

import torch

from distlenet.tasks.image_classification import ImageClassification


class Ranking(ImageClassification):
    """Also measures how well the logit of digit 0 ranks the images, and the order of the predictions."""

    eval_batch_size = 50  # 360 images are 8 chunks, of which the last has 10 images

    def prediction(self, outputs, data):
        return {"score": outputs[:, 0], "label": data[1], "name": [f"digit {label}" for label in data[1].tolist()]}

    def summary_metrics(self, predictions):
        scores, labels, names = predictions["score"], predictions["label"], predictions["name"]
        sets = {len(part): part for part in (self.data.validation, self.data.test) if part is not None}
        expected = sets[len(labels)].get_batch(torch.arange(len(labels)))[1]
        assert torch.equal(labels, expected)  # in the order of the dataset
        assert names == [f"digit {label}" for label in labels.tolist()]
        weights = torch.linspace(0.5, 2.0, len(scores))
        positive, negative = scores[labels == 0], scores[labels != 0]
        auc = (positive[:, None] > negative).double().mean()
        return {"auc": auc, "ordered_sum": float((scores * weights).sum())}  # the float32 sum depends on the order
