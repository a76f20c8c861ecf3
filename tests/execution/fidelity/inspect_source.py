import inspect


def function():
    return "its source"


class Thing:
    attribute = 1


print(inspect.getsource(function), inspect.getsource(Thing), inspect.getsourcefile(function))
