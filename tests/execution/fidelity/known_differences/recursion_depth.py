def depth(level=0):
    try:
        return depth(level + 1)
    except RecursionError:
        return level


print(depth())
