"""Models in the form that other libraries expect: scikit-learn's transformer, features like timm's, mteb's encoder."""
