"""Models in the form that other libraries expect: an estimator of scikit-learn, a feature extractor like timm's."""
