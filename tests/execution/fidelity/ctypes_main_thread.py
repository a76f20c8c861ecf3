import signal
import threading

print(threading.current_thread() is threading.main_thread(), threading.main_thread().ident == threading.get_ident())
print(threading.get_native_id() == __import__("os").getpid(), signal.getsignal(signal.SIGINT))
