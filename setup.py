"""Packaging, for tools that call setup.py. Metadata, dependencies and package data are in pyproject.toml."""

from setuptools import setup

setup()
