"""Data sets as their authors publish them, read from their original folders."""
