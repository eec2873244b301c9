"""The paper in one file, and how the small ViT of the demo was trained. Not part of the wheel."""
