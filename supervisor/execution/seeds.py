"""New random state for the one generator that a fork repeats: the legacy generator behind `numpy.random.random()`.

Python's `random` renews itself at a fork, and all other generators draw from the system. `numpy.random.seed()` would
do, but takes half a millisecond in a new process: so fresh bits are put where the generator keeps its state.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_KEY_WORDS = 624


class _State(ctypes.Structure):
    """mt19937_state of numpy."""

    _fields_ = [("key", ctypes.c_uint32 * _KEY_WORDS), ("position", ctypes.c_int)]


class NumpySeed:
    """Renews the state in a child of the process in which it was made."""

    def __init__(self, module: Any, state: _State | None) -> None:
        self._module = module
        self._state = state

    @classmethod
    def of_this_process(cls) -> NumpySeed | None:
        """None where numpy's generator is not loaded."""
        module: Any = sys.modules.get("numpy.random")
        if module is None:
            return None
        module.seed()  # also forgets a second normal number kept from an earlier draw
        try:
            generator = module.mtrand._rand._bit_generator
            known = generator.state["state"]
            state = _State.from_address(generator.ctypes.state_address)
        except (AttributeError, KeyError, TypeError):
            return cls(module, None)
        same = type(generator).__name__ == "MT19937" and state.position == known["pos"]
        return cls(module, state if same and list(state.key) == list(known["key"]) else None)

    def renew(self) -> None:
        """Draws from the system."""
        if self._state is None:
            self._module.seed()
            return
        ctypes.memmove(ctypes.addressof(self._state), os.urandom(4 * _KEY_WORDS), 4 * _KEY_WORDS)
        self._state.key[0] = 0x8000_0000  # never all zero, as numpy has it
        self._state.position = _KEY_WORDS  # used up: the next draw makes new numbers from the key
