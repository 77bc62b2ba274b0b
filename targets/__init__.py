"""Devices: what they are, how a program is compiled for them, checked and timed. Nothing here knows of language models."""
