import weakref


def function():
    pass


reference = weakref.ref(function, lambda _: print("gone"))
