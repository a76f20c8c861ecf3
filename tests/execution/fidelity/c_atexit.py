import ctypes

libc = ctypes.CDLL(None)
handler = ctypes.CFUNCTYPE(None)(lambda: None)
libc.puts(b"unflushed by Python")
