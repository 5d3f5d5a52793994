"""The nouns: shapes, axes, scores, plans, candidates, manifests and costs. No model library is imported here."""
