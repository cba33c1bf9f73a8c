"""The reference: logistic regression on TF-IDF of words, with scikit-learn.

``python baseline.py ROOT`` prints its accuracy on the splits of spam.py; the validation set chooses the strength.
"""

import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from spam import read_mails

splits = read_mails(Path(sys.argv[1]))
features = TfidfVectorizer(analyzer=list, min_df=2, sublinear_tf=True)  # the words are a list already
train = features.fit_transform(words for words, _ in splits["train"])
for strength in (1, 10, 100, 1000):
    model = LogisticRegression(C=strength, max_iter=1000).fit(train, [label for _, label in splits["train"]])
    for name in ("validation", "test"):
        inputs, labels = features.transform(words for words, _ in splits[name]), [label for _, label in splits[name]]
        area = roc_auc_score(labels, model.decision_function(inputs))
        print(f"C={strength} {name}: accuracy {model.score(inputs, labels):.4f}, AUC {area:.4f}, {len(labels)} mails")
