"""The reference: logistic regression of scikit-learn on one-hot users, films and their attributes.

``python baseline.py WHEEL`` prints its AUC on the same splits. The validation set chooses the strength C.
"""

import sys

from movielens import FIELDS, load_ratings
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

data, _ = load_ratings(sys.argv[1])
for columns in (2, len(FIELDS)):
    for strength in (0.3, 1, 3, 10):
        model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression(C=strength, max_iter=1000))
        model.fit(data.train.codes[:, :columns].numpy(), data.train.labels.numpy())
        figures = []
        for name, split in (("validation", data.validation), ("test", data.test)):
            scores = model.decision_function(split.codes[:, :columns].numpy())
            figures.append(f"{name} AUC {roc_auc_score(split.labels.numpy(), scores):.4f}")
        print(f"{', '.join(list(FIELDS)[:columns])}; C={strength}: {', '.join(figures)}")
