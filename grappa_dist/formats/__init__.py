"""Exported models for programs without this package: ONNX, torch.export, and folders as the Hub lays them out."""
