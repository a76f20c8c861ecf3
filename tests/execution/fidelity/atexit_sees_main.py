import atexit

VALUE = 42


def show():
    import __main__

    print(__main__.VALUE, VALUE, __name__)


atexit.register(show)
