"""What can be searched: architectures, how to count them, and the one PyTorch model.

Nothing here knows about hardware. Start at `config.py`, then `model.py`.
"""
