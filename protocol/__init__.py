"""The outer protocol: codec, screen, merge, certificates. Sans-IO: no torch, asyncio, sockets, time or random."""

if __name__ != "braniac.protocol":  # the checkout's root is on sys.path: a second copy of every class would follow
    raise ImportError(f"import braniac.protocol, not {__name__}")
