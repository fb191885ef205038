"""The daemon: the only place with a clock, a disk, a socket or a thread."""

if __name__ != "braniac.node":  # the checkout's root is on sys.path: a second copy of every class would follow
    raise ImportError(f"import braniac.node, not {__name__}")
