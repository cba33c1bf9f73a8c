"""The reference: logistic regression on the counts of characters and pairs of characters, with scikit-learn.

``python baseline.py ROOT`` prints its accuracy on the splits of sentiment.py; the validation set chooses the strength.
"""

import sys
from pathlib import Path

from sentiment import read_reviews
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

splits = read_reviews(Path(sys.argv[1]))
features = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
train = features.fit_transform(review for review, _ in splits["train"])
for strength in (1, 3, 10, 30):
    model = LogisticRegression(C=strength, max_iter=1000).fit(train, [label for _, label in splits["train"]])
    for name in ("validation", "test"):
        inputs, labels = features.transform(review for review, _ in splits[name]), [label for _, label in splits[name]]
        area = roc_auc_score(labels, model.decision_function(inputs))
        print(f"C={strength} {name}: accuracy {model.score(inputs, labels):.4f}, AUC {area:.4f}, {len(labels)} reviews")
