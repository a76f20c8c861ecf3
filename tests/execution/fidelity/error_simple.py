def inner(value):
    return 1 / value


def outer():
    inner(0)


print("before")
outer()
