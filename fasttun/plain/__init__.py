"""Policy of the plain mode that is not per packet. Per packet: fasttun/_native/{wire,peers}.pxd."""
