"""Put the limiters of `alrc.torch` into the training loops of other libraries: wiring, no arithmetic on losses.

Each module needs its own library; this file imports none of them.
"""

__all__: list[str] = []
