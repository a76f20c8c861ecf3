import contextvars
import sys

print(len(contextvars.copy_context()), sys.get_asyncgen_hooks(), sys.get_coroutine_origin_tracking_depth())
