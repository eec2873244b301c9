"""The page that searches by an image: the neighbours under two models side by side, by HTTP."""
