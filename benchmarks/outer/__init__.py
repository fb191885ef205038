"""Ways for peers to learn one model together, side by side: one process, real trainers, every byte counted.

`swarm.py` is the loop that all methods share, `methods.py` their list; each file between them is one method or one
family. Scripts beside this package run them: loss_bytes.py compares losses and bytes.
"""
