"""FlashCoreCache: its layers, and its fp8."""
