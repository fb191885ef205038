"""MatFormer language models: tiers, fragments, optimizer, trainer. Torch only: no sockets, no asyncio, no clock."""

if __name__ != "braniac.model":  # the checkout's root is on sys.path: a second copy of every class would follow
    raise ImportError(f"import braniac.model, not {__name__}")
